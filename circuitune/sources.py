"""The tasks of a transfer matrix: further calculations, word problems, and controls.

Heads that were found on one task are knocked out in the others (Zhang et al. 2024, section on
transfer: multi-digit sums, decimals, powers, year spans, SVAMP, GSM8K). Every task here is a list
of clean and corrupt prompts; the corrupt one has the same numbers and nothing to calculate.

An answer of several digits is asked for one digit at a time: ``"281 + 135 = 4"`` asks for ``"1"``,
the second digit. Which one is drawn; the prompt carries those before it. That needs a tokenizer
that writes digit by digit. With another one most such prompts have no one-token answer; they are
left out, and the facts of the task count them.

Questions whose operands are two one-digit numbers stay on the side where the run has these
operands; all others are shared out by their operands with the seed.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, Literal

from circuitune import controls, readers
from circuitune.controls import Control, Question, halve, keep, writing_of
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Split
from circuitune.problems import Operator, Problem, Template, templates

Family = Literal["arithmetic", "word problem", "control"]
# A half tries up to this many questions for each pair that it may keep, so that weak models
# reach enough pairs; strong ones stop early.
TRIES = 6
# Questions drawn for each pair of a half: enough for two halves, also where they are uneven.
DRAWN = 3 * TRIES


@dataclass(frozen=True)
class Wanted:
    """What a maker of questions needs to know.

    Attributes:
        count: most questions.
        data_dir: the folder with the public data sets; None for the hub.
    """

    count: int
    data_dir: Path | None = None


Maker = Callable[[random.Random, Wanted], list[Question]]


@dataclass(frozen=True)
class Source:
    """How the questions of a task are made, its family, and whether its answers are digits."""

    make: Maker
    family: Family
    digits: bool = True


def _group(a: int, b: int) -> str:
    """The operands in ascending order, as in `Problem.group`."""
    return f"{min(a, b)},{max(a, b)}"


def _ask(sides: tuple[str, str], answer: int, place: int, template: str, group: str) -> Question:
    """Ask for the digit at a place of the answer; both prompts carry the digits before it."""
    digits = str(answer)
    clean, corrupt = (side + digits[:place] for side in sides)
    return Question(clean, corrupt, digits[place], template, group)


# ------------------------------------------------------------------------------------- arithmetic


# Long questions about long numbers are hardly ever answered by small models.
_SHORT = (*(f"equation.{number}" for number in range(1, 6)), "statement.1", "statement.2")


def _frames(operator: Operator) -> list[Template]:
    """The templates in which longer numbers are asked for."""
    every = {frame.id: frame for frame in templates(operator)}
    return [every[f"{operator.id}.{name}"] for name in _SHORT]


def sums(rng: random.Random, wanted: Wanted, *, length: int) -> list[Question]:
    """Sums of two numbers of ``length`` digits, asked for any digit of the answer."""
    frames = _frames(Operator.ADD)
    low, high = 10 ** (length - 1), 10**length - 1
    found = []
    for turn in range(wanted.count):
        frame = frames[turn % len(frames)]
        problem = Problem(Operator.ADD, rng.randint(low, high), rng.randint(low, high))
        place = rng.randrange(len(str(problem.answer)))
        found.append(_ask(frame.render(problem), problem.answer, place, frame.id, problem.group))
    return found


def column(
    rng: random.Random, wanted: Wanted, *, operator: Operator, crossing: bool
) -> list[Question]:
    """The tens digit of sums or differences of two-digit numbers, which the ones change or do not.

    Args:
        rng: draws the operands.
        wanted: how many questions.
        operator: addition, or subtraction with a result of two digits.
        crossing: whether the tens receive a carry or give a borrow.
    """
    adds = operator is Operator.ADD
    pairs = [
        (a, b)
        for a, b in product(range(10, 100), repeat=2)
        if (adds or a - b >= 10)
        and (a % 10 + b % 10 >= 10 if adds else a % 10 < b % 10) == crossing
    ]
    frames = _frames(operator)
    found = []
    for turn, (a, b) in enumerate(rng.sample(pairs, min(wanted.count, len(pairs)))):
        frame, problem = frames[turn % len(frames)], Problem(operator, a, b)
        tens = len(str(problem.answer)) - 2
        found.append(_ask(frame.render(problem), problem.answer, tens, frame.id, problem.group))
    return found


def decimals(rng: random.Random, wanted: Wanted) -> list[Question]:
    """Sums of two numbers with one decimal place, asked for the tenths: ``"4.2 + 2.5 = 6."``."""
    frames = _frames(Operator.ADD)
    tenths = [(a, b) for a, b in product(range(11, 100), repeat=2) if a % 10 and b % 10]
    found = []
    for turn, (a, b) in enumerate(rng.sample(tenths, len(tenths))):
        if (a + b) % 10 == 0:
            continue  # a whole sum would be written without its zero
        frame = frames[turn % len(frames)]
        numbers = {"a": f"{a / 10:.1f}", "b": f"{b / 10:.1f}"}
        stem, answer = f"{(a + b) // 10}.", str((a + b) % 10)
        clean, corrupt = (text.format(**numbers) + stem for text in (frame.clean, frame.corrupt))
        group = ",".join(sorted(numbers.values()))
        found.append(Question(clean, corrupt, answer, f"decimals.{frame.id}", group))
    return found[: wanted.count]


# The operator, and the null symbol or word in its place.
_POWER_FRAMES = (
    ("{a} ^ {b} = ", "{a} @ {b} = "),
    ("{a}^{b} = ", "{a}@{b} = "),
    ("{a}**{b} = ", "{a}@{b} = "),
    ("{a} ** {b} = ", "{a} @ {b} = "),
    ("{a} to the power of {b} is ", "{a} to the nothing of {b} is "),
    ("{a} to the power of {b} equals ", "{a} to the nothing of {b} equals "),
    ("Q: What is {a} to the power of {b}? A: ", "Q: What is {a} to the nothing of {b}? A: "),
)


def power(rng: random.Random, wanted: Wanted) -> list[Question]:
    """Squares and cubes of 2 to 9, asked for any digit."""
    found = [
        _ask(
            (clean.format(a=a, b=b), corrupt.format(a=a, b=b)),
            a**b,
            place,
            f"power.{number}",
            _group(a, b),
        )
        for a, b in product(range(2, 10), (2, 3))
        for place in range(len(str(a**b)))
        for number, (clean, corrupt) in enumerate(_POWER_FRAMES, start=1)
    ]
    return rng.sample(found, min(wanted.count, len(found)))


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# An example of these operands stands in front of some prompts; it is never asked for.
_EXAMPLES = {(1, 2), (2, 2)}
_WORD_FRAMES = (
    (Operator.ADD, "{a} plus {b} equals ", "{a} nothing {b} equals "),
    (Operator.ADD, "{a} plus {b} is equal to ", "{a} nothing {b} is equal to "),
    (Operator.ADD, "{a} + {b} = ", "{a} @ {b} = "),
    (
        Operator.ADD,
        "one plus two equals three, two plus two equals four, {a} plus {b} equals ",
        "one nothing two equals three, two nothing two equals four, {a} nothing {b} equals ",
    ),
    (Operator.SUB, "{a} minus {b} equals ", "{a} nothing {b} equals "),
    (Operator.SUB, "{a} minus {b} is equal to ", "{a} nothing {b} is equal to "),
)


def number_words(rng: random.Random, wanted: Wanted) -> list[Question]:
    """Sums and differences in words, ``"three plus five equals"`` asks for ``" eight"``."""
    found = [
        Question(
            clean.format(a=_WORDS[a], b=_WORDS[b]),
            corrupt.format(a=_WORDS[a], b=_WORDS[b]),
            _WORDS[answer],
            f"words.{number}",
            _group(a, b),
        )
        for a, b in product(range(1, 10), repeat=2)
        if (min(a, b), max(a, b)) not in _EXAMPLES
        for number, (operator, clean, corrupt) in enumerate(_WORD_FRAMES, start=1)
        if (answer := operator.apply(a, b)) is not None and 0 < answer < 10
    ]
    return rng.sample(found, min(wanted.count, len(found)))


# ----------------------------------------------------------------------------------- word problems

_SPANS = (
    *(("war", "lasted"), ("siege", "lasted"), ("drought", "lasted"), ("project", "took")),
    *(("reign", "lasted"), ("voyage", "took"), ("strike", "lasted"), ("plague", "lasted")),
)
_LISTS = (("book", "kings"), ("map", "towns"), ("shop", "coins"), ("paper", "names"))
# Where the years stand; in the corrupt prompt a list with as many items has no last year.
_SPAN_FRAMES = (
    ("The {event} {verb} {n} years from ", "The {place} listed {n} {things} from ", " to "),
    (
        "The {event} {verb} {n} years. It began in ",
        "The {place} listed {n} {things}. It began in ",
        " and ended in ",
    ),
)


def year_span(rng: random.Random, wanted: Wanted) -> list[Question]:
    """``"The war lasted 5 years from 1723 to 172"`` asks for ``"8"``; a list has nothing to add."""
    sums = [(a, b) for a, b in product(range(1, 9), range(2, 9)) if a + b <= 9]
    found = []
    for turn in range(wanted.count):
        (first, years), decade = rng.choice(sums), rng.randint(110, 199)
        (event, verb), (place, things) = rng.choice(_SPANS), rng.choice(_LISTS)
        number = turn % len(_SPAN_FRAMES)
        *starts, middle = _SPAN_FRAMES[number]
        words = {"event": event, "verb": verb, "place": place, "things": things, "n": years}
        clean, corrupt = (
            f"{start.format(**words)}{decade}{first}{middle}{decade}" for start in starts
        )
        template = f"year_span.{number + 1}"
        found.append(Question(clean, corrupt, str(first + years), template, _group(first, years)))
    return found


_NAMES = (
    *(("Tom", "He"), ("Anna", "She"), ("Sam", "He"), ("Mary", "She"), ("Ben", "He")),
    *(("Lucy", "She"), ("Jack", "He"), ("Emma", "She")),
)
_THINGS = ("apples", "books", "coins", "stamps", "eggs", "balls", "cards", "pens")
# What changes the number, and what leaves it as it is; then what is asked.
_EVENTS = (
    ("+", "{name} has", "gets {b} more {things}", "reads {b} old letters", "Now {name} has "),
    ("+", "{name} had", "found {b} more {things}", "visited {b} old friends", "Now {name} has "),
    ("+", "{name} had", "bought {b} more {things}", "saw {b} small birds", "Now {name} has "),
    ("-", "{name} has", "gives away {b} {things}", "looks at {b} birds", "Now {name} has "),
    ("-", "{name} had", "lost {b} {things}", "met {b} friends", "{he} has "),
    ("-", "{name} had", "sold {b} {things}", "read {b} letters", "Now {name} has "),
)


def objects(rng: random.Random, wanted: Wanted) -> list[Question]:
    """``"Tom has 3 apples. He gets 5 more apples. Now Tom has "``; also of things given away."""
    found = []
    every = list(product(range(2, 10), range(2, 10), range(len(_EVENTS))))
    every = [(a, b, n) for a, b, n in every if 0 < (a + b if _EVENTS[n][0] == "+" else a - b) < 10]
    for _ in range(wanted.count):
        a, b, number = rng.choice(every)
        sign, start, *events, end = _EVENTS[number]
        (name, he), things = rng.choice(_NAMES), rng.choice(_THINGS)
        words = {"name": name, "he": he, "things": things, "b": b}
        clean, corrupt = (
            f"{start} {a} {{things}}. {{he}} {event}. {end}".format(**words) for event in events
        )
        answer = str(a + b if sign == "+" else a - b)
        found.append(Question(clean, corrupt, answer, f"objects.{number + 1}", _group(a, b)))
    return found


def word_problem(rng: random.Random, wanted: Wanted, *, name: str) -> list[Question]:
    """The written calculation of a word problem; in the corrupt prompt its operator is ``@``."""
    found = readers.steps(name, wanted.data_dir, limit=wanted.count)
    rng.shuffle(found)
    return [
        _ask(
            (
                step.before + step.expression,
                step.before + step.expression.replace(step.sign, "@", 1),
            ),
            step.answer,
            rng.randrange(len(str(step.answer))),
            f"{name}.{step.sign}",
            _group(step.a, step.b),
        )
        for step in found
    ]


def _control(kind: controls.Kind) -> Source:
    return Source(lambda rng, wanted: kind.make(rng)[: wanted.count], "control", kind.digits)


SOURCES: dict[str, Source] = {
    **{f"digits_{n}": Source(partial(sums, length=n), "arithmetic") for n in (2, 3, 4)},
    **{
        name: Source(partial(column, operator=operator, crossing=crossing), "arithmetic")
        for name, operator, crossing in (
            ("carry", Operator.ADD, True),
            ("no_carry", Operator.ADD, False),
            ("borrow", Operator.SUB, True),
            ("no_borrow", Operator.SUB, False),
        )
    },
    "decimals": Source(decimals, "arithmetic"),
    "power": Source(power, "arithmetic"),
    "number_words": Source(number_words, "arithmetic", digits=False),
    "year_span": Source(year_span, "word problem"),
    "objects": Source(objects, "word problem"),
    **{
        name: Source(partial(word_problem, name=name), "word problem")
        for name in ("svamp", "addsub", "gsm8k")
    },
    **{name: _control(kind) for name, kind in controls.KINDS.items()},
}


def make_sources(
    model: Model,
    selection: dict[str, Any],
    names: Sequence[str],
    *,
    data_dir: Path | None,
    per_split: int,
    seed: int,
) -> list[Control]:
    """Tasks on a model; one that the model hardly answers has no pairs, and its facts say why.

    All questions are made before the model runs, so a data set that is missing is found at once.

    Args:
        model: the model.
        selection: content of ``selection.json``: the prefix of all prompts, on which side of the
            space a digit stands, and the groups of each half.
        names: which tasks, of `SOURCES`.
        data_dir: the folder with the public data sets; None for the hub.
        per_split: most pairs of a half; up to `TRIES` times as many questions are tried.
        seed: draws and splits the questions.

    Raises:
        UserError: a name is unknown, or a data set cannot be had.
    """
    for name in names:
        if name not in SOURCES:
            raise UserError(
                f"A transfer task must be one of {', '.join(SOURCES)}, found {name!r}; use these."
            )
    known = _known_groups(selection)
    wanted = Wanted(DRAWN * per_split, data_dir)
    drawn: dict[str, Mapping[Split, list[Question]]] = {}
    for name in names:
        rng = random.Random(f"{seed}/{name}")
        halves = halve(SOURCES[name].make(rng, wanted), rng, known)
        if SOURCES[name].family != "control":
            halves = {split: _take_turns(side) for split, side in halves.items()}
        drawn[name] = halves
    return [
        keep(
            model,
            name,
            halves,
            writing_of(selection, digits=SOURCES[name].digits),
            per_split=per_split,
            batch=per_split,
            batches=TRIES,
        )
        for name, halves in drawn.items()
    ]


def _take_turns(questions: Sequence[Question]) -> list[Question]:
    """The questions in an order in which the answers take turns.

    So a model gains little by always saying the commonest answer, such as the leading 1 of a sum.
    """
    by_answer: dict[str, list[Question]] = {}
    for question in questions:
        by_answer.setdefault(question.answer, []).append(question)
    laps = zip_longest(*by_answer.values())
    return [question for lap in laps for question in lap if question is not None]


def _known_groups(selection: dict[str, Any]) -> dict[str, Split]:
    """The half of each pair of one-digit operands in a run."""
    known: dict[str, Split] = dict.fromkeys(selection.get("select_groups", ()), "select")
    return known | dict.fromkeys(selection.get("held_out_groups", ()), "test")
