"""The pairs that an explanation looks at: their states, their roles, and the tokens to watch.

Where the pairs are arithmetic, these tokens are the answer, both operands as answers, and the
neighbours of the answer; of a user's own pairs only the answer is known.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair, PairSet, Split
from circuitune.roles import ARITHMETIC_ROLES, Contrasts, find_contrasts
from circuitune.stats import bootstrap_means
from circuitune.tasks import Task, prepare
from circuitune.writing import encode_text

OPERANDS = ("operand 1", "operand 2")
SPREAD = ("mean", "low", "high", "n")


@dataclass(frozen=True)
class Subject:
    """The pairs of one half that are looked at.

    Attributes:
        name: of the task.
        task: their states.
        found: their roles; None if they have none.
        words: token ids to watch, one of each example, -1 where there is none; ``answer`` always,
            in arithmetic also the operands and the neighbours of the answer.
        digits: token ids of the digits 0-9 as answers, in arithmetic.
        facts: how many pairs there were, and how many were left out for which reason.
    """

    name: str
    task: Task
    found: Contrasts | None
    words: Mapping[str, Int[np.ndarray, " example"]]
    digits: Mapping[int, int]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Means:
    """Makes means with intervals over groups of examples."""

    groups: Sequence[str]
    seed: int
    draws: int

    @property
    def rng(self) -> np.random.Generator:
        """The same at every use, so that all numbers rest on the same resamples."""
        return np.random.default_rng(self.seed)

    def of(self, values: Float[np.ndarray, "row example"]) -> list[dict[str, Any]]:
        """``mean``, ``low``, ``high`` and ``n`` of each row; missing values (NaN) are left out."""
        there = np.isfinite(values)
        if there.all():
            return self._of(values, self.groups)
        found = []
        for row, known in zip(values, there, strict=True):
            own = [group for group, is_known in zip(self.groups, known, strict=True) if is_known]
            found += self._of(row[known][None], own) if own else [dict.fromkeys(SPREAD) | {"n": 0}]
        return found

    def _of(
        self, values: Float[np.ndarray, "row example"], groups: Sequence[str]
    ) -> list[dict[str, Any]]:
        spreads = bootstrap_means(values, rng=self.rng, groups=groups, draws=self.draws)
        return [dict(zip(SPREAD, (s.estimate, s.low, s.high, s.n), strict=True)) for s in spreads]


def look_at(
    model: Model, pair_set: PairSet, name: str, split: Split, *, most: int, seed: int
) -> Subject:
    """At most ``most`` pairs of one half, balanced over groups, with roles and states.

    Raises:
        UserError: the half has no pairs of the task.
    """
    pairs = pair_set.of(name, split)
    if not pairs:
        raise UserError(
            f"An explanation needs pairs of {name!r} in the {split} half, found none; add pairs "
            "with other operands."
        )
    # The answers of all pairs are admissible; a half may have only some.
    answers = [*pair_set.answers, *(pair.answer for pair in pair_set.pairs if pair.task == name)]
    rng = np.random.default_rng(seed)
    facts: dict[str, Any] = {"given": len(pairs)}
    found = None
    try:
        found = find_contrasts(model.tokenizer, pairs, rng=rng)
        facts["dropped"] = found.dropped
        found = found.sample(split, most, rng=rng)
        kept = [pairs[prompt.place] for prompt in found.prompts]
    except UserError as error:
        facts["dropped"] = {}
        facts["roles"] = f"none: {error}"
        kept = pairs[:most]
    task = prepare(model, kept, sorted(set(answers)))
    facts |= {"pairs": len(kept), "groups": len({pair.group for pair in kept})}
    words = {"answer": task.tokens}
    digits: dict[int, int] = {}
    if found is not None and found.roles == ARITHMETIC_ROLES:
        digits = _digit_tokens(model, kept[0])
        words |= _operands(model, found, digits)
        own = {token: digit for digit, token in digits.items()}
        values = [own.get(int(token), -2) for token in task.tokens]
        for step, text in ((-1, "answer - 1"), (1, "answer + 1")):
            words[text] = np.array([digits.get(value + step, -1) for value in values])
    return Subject(name, task, found, words, digits, facts)


def _digit_tokens(model: Model, pair: Pair) -> dict[int, int]:
    """Token of each digit where an answer stands."""
    space = " " if pair.answer.startswith(" ") else ""
    before = encode_text(model.tokenizer, pair.clean)
    written = {d: encode_text(model.tokenizer, f"{pair.clean}{space}{d}") for d in range(10)}
    return {digit: ids[-1] for digit, ids in written.items() if len(ids) == len(before) + 1}


def _operands(
    model: Model, found: Contrasts, digits: Mapping[int, int]
) -> dict[str, Int[np.ndarray, " example"]]:
    """Token that each operand would be as an answer."""
    words = {}
    for name in OPERANDS:
        texts = [
            re.sub(r"\D", "", model.tokenizer.decode([prompt.tokens[at] for at in places]))
            for prompt in found.prompts
            for places in [prompt.roles[name]]
        ]
        words[name] = np.array([digits.get(int(text), -1) if text else -1 for text in texts])
    return words


def kinds_of(subject: Subject) -> dict[str, Float[np.ndarray, "example candidate"]]:
    """Which candidates are the answer, an operand that is not the answer, or neither; weights.

    The weights of an example sum to one, or are missing (NaN) where it has no such candidate.
    """
    candidates = np.array(subject.task.pairs.candidates)
    names = ["answer", *(name for name in OPERANDS if name in subject.words)]
    is_kind = {name: candidates[None] == subject.words[name][:, None] for name in names}
    for name in names[1:]:
        is_kind[name] = is_kind[name] & ~is_kind["answer"]
    is_kind["other"] = ~np.any(list(is_kind.values()), axis=0)
    weights = {}
    for name, mask in is_kind.items():
        counts = mask.sum(axis=1, keepdims=True)
        weights[name] = np.where(counts > 0, mask / np.maximum(counts, 1), np.nan)
    return weights
