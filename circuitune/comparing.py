"""Which of two model variants is better: paired by question, over one or several seeds.

Questions and training seeds are both samples: of all questions of a task, and of all runs that the
same recipe could give. An interval over questions alone says whether *this* trained model beats
that one; with three seeds it says nothing about a fourth. So several seeds are read as a two-way
random effects design, question by seed. The variance of the grand mean is taken as the sum of the
variance of question means over questions and that of seed means over seeds, which counts the
interaction twice and is therefore never too small (Owen 2007, "The pigeonhole bootstrap", shows
that resampling both ways does the same). Student's t has the degrees of freedom of Satterthwaite
(1946): few seeds count as few.

With one seed per variant the interval is that of `circuitune.stats.paired_difference`, and the
test is McNemar's for right and wrong answers, else sign flips.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import norm
from scipy.stats import t as student

from circuitune.stats import (
    Interval,
    bootstrap_mean,
    clustered_proportion,
    holm,
    mcnemar,
    non_inferior,
    paired_difference,
    sign_flip_p,
)

# What is averaged: hits, differences of hits, or anything else.
Kind = Literal["shares", "differences", "numbers"]


@dataclass(frozen=True)
class Scores:
    """What one trained variant reached on the questions of one task.

    Attributes:
        task: name of the task.
        variant: name of the variant.
        seed: of its training.
        ids: names of the questions.
        values: 1 or 0 for right and wrong, or any number that is better when it is higher.
        weights: weight of each question, such as its words; equal where None.
        groups: questions that share something, such as operands, have the same group.
    """

    task: str
    variant: str
    seed: int
    ids: tuple[str, ...]
    values: Float[np.ndarray, " example"]
    weights: Float[np.ndarray, " example"] | None = None
    groups: tuple[Hashable, ...] | None = None

    def __post_init__(self) -> None:
        """Check that all columns have one entry a question, and that no question comes twice."""
        if not len(self.ids) == len(self.values) == len(set(self.ids)) > 0:
            raise ValueError(
                f"scores must have one value for each of at least one different question, found "
                f"{len(self.values)} values for {len(set(self.ids))} of {len(self.ids)} ids"
            )

    @property
    def scaled(self) -> Float[np.ndarray, " example"]:
        """Values whose plain mean is the weighted mean, and varies as that does.

        Deviations from the mean are weighted, not the values: a long text in a resample makes the
        mean no larger (the linearised ratio, Cochran 1977, chapter 6).
        """
        if self.weights is None:
            return self.values
        mean = float(np.average(self.values, weights=self.weights))
        return mean + (self.values - mean) * self.weights / self.weights.mean()


@dataclass(frozen=True)
class Comparison:
    """Variant ``a`` minus variant ``b`` on one task.

    Attributes:
        task: name of the task.
        a, b: names of the variants.
        difference: mean difference, in the unit of the values.
        p: of no difference, two-sided.
        p_holm: the same, corrected over a family of tasks; NaN before `family`.
        non_inferior: whether a loss of the margin or more is excluded; None without a margin.
        only_a, only_b: answers that only one got right, over all seeds; None for other values.
        seeds: number of seeds.
        n: number of questions.
    """

    task: str
    a: str
    b: str
    difference: Interval
    p: float
    p_holm: float
    non_inferior: bool | None
    only_a: int | None
    only_b: int | None
    seeds: int
    n: int


def score(scores: Sequence[Scores], *, seed: int = 0) -> Interval:
    """Mean of one variant; over questions for one seed, over questions and seeds for several."""
    rng = np.random.default_rng(seed)
    rows = [one.scaled for one in _aligned(scores)]
    first = scores[0]
    if len(rows) > 1:
        hits = first.weights is None and all(_are_hits(one) for one in rows)
        found = _two_way(np.stack(rows), first.groups, "shares" if hits else "numbers")[0]
        return _within(found, 0.0, 1.0) if hits else found
    if first.weights is None and _are_hits(first.values):
        return clustered_proportion(rows[0], rng=rng, groups=first.groups)
    return bootstrap_mean(rows[0], rng=rng, groups=first.groups)


def compare(
    a: Sequence[Scores],
    b: Sequence[Scores],
    *,
    rng: np.random.Generator,
    margin: float | None = None,
) -> Comparison:
    """Compare two variants, question by question.

    Args:
        a: one per seed.
        b: one per seed in the same order, or a single one that all of ``a`` are compared with.
        rng: for resampling.
        margin: a loss that would matter, in the unit of the values.

    Raises:
        ValueError: the questions are not the same, or the seeds cannot be paired.
    """
    first, second = _matched(a, b)
    groups = a[0].groups
    hits = a[0].weights is None and all(_are_hits(one.values) for one in (*first, *second))
    rows = np.stack([x.scaled - y.scaled for x, y in zip(first, second, strict=True)])
    wins, losses = (int((sign * rows > 0).sum()) for sign in (1, -1))
    if len(rows) > 1:
        difference, p = _two_way(rows, groups, "differences" if hits else "numbers")
        difference = _within(difference, -1.0, 1.0) if hits else difference
    else:
        pair = (first[0].scaled, second[0].scaled)
        difference = paired_difference(*pair, rng=rng, groups=groups)
        exact = hits and groups is None
        p = mcnemar(wins, losses) if exact else sign_flip_p(rows, rng=rng, groups=groups)[0]
    return Comparison(
        task=a[0].task,
        a=a[0].variant,
        b=b[0].variant,
        difference=difference,
        p=float(p),
        p_holm=math.nan,
        non_inferior=None if margin is None else non_inferior(difference, margin),
        only_a=wins if hits else None,
        only_b=losses if hits else None,
        seeds=len(rows),
        n=rows.shape[1],
    )


def family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p values corrected over all of them (Holm 1979)."""
    if not comparisons:
        return []
    adjusted = holm(np.array([one.p for one in comparisons]))
    return [replace(one, p_holm=float(p)) for one, p in zip(comparisons, adjusted, strict=True)]


