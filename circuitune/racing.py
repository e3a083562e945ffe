"""Racing: the exact top k of a sweep for a fraction of its cost.

A sweep measures every component on every example; most components are clearly weak after a few.
A race draws the examples in random order without replacement, in blocks that grow. Each component
has an interval for its mean over *all* examples. The *cut* lies midway between the k-th and the
next smallest mean. In each round only components whose interval holds the cut are measured on
their next block; the race ends when none is left. Weak components stop at the first block, and
only near ties at the boundary see all examples, where nothing is left to chance.

What is promised: the set is that of the full sweep with probability at least ``confidence``, over
the random order. The set over a finite list of examples is the target, so examples that share
operands or a template do no harm; how far the *list* stands for other examples is another question
(see `circuitune.stats.bootstrap_jaccard`). The order within the set is not promised.

Why: an interval is ``mean +- t * s * sqrt((1 - n/N) / n)``, Student's t with the finite population
correction (Cochran 1977, section 2.8). A wrong set needs a component of the true set whose lower
bound lies above its true mean, or another whose upper bound lies below its own: one side per
component. So each component and block gets the tail ``(1 - confidence) / (components * blocks)``
(Bonferroni); the last block, which makes the mean exact, needs none. Since each of these intervals
exists whatever the others do, the choice of what to measure next costs nothing.

What it rests on: the t interval, and a ``measure`` that gives the same number whatever is measured
beside it. A component that acts on a share p of the examples shows nothing in the first block
with probability ``(1 - p)**first`` and is then dropped; raise ``first`` where that is likely.
Bounds free of this assumption exist (empirical Bernstein-Serfling, Bardenet & Maillard 2015,
section 4) but leave little to gain: with the ranges known they saved a factor of 1.9 where t
intervals save 10.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from circuitune.components import Choice, Component
from circuitune.errors import UserError

FIRST = 16  # fewer examples are too few for a t interval far out in its tail
GROWTH = 1.5  # most growth of the examples from block to block; finer saves 3 % and doubles calls

Measure = Callable[[list[int], list[int]], Float[np.ndarray, "row example"]]
"""Effects of some components (by row number) on some examples (by place), negative = supporting.

