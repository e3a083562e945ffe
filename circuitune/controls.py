"""Control tasks: questions in the form of the arithmetic ones, for which nothing is calculated.

Copying a number, copying a word, the capital of a country: the answer is read from the prompt or
from memory. They show whether a circuit carries calculation or answering of any kind, and their
own circuits show whether the circuit of *another* task would do as well. The prompts are made
here, nothing is downloaded. A circuit of such a task is found on prompts with a one-token answer
that the model gets right; what a knockout does to the task is measured on wrong ones too. A task
with too few right answers is dropped, and the counts say so.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from circuitune.models import Model
from circuitune.pairs import Pair, Split, answer_rate, answers_correctly
from circuitune.writing import Writing, answer_token, encode_text

# Most pairs of a half; as many again may be tried.
PER_SPLIT = 48
# Fewer in a half say nothing.
LEAST = 8
SPLITS: tuple[Split, ...] = get_args(Split)

WORDS = (
    *("apple", "river", "stone", "table", "horse", "music", "paper", "window", "garden", "bottle"),
    *("cloud", "bridge", "market", "doctor", "summer", "silver", "orange", "forest", "camera"),
    *("planet", "letter", "winter", "flower", "kitchen", "island", "mountain", "bread", "chair"),
    *("water", "house", "train", "light", "earth", "world", "night", "heart", "voice", "money"),
)
CAPITALS = (
    ("France", "Paris"),
    ("Germany", "Berlin"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("England", "London"),
    ("Ireland", "Dublin"),
    ("Portugal", "Lisbon"),
    ("Austria", "Vienna"),
    ("Greece", "Athens"),
    ("Poland", "Warsaw"),
    ("Hungary", "Budapest"),
    ("Russia", "Moscow"),
    ("Japan", "Tokyo"),
    ("China", "Beijing"),
    ("Cuba", "Havana"),
    ("Egypt", "Cairo"),
    ("Iran", "Tehran"),
    ("Iraq", "Baghdad"),
    ("Syria", "Damascus"),
    ("Lebanon", "Beirut"),
    ("Turkey", "Ankara"),
    ("Sweden", "Stockholm"),
    ("Norway", "Oslo"),
    ("Denmark", "Copenhagen"),
    ("Finland", "Helsinki"),
    ("Belgium", "Brussels"),
    ("Ukraine", "Kiev"),
    ("Kenya", "Nairobi"),
    ("Canada", "Ottawa"),
    ("Peru", "Lima"),
)


@dataclass(frozen=True)
class Question:
    """A clean and a corrupt prompt, and the answer without a space.

    The prompts end with one space, which may move in front of the answer (`Writing`). Prompts that
    end otherwise, such as ``"281 + 135 = 4"``, are followed by the answer as they are. Questions
    of one ``group`` share their content and are never split.
    """

    clean: str
    corrupt: str
    answer: str
    template: str
    group: str


@dataclass(frozen=True)
class Control:
    """A control task on one model.

    Attributes:
        name: the task.
        pairs: pairs of both halves that the model answers; empty where they are too few.
        facts: how many prompts were ``tried``, had an answer of ``one_token``, were ``correct``;
            of those with one token, how many have the ``commonest`` answer, which a model that
            always says it would get right; the pairs kept in ``select`` and ``test``; and of those
            with one token, the share of correct ones as ``rate`` with ``low`` and ``high``.
        asked: all pairs with a one-token answer, right or wrong; empty where ``pairs`` is.
    """

    name: str
    pairs: tuple[Pair, ...]
    facts: dict[str, Any]
    asked: tuple[Pair, ...] = ()

    def of(self, split: Split) -> list[Pair]:
        """The answered pairs of one half, on which a circuit of the task can be found."""
        return [pair for pair in self.pairs if pair.split == split]

    def all_of(self, split: Split) -> list[Pair]:
        """All pairs of one half, on which harm is measured.

        Where only right answers are kept, any disturbance can but do harm.
        """
        return [pair for pair in self.asked if pair.split == split]


# The last item is what is asked for; the corrupt prompt has the null item in its place.
_NUMBER_FRAMES = (
    "{a}, {b}, {c}. The last number is ",
    "First {a}, then {b}. I wrote down the number {c}. The number that I wrote down is ",
    "Not {a} or {b}. Say {c} again: ",
)
_WORD_FRAMES = (
    "{a}, {b}, {c}, {a}, {b}, ",
    "List: {a}, {b}, {c}. Last word: ",
    "{a} and {b} and {c}. Again: {a} and {b} and ",
)
_CAPITAL_FRAMES = (
    "The {asked} of {country} is ",
    "The {asked} of {country} is called ",
    "{country} is a country. The {asked} of {country} is ",
)


def copy_number(rng: random.Random) -> list[Question]:
    """Say a digit again; in the corrupt prompt a symbol stands in its place."""
    lists = [rng.sample(range(10), 3) for _ in range(8 * PER_SPLIT)]
    return [
        _copied("number", _NUMBER_FRAMES, place, tuple(map(str, items)), null="#")
        for place, items in enumerate(lists)
    ]


def copy_word(rng: random.Random) -> list[Question]:
    """Say a word again; in the corrupt prompt a null word stands in its place."""
    lists = [rng.sample(WORDS, 3) for _ in range(8 * PER_SPLIT)]
    return [
        _copied("word", _WORD_FRAMES, place, tuple(items), null="nothing")
        for place, items in enumerate(lists)
    ]


def _copied(
    kind: str, frames: Sequence[str], place: int, items: tuple[str, ...], *, null: str
) -> Question:
    """One list in one frame; frames take turns. Lists of the same items are never split."""
    a, b, c = items
    number = place % len(frames)
    clean, corrupt = (frames[number].format(a=a, b=b, c=item) for item in (c, null))
    return Question(clean, corrupt, c, f"{kind}.{number + 1}", " ".join(sorted(items)))


def capital(rng: random.Random) -> list[Question]:
    """The capital of a country; the corrupt sentence asks for a null word of it."""
    found = [
        Question(
            frame.format(asked="capital", country=country),
            frame.format(asked="none", country=country),
            city,
            f"capital.{number}",
            country,
        )
        for country, city in CAPITALS
        for number, frame in enumerate(_CAPITAL_FRAMES, start=1)
    ]
    rng.shuffle(found)
    return found


@dataclass(frozen=True)
class Kind:
    """How the questions of a control task are made, and whether answers are digits."""

    make: Callable[[random.Random], list[Question]]
    digits: bool = False


KINDS = {
    "copy_number": Kind(copy_number, digits=True),
    "copy_word": Kind(copy_word),
    "capital": Kind(capital),
}


def make_controls(
    model: Model, selection: dict[str, Any], *, taken: Sequence[str] = (), seed: int = 0
) -> list[Control]:
    """Every control task on a model; one that the model hardly answers has no pairs.

    Args:
        model: the model.
        selection: content of ``selection.json``: the prefix of all prompts, and on which side of
            the space a digit stands.
        taken: names that other tasks have already; these controls are left out.
        seed: draws and splits the questions.
    """
    found = []
    for name in (name for name in KINDS if name not in taken):
        rng = random.Random(f"{seed}/{name}")
        halves = halve(KINDS[name].make(rng), rng)
        writing = writing_of(selection, digits=KINDS[name].digits)
        found.append(keep(model, name, halves, writing, per_split=PER_SPLIT, batch=2 * PER_SPLIT))
    return found


def writing_of(selection: dict[str, Any], *, digits: bool) -> Writing:
    """How a task's prompts are written in a run.

    Args:
        selection: content of ``selection.json``.
        digits: whether the answers are digits, which stand where the run found them to be one
            token; words have their space in front of them.
    """
    spaced = bool(selection.get("spaced_answer", False))
    return Writing(str(selection.get("prefix", "")), spaced if digits else True)


def halve(
    questions: Sequence[Question], rng: random.Random, known: Mapping[str, Split] | None = None
) -> dict[Split, list[Question]]:
    """Share questions out to the two halves, all of one group to one; repeated ones are left out.

    Args:
        questions: the questions, in the order in which they are to be tried.
        rng: draws the half of each group that is not known.
        known: groups that have a half already.
    """
    sides: dict[str, Split] = dict(known or {})
    groups = sorted({question.group for question in questions} - sides.keys())
    chosen = set(rng.sample(groups, (len(groups) + 1) // 2))
    sides |= {group: "select" if group in chosen else "test" for group in groups}
    halves: dict[Split, list[Question]] = {split: [] for split in SPLITS}
    for question in {question.clean: question for question in questions}.values():
        halves[sides[question.group]].append(question)
    return halves


def keep(
    model: Model,
    name: str,
    halves: Mapping[Split, Sequence[Question]],
    writing: Writing,
    *,
    per_split: int,
    batch: int,
    batches: int = 1,
) -> Control:
    """Try questions on a model and keep those with a one-token answer that it gets right.

    Args:
        model: the model.
        name: the task.
        halves: questions of each half, in the order in which they are tried.
        writing: how they are written.
        per_split: most pairs of a half.
        batch: questions of a half that are tried at once.
        batches: most batches of a half; no more are run than give enough pairs.

    Returns:
        the task, without pairs where a half has fewer than `LEAST` or all with the same answer.
    """
    kept: list[Pair] = []
    every: list[Pair] = []
    right: list[np.ndarray] = []
    answers: Counter[str] = Counter()
    facts: dict[str, Any] = dict.fromkeys(
        ("tried", "one_token", "correct", "commonest", *SPLITS), 0
    )
    for split in SPLITS:
        mine: list[Pair] = []
        for start in range(0, batches * batch, batch):
            asked = halves[split][start : start + batch]
            tried = [_pair(name, question, writing, split) for question in asked]
            single = [pair for pair in tried if _token(model.tokenizer, pair) is not None]
            hits = _hits(model, single)
            correct = [pair for pair, hit in zip(single, hits, strict=True) if hit]
            right.append(hits)
            answers.update(pair.answer for pair in single)
            every += single
            counts = (len(tried), len(single), len(correct))
            for fact, count in zip(("tried", "one_token", "correct"), counts, strict=True):
                facts[fact] += count
            mine += correct
            if len(mine) >= per_split:
                break
        kept += mine[:per_split]
        facts[split] = min(per_split, len(mine))
    facts["commonest"] = max(answers.values(), default=0)
    if every:
        facts |= answer_rate(np.concatenate(right), every)
    enough = min(facts[split] for split in SPLITS) >= LEAST and all(
        len({pair.answer for pair in kept if pair.split == split}) > 1 for split in SPLITS
    )
    return Control(name, tuple(kept), facts, tuple(every)) if enough else Control(name, (), facts)


def _pair(name: str, question: Question, writing: Writing, split: Split) -> Pair:
    clean, answer = writing.prefix + question.clean, question.answer
    corrupt = writing.prefix + question.corrupt
    if question.clean.endswith(" "):
        clean, answer = writing.write(question.clean, question.answer)
        corrupt, _ = writing.write(question.corrupt, "")
    return Pair(clean, corrupt, answer, name, question.template, split, question.group)


def _token(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> int | None:
    return answer_token(tokenizer, pair.clean, pair.answer)


def _hits(model: Model, pairs: Sequence[Pair]) -> np.ndarray:
    """Whether the answers are the model's first choice among all tokens."""
    if not pairs:
        return np.zeros(0, bool)
    prompts = [encode_text(model.tokenizer, pair.clean) for pair in pairs]
    tokens = [_token(model.tokenizer, pair) or 0 for pair in pairs]
    return answers_correctly(model, prompts, tokens)