def mean_over_tasks(pairs: Sequence[tuple[Sequence[Scores], Sequence[Scores]]]) -> Interval:
    """Difference of the plain means over tasks; tasks are fixed, their questions independent.

    Args:
        pairs: of each task the scores of both variants, as in `compare`; seeds in the same order.

    Raises:
        ValueError: there is no task, or the tasks have not the same number of seeds.
    """
    tables = []
    for a, b in pairs:
        first, second = _matched(a, b)
        rows = [x.scaled - y.scaled for x, y in zip(first, second, strict=True)]
        hits = all(x.weights is None and _are_hits(x.values) for x in (*first, *second))
        tables.append((np.stack(rows), a[0].groups, "differences" if hits else "numbers"))
    if len({len(rows) for rows, _, _ in tables}) != 1:
        raise ValueError("a mean over tasks needs at least one task and the same seeds for all")
    ours = [_question_variance(*table) for table in tables]
    means = np.mean([rows.mean(axis=1) for rows, _, _ in tables], axis=0)
    size = sum(rows.shape[1] for rows, _, _ in tables)
    question = sum(variance for variance, _ in ours) / len(ours) ** 2
    return _interval(means, question, sum(units for _, units in ours), size)[0]


def questions_needed(discordant: float, *, margin: float, power: float = 0.8) -> int:
    """Questions at which two equal variants are shown to be within the margin.

    For the lower end of a 95 % interval of paired rates, as in `circuitune.stats.non_inferior`.

    Args:
        discordant: share of questions that only one of the two gets right.
        margin: the loss that would matter, as a share.
        power: probability that it is shown.

    Raises:
        ValueError: a share is not between 0 and 1, or the margin is not above 0.
    """
    if not (0 <= discordant <= 1 and 0 < power < 1 and margin > 0):
        raise ValueError(
            "discordant and power must be shares and the margin above 0, found "
            f"{discordant}, {power} and {margin}"
        )
    reach = norm.ppf(0.975) + norm.ppf(power)
    return math.ceil(discordant * (reach / margin) ** 2)


def _aligned(scores: Sequence[Scores]) -> list[Scores]:
    """All in the order of the first one's questions."""
    if not scores:
        raise ValueError("a comparison needs scores, found none")
    ids = scores[0].ids
    found = []
    for one in scores:
        if set(one.ids) != set(ids) or one.task != scores[0].task:
            raise ValueError(
                f"scores must be of the same questions, {one.variant} of {one.task} has others"
            )
        place = {name: at for at, name in enumerate(one.ids)}
        order = [place[name] for name in ids]
        weights = None if one.weights is None else one.weights[order]
        groups = None if one.groups is None else tuple(one.groups[at] for at in order)
        found.append(
            replace(one, ids=ids, values=one.values[order], weights=weights, groups=groups)
        )
    return found