A value must depend on its component and example alone: a mean taken over the examples of one call
would make it another quantity. The blocks of places are the same for all components, so what does
not depend on the component is worth keeping between calls.
"""


@dataclass(frozen=True)
class Race:
    """The result of a race; arrays are in the order of ``components``.

    Attributes:
        components: all that took part.
        k: how many were wanted.
        mean: mean effect over the examples used, exact where all were used.
        half: half the width of the interval that decided, zero where all were used.
        used: number of examples each component was measured on.
        examples: number of all examples.
        rounds: how often a cut was drawn and components were dropped.
        confidence: least probability that the set is that of the full sweep; 1 where no component
            was dropped on the word of its interval.
    """

    components: tuple[Component, ...]
    k: int
    mean: Float[np.ndarray, " sender"]
    half: Float[np.ndarray, " sender"]
    used: Int[np.ndarray, " sender"]
    examples: int
    rounds: int
    confidence: float

    @property
    def chosen(self) -> list[Choice]:
        """The k components with the most negative means, the strongest first.

        Ties go to the component that comes first, as in `EffectTable.rank`.
        """
        return [
            Choice(
                self.components[row],
                float(self.mean[row]),
                float(self.mean[row] - self.half[row]),
                float(self.mean[row] + self.half[row]),
            )
            for row in _ascending(self.mean)[: self.k]
        ]

    @property
    def undecided(self) -> int:
        """How many components stayed undecided until all examples were used."""
        return int((self.used == self.examples).sum())

    def spent(self, costs: Sequence[float] | None = None) -> float:
        """Evaluations (component times example) that the race took.

        Args:
            costs: what one evaluation of each component costs, 1 by default. In a sweep a sender
                of layer l is replayed through the layers above it, so it costs
                ``layers - l`` layer calls.
        """
        return float(self._costs(costs) @ self.used)

    def full(self, costs: Sequence[float] | None = None) -> float:
        """Evaluations that the full sweep would take; ``costs`` as in `spent`."""
        return float(self._costs(costs).sum() * self.examples)

    def saving(self, costs: Sequence[float] | None = None) -> float:
        """How many times fewer evaluations than in the full sweep; ``costs`` as in `spent`."""
        return self.full(costs) / self.spent(costs)

    def to_json(self) -> dict[str, Any]:
        """For records: the set with its intervals, and what it took."""
        return {
            "k": self.k,
            "examples": self.examples,
            "rounds": self.rounds,
            "evaluations": int(self.spent()),
            "full_evaluations": int(self.full()),
            "undecided": self.undecided,
            "confidence": self.confidence,
            "chosen": [choice.to_json() for choice in self.chosen],
        }

    def _costs(self, costs: Sequence[float] | None) -> Float[np.ndarray, " sender"]:
        if costs is not None and len(costs) != len(self.components):
            raise UserError(
                f"costs must be given for each of {len(self.components)} components, found "
                f"{len(costs)}; pass one number per component."
            )
        return np.ones(len(self.components)) if costs is None else np.asarray(costs, dtype=float)


def race(
    measure: Measure,
    components: Sequence[Component],
    examples: int,
    *,
    k: int,
    rng: np.random.Generator,
    confidence: float = 0.95,
    first: int = FIRST,
) -> Race:
    """The k components with the most negative mean effect over all examples, by a race.

    Args:
        measure: gives effects of some components on some examples, see `Measure`.
        components: all that take part; `measure` gets their row numbers.
        examples: number of all examples; `measure` gets places from 0 to below it.
        k: how many components are wanted, 1 to all.
        rng: draws the order of the examples, and nothing else.
        confidence: least probability that the set is that of the full sweep, between 0 and 1.
        first: examples in the first block, which every component is measured on.

    Raises:
        UserError: an argument is out of range, or an effect is not finite.
    """
    _check(len(components), examples, k=k, confidence=confidence, first=first)
    order = rng.permutation(examples)
    ends = block_ends(examples, first)
    tail = (1 - confidence) / (len(components) * max(1, len(ends) - 1))
    values = np.full((len(components), examples), np.nan)
    used = np.zeros(len(components), dtype=int)
    mean, half = np.zeros(len(components)), np.full(len(components), np.inf)
    running, rounds = np.ones(len(components), dtype=bool), 0
    while running.any():
        rounds += 1
        before = used.copy()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            rows = np.flatnonzero(running & (before == start))
            if rows.size == 0:
                continue
            block = order[start:end]
            values[np.ix_(rows, block)] = _measured(measure, rows.tolist(), block.tolist())
            used[rows] = end
            # The full mean is summed in the caller's order, so that it equals that of a sweep.
            seen = values[rows] if end == examples else values[np.ix_(rows, order[:end])]
            mean[rows], half[rows] = _estimate(seen, examples, tail)
        running = (np.abs(mean - _cut(mean, k)) <= half) & (used < examples)
    certain = k == len(components) or bool((used == examples).all())
    reached = 1.0 if certain else confidence
    return Race(tuple(components), k, mean, half, used, examples, rounds, reached)


def block_ends(examples: int, first: int = FIRST) -> list[int]:
    """Number of examples used after each block: ``first`` to all, in steps of at most `GROWTH`."""
    if examples <= first:
        return [examples]
    steps = int(np.ceil(np.log(examples / first) / np.log(GROWTH)))
    ends = np.geomspace(first, examples, steps + 1).round().astype(int)
    return np.unique(ends).tolist()


def _ascending(mean: Float[np.ndarray, " sender"]) -> Int[np.ndarray, " sender"]:
    return np.argsort(mean, kind="stable")


def _cut(mean: Float[np.ndarray, " sender"], k: int) -> float:
    """The middle between the k-th and the next smallest mean; infinite if there is no next."""
    ranked = np.sort(mean)
    return float((ranked[k - 1] + ranked[k]) / 2) if k < len(ranked) else np.inf


def _estimate(
    values: Float[np.ndarray, "row example"], examples: int, tail: float
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Mean of each row, and how far the mean over all examples may lie from it on one side.

    Args:
        values: the effects seen, drawn without replacement.
        examples: number of all examples.
        tail: probability of a miss on one side.
    """
    seen = values.shape[1]
    mean = values.mean(axis=1)
    if seen == examples:
        return mean, np.zeros(len(mean))
    error = values.std(axis=1, ddof=1) * np.sqrt((1 - seen / examples) / seen)
    # Rounding must not decide between equal components.
    rounding = seen * np.finfo(float).eps * np.abs(values).max(axis=1)
    return mean, float(-stdtrit(seen - 1, tail)) * error + rounding


def _measured(
    measure: Measure, rows: list[int], places: list[int]
) -> Float[np.ndarray, "row example"]:
    values = np.asarray(measure(rows, places), dtype=float)
    if values.shape != (len(rows), len(places)):
        raise UserError(
            f"measure must give {len(rows)} components by {len(places)} examples, found shape "
            f"{values.shape}; return one row per component asked for."
        )
    if not np.isfinite(values).all():
        row = rows[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
        raise UserError(
            f"Effects must be finite, component number {row} has others; load the model in "
            "float32 or look for overflow."
        )
    return values


def _check(components: int, examples: int, *, k: int, confidence: float, first: int) -> None:
    if not 1 <= k <= components:
        raise UserError(
            f"k must be between 1 and the number of components {components}, found {k}; "
            "choose another k."
        )
    if examples < 1 or first < 2:
        raise UserError(
            f"A race needs 1 example or more and a first block of 2 or more, found {examples} and "
            f"{first}; pass more."
        )
    if not 0 < confidence < 1:
        raise UserError(
            f"confidence must be between 0 and 1, found {confidence}; 0.95 is usual, and a full "
            "sweep gives certainty."
        )
