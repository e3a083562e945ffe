"""Control tasks: questions in the form of the arithmetic ones, for which nothing is calculated.

Copying a number, copying a word, the capital of a country: the answer is read from the prompt or
from memory. They show whether a circuit carries calculation or answering of any kind, and their
own circuits show whether the circuit of *another* task would do as well. The prompts are made
here, nothing is downloaded. Only prompts with a one-token answer that the model gets right are
kept; a task with too few of them is dropped, and the counts say so.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from circuitune.models import Model
from circuitune.pairs import Pair, Split, Writing, answers_correctly, encode_text

# Most pairs of a half; as many again may be tried.
PER_SPLIT = 24
# Fewer in a half say nothing.
LEAST = 8

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
    """A clean and a corrupt prompt that end with one space, and the answer without a space.

    Questions of one ``group`` share their content and are never split.
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
        facts: how many prompts were ``tried``, had an answer of ``one_token``, were ``correct``,
            and the pairs kept in ``select`` and ``test``.
    """

    name: str
    pairs: tuple[Pair, ...]
    facts: dict[str, Any]

    def of(self, split: Split) -> list[Pair]:
        """The pairs of one half."""
        return [pair for pair in self.pairs if pair.split == split]


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
    prefix = str(selection.get("prefix", ""))
    spaced = bool(selection.get("spaced_answer", False))
    return [
        _control(model, name, Writing(prefix, spaced if kind.digits else True), seed)
        for name, kind in KINDS.items()
        if name not in taken
    ]


def _control(model: Model, name: str, writing: Writing, seed: int) -> Control:
    rng = random.Random(f"{seed}/{name}")
    drawn = KINDS[name].make(rng)
    questions = list({question.clean: question for question in drawn}.values())
    groups = sorted({question.group for question in questions})
    chosen = set(rng.sample(groups, (len(groups) + 1) // 2))
    kept: list[Pair] = []
    facts = {"tried": 0, "one_token": 0, "correct": 0, "select": 0, "test": 0}
    halves: tuple[Split, ...] = ("select", "test")
    for split in halves:
        mine = [q for q in questions if (q.group in chosen) == (split == "select")]
        tried = [_pair(name, question, writing, split) for question in mine[: 2 * PER_SPLIT]]
        single = [pair for pair in tried if answer_token(model.tokenizer, pair) is not None]
        correct = _answered(model, single)
        counts = (len(tried), len(single), len(correct))
        for fact, count in zip(("tried", "one_token", "correct"), counts, strict=True):
            facts[fact] += count
        facts[split] = min(PER_SPLIT, len(correct))
        kept += correct[:PER_SPLIT]
    enough = min(facts["select"], facts["test"]) >= LEAST and all(
        len({pair.answer for pair in kept if pair.split == split}) > 1 for split in halves
    )
    return Control(name, tuple(kept) if enough else (), facts)


def _pair(name: str, question: Question, writing: Writing, split: Split) -> Pair:
    clean, answer = writing.write(question.clean, question.answer)
    corrupt, _ = writing.write(question.corrupt, "")
    return Pair(clean, corrupt, answer, name, question.template, split, question.group)


def answer_token(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> int | None:
    """Token id of a pair's answer after its clean prompt; None if it is not one token."""
    ids = encode_text(tokenizer, pair.clean)
    both = encode_text(tokenizer, pair.clean + pair.answer)
    return both[-1] if len(both) == len(ids) + 1 and both[:-1] == ids else None


def _answered(model: Model, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose answer is the model's first choice among all tokens."""
    if not pairs:
        return []
    prompts = [encode_text(model.tokenizer, pair.clean) for pair in pairs]
    tokens = [answer_token(model.tokenizer, pair) or 0 for pair in pairs]
    hits = answers_correctly(model, prompts, tokens)
    return [pair for pair, hit in zip(pairs, hits, strict=True) if hit]