def _matched(a: Sequence[Scores], b: Sequence[Scores]) -> tuple[list[Scores], list[Scores]]:
    """Both in the same order of questions, and with the same number of seeds."""
    if len(b) not in (1, len(a)):
        raise ValueError(f"b must have one seed or those of a, found {len(b)} for {len(a)}")
    both = _aligned([*a, *b])
    return both[: len(a)], both[len(a) :] * (len(a) // len(b))


def _two_way(
    rows: Float[np.ndarray, "seed example"], groups: Sequence[Hashable] | None, kind: Kind
) -> tuple[Interval, float]:
    """Mean over questions and seeds, its interval, and the p value of a mean of zero."""
    variance, units = _question_variance(rows, groups, kind)
    return _interval(rows.mean(axis=1), variance, units, rows.shape[1])


def _question_variance(
    rows: Float[np.ndarray, "seed example"], groups: Sequence[Hashable] | None, kind: Kind
) -> tuple[float, int]:
    """Variance of the mean over questions, and how many independent units are behind it.

    The mean is a sum over groups; its variance is that of so many independent terms, and not less
    than `_least_variance`.
    """
    sums = _by_group(rows.mean(axis=0), groups)
    units = len(sums)
    if units < 2:
        return math.inf, units
    variance = units * float(sums.var(ddof=1)) / rows.shape[1] ** 2
    return max(variance, _least_variance(rows, units, kind)), units


def _least_variance(rows: Float[np.ndarray, "seed example"], units: int, kind: Kind) -> float:
    """The variance of a mean of hits with a few imagined ones added, however many seeds agree.

    Without it ten questions that all seeds answer alike would pass as certainty: Agresti and Coull
    (1998) for shares, Bonett and Price (2012) for their paired differences.
    """
    if kind == "numbers":
        return 0.0
    if kind == "shares":
        share = (rows.mean() * units + 2) / (units + 4)
        return float(share * (1 - share) / (units + 4))
    wins, losses = (((sign * rows > 0).mean() * units + 1) / (units + 2) for sign in (1, -1))
    return float((wins + losses - (wins - losses) ** 2) / (units + 2))


def _within(found: Interval, low: float, high: float) -> Interval:
    """The interval without values that the mean cannot have."""
    return replace(found, low=max(found.low, low), high=min(found.high, high))


def _interval(
    means: Float[np.ndarray, " seed"], question: float, units: int, n: int
) -> tuple[Interval, float]:
    """Student's interval of the mean over seeds, and the p value of zero.

    Args:
        means: of each seed.
        question: variance of their mean that comes from the questions.
        units: independent units behind it.
        n: number of questions.
    """
    seeds, centre = len(means), float(means.mean())
    training = float(means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = question + training
    if not variance:
        return Interval(centre, centre, centre, n), float(centre == 0)
    if math.isinf(variance):
        return Interval(centre, -math.inf, math.inf, n), 1.0
    spread = question**2 / (units - 1) + training**2 / max(1, seeds - 1)
    freedom = variance**2 / spread
    half = float(student.ppf(0.975, freedom)) * math.sqrt(variance)
    p = 2 * float(student.sf(abs(centre) / math.sqrt(variance), freedom))
    return Interval(centre, centre - half, centre + half, n), p


def _by_group(
    values: Float[np.ndarray, " example"], groups: Sequence[Hashable] | None
) -> Float[np.ndarray, " group"]:
    """Sums of deviations from the mean within groups, the mean's share added back."""
    if groups is None:
        return values
    places = {name: at for at, name in enumerate(dict.fromkeys(groups))}
    unit = np.array([places[name] for name in groups])
    deviations = np.bincount(unit, weights=values - values.mean(), minlength=len(places))
    return deviations + values.sum() / len(places)


def _are_hits(values: Float[np.ndarray, " example"]) -> bool:
    return bool(np.isin(values, (0, 1)).all())
