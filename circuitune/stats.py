"""Uncertainty of what circuitune reports: intervals, tests, corrections, stability of a ranking.

Arrays are ``row example``: a row is a component (or a condition), a column is one prompt pair.
Examples are the random sample. Prompts that share operands are not independent, so most functions
take ``groups``, one hashable label per example; examples with the same label are resampled,
flipped or split together. Below, a *unit* is a group, or an example where no groups are given.

Every function that draws random numbers takes a ``np.random.Generator``; the same generator state
gives the same answer. Arguments out of range raise ``ValueError``.
"""

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

Groups = Sequence[Hashable] | np.ndarray
Outcomes = Bool[np.ndarray, " example"] | Float[np.ndarray, " example"]

_EXACT_UNITS = 12  # up to 2**12 sign patterns are enumerated instead of sampled
_SIGN_BLOCK = 512  # sign patterns held at a time, so that memory does not grow with the draws


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The value in the full sample.
        low: Lower bound, ``-inf`` where the sample says nothing.
        high: Upper bound, ``inf`` where the sample says nothing.
        n: Number of examples behind the estimate, also where they came in groups.
        level: Intended coverage, between 0 and 1.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def excludes(self, value: float = 0.0) -> bool:
        """Whether ``value`` lies strictly outside the interval."""
        return value < self.low or value > self.high

    def __format__(self, spec: str) -> str:
        """Apply ``spec`` to all three numbers; without one, the same as ``str``."""
        if not spec:
            return str(self)
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        """Print as many decimals as show two digits of the width: ``12.3 [10.1, 14.5]``."""
        width = self.high - self.low
        if not 1e-5 < width < math.inf:
            return format(self, ".3g")
        return format(self, f".{max(0, 1 - math.floor(math.log10(width)))}f")


def resample_counts(
    n: int, *, draws: int, rng: np.random.Generator, groups: Groups | None = None
) -> Float[np.ndarray, "draw example"]:
    """Count how often each example occurs in each bootstrap draw.

    Each draw takes as many units as there are, with replacement. With ``groups`` this is the
    cluster bootstrap (Davison & Hinkley 1997, section 3.8): all examples of a group get the same
    count, and a draw need not hold ``n`` examples where the groups differ in size.
    """
    unit, units = _units(n, groups)
    return _draw_units(unit, size=units, draws=draws, rng=rng)


def bootstrap_means(
    values: Float[np.ndarray, "row example"],
    *,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> list[Interval]:
    """Percentile bootstrap interval of the mean of each row, in the unit of ``values``.

    All rows share the same resamples, so they stay paired. A single unit gives
    ``(-inf, inf)``: it shows no spread, and the zero width of its resamples would claim
    certainty. Below about 20 units the intervals are somewhat too narrow (10 normal units: 91 %
    where 95 % is asked). Rows of one constant give zero width; for rates use
    ``clustered_proportion``.

    Raises:
        ValueError: A value is not finite (the message names the row), or there are no examples.
    """
    values = _finite_rows(values)
    unit, units = _units(values.shape[1], groups)
    counts = _draw_units(unit, size=units, draws=draws, rng=rng)
    # Relative to the first example, a constant row is exactly zero, and so is its width.
    shift = values[:, :1]
    means = shift + _weighted_means(values - shift, counts)
    estimates = shift[:, 0] + (values - shift).mean(axis=1)
    low, high = np.quantile(means, _tails(level), axis=1)
    if units == 1:
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    table = np.stack([estimates, low, high], axis=1).tolist()
    return [Interval(*numbers, n=unit.size, level=level) for numbers in table]


def bootstrap_mean(
    values: Float[np.ndarray, " example"],
    *,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of one mean; see ``bootstrap_means``."""
    rows = np.asarray(values)[None]
    return bootstrap_means(rows, rng=rng, groups=groups, draws=draws, level=level)[0]


def proportion(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a rate from ``n`` independent trials (Wilson 1927).

    Unlike the bootstrap it keeps a sensible width at 0 % and at 100 %.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes must be between 0 and n > 0, found {successes} of {n}")
    rate = successes / n
    return Interval(rate, *_wilson(rate, float(n), level), n=n, level=level)


def clustered_proportion(
    hits: Outcomes,
    *,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Interval of a rate whose examples come in groups, honest at 0 % and 100 % too.

    The cluster bootstrap, never narrower than a Wilson interval and never outside ``[0, 1]``.
    Where the hit rate varies between groups, that is the Wilson interval of ``n`` independent
    examples, which guards the ends of the scale. Where it does not vary (all hits, all misses),
    the bootstrap has zero width and the sample cannot tell how alike the examples of a group are;
    then the worst case counts, one trial per group: the Wilson interval of the effective number
    of groups ``n**2 / sum(size**2)`` (Kish 1965). A single group gives ``[0, 1]``.

    Raises:
        ValueError: A value of ``hits`` is neither 0 (a miss) nor 1 (a hit).
    """
    if not _are_hits(hits):
        raise ValueError("hits must all be 0 or 1, found other values; use bootstrap_mean instead")
    rates = np.asarray(hits, dtype=float)
    interval = bootstrap_mean(rates, rng=rng, groups=groups, draws=draws, level=level)
    low, high = _wilson(interval.estimate, _trials_behind(interval, groups), level)
    return _widened(interval, low, high, least=0.0)


def paired_difference(
    a: Outcomes,
    b: Outcomes,
    *,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of ``mean(a - b)`` over the same examples; positive means ``a`` is higher.

    Where ``a`` and ``b`` are hits and misses (only 0 and 1), the interval is never narrower than
    the adjusted Wald interval of paired rates (Bonett & Price 2012), with the trials counted as
    in ``clustered_proportion``. Two runs that agree on ten examples thus do not pass as equal.

    Raises:
        ValueError: ``a`` and ``b`` differ in length, or a difference is not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must be paired, found shapes {a.shape} and {b.shape}")
    difference = a.astype(float) - b.astype(float)
    interval = bootstrap_mean(difference, rng=rng, groups=groups, draws=draws, level=level)
    if not (_are_hits(a) and _are_hits(b)):
        return interval
    trials = _trials_behind(interval, groups)
    wins, losses = (np.mean([difference > 0, difference < 0], axis=1) * trials + 1) / (trials + 2)
    centre = float(wins - losses)
    half = _normal_quantile(level) * math.sqrt((wins + losses - centre**2) / (trials + 2))
    return _widened(interval, centre - half, centre + half, least=-1.0)


def non_inferior(difference: Interval, margin: float) -> bool:
    """Whether new minus old (higher is better) is shown to lose less than ``margin``.

    Tests the lower bound against ``-margin``; an interval of level 0.95 gives a one-sided test
    at 2.5 %.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, found {margin}")
    return difference.low > -margin


def sign_flip_p(
    values: Float[np.ndarray, "row example"],
    *,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 5000,
) -> Float[np.ndarray, " row"]:
    """Two-sided permutation p-value of mean zero for each row, by random sign flips.

    Valid where the units are symmetric around zero under the null hypothesis. Whole groups flip
    together. Up to 12 units, all sign patterns are enumerated and the p-value is exact; beyond,
    it is ``(1 + extreme) / (1 + draws)``, never zero (Phipson & Smyth 2010). Its least value is
    about ``1 / draws``: to survive ``holm`` over ``m`` rows, ask for many times ``m`` draws.
    """
    values = _finite_rows(values)
    _require_positive("draws", draws)
    unit, units = _units(values.shape[1], groups)
    by_unit = np.argsort(unit, kind="stable")
    first = np.searchsorted(unit[by_unit], np.arange(units))
    sums = np.add.reduceat(values[:, by_unit], first, axis=1)  # row unit
    # Rounding must not break ties: the observed pattern itself has to count as extreme.
    threshold = np.abs(sums.sum(axis=1)) - 1e-12 * np.abs(sums).sum(axis=1)
    extreme = np.zeros(len(sums))
    for signs in _sign_patterns(units, draws=draws, rng=rng):
        extreme += (np.abs(sums @ signs.T) >= threshold[:, None]).sum(axis=1)
    if units <= _EXACT_UNITS:
        return extreme / 2**units
    return (1 + extreme) / (1 + draws)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test that two paired rates are equal (McNemar 1947).

    Args:
        only_a: Examples that only ``a`` got right.
        only_b: Examples that only ``b`` got right.

    Returns:
        The binomial p-value, 1.0 without discordant examples. The sum is over whole numbers, so
        only the last division rounds, however large the counts.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts must be 0 or more, found {only_a} and {only_b}")
    n = only_a + only_b
    term = tail = 1  # binomial coefficient (n, i), and the sum of those up to i
    for i in range(min(only_a, only_b)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Adjust p-values for the family-wise error rate (Holm 1979); the order is kept."""
    p, order = _checked_p(p), np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    return np.minimum(adjusted, 1.0)


def benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Adjust p-values for the false discovery rate (Benjamini & Hochberg 1995); order is kept."""
    p, order = _checked_p(p), np.argsort(p)[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(p[order] * (p.size / np.arange(p.size, 0, -1)))
    return np.minimum(adjusted, 1.0)


def jaccard(a: Collection[Hashable], b: Collection[Hashable]) -> float:
    """Share of common members among all members, 0 to 1; two empty sets agree fully."""
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left or right else 1.0


def bootstrap_jaccard(
    values: Float[np.ndarray, "row example"],
    *,
    k: int,
    rng: np.random.Generator,
    groups: Groups | None = None,
    draws: int = 200,
    level: float = 0.95,
) -> Interval:
    """How stable the set of the ``k`` rows with the most negative means is.

    The estimate is the mean Jaccard between the set of each bootstrap draw and the set of the full
    sample; the bounds are percentiles over draws. Ties go to the row that comes first.

    Raises:
        ValueError: ``k`` is not between 1 and the number of rows, or there is only one unit.
    """
    values, unit, units = _rankable(values, k, groups)
    full = _most_negative(values, np.ones((1, unit.size)), k=k)
    drawn = _most_negative(values, _draw_units(unit, size=units, draws=draws, rng=rng), k=k)
    return _summary(_agreement(full, drawn), unit.size, level)


def split_half_agreement(
    values: Float[np.ndarray, "row example"],
    *,
    k: int,
    rng: np.random.Generator,
    groups: Groups | None = None,
    splits: int = 100,
    level: float = 0.95,
) -> Interval:
    """Jaccard of the ``k`` most negative rows between two disjoint random halves of the units.

    The estimate is the mean over splits, the bounds are percentiles. With an odd number of units
    one is left out. It tells about samples of half the size, without the optimism of comparing a
    sample with its own resamples. Errors as in ``bootstrap_jaccard``.
    """
    values, unit, units = _rankable(values, k, groups)
    _require_positive("splits", splits)
    place = rng.permuted(np.tile(np.arange(units), (splits, 1)), axis=1)
    half = (place // (units // 2))[:, unit]  # 0, 1, or 2 for the unit left out
    first, second = (_most_negative(values, (half == i).astype(float), k=k) for i in (0, 1))
    return _summary(_agreement(first, second), unit.size, level)


def advise_sample_size(
    values: Float[np.ndarray, "row example"],
    *,
    k: int,
    rng: np.random.Generator,
    target: float = 0.8,
    groups: Groups | None = None,
) -> int | None:
    """Number of examples at which the ``bootstrap_jaccard`` is expected to reach ``target``.

    Draws ``m`` units out of those measured, with replacement and with ``m`` above their number
    allowed; doubles ``m`` until the mean Jaccard reaches the target, then bisects to 5 %. Groups
    are taken to keep their mean size.

    Read it as a lower bound: the sample stands in for the population, and chance separates its
    row means more than they truly are. Measure that many examples, then ask again.

    Returns:
        The number of examples, or None if 64 times the measured sample would not do.

    Raises:
        ValueError: As in ``bootstrap_jaccard``, or ``target`` is not above 0 and at most 1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be above 0 and at most 1, found {target}")
    values, unit, units = _rankable(values, k, groups)
    full = _most_negative(values, np.ones((1, unit.size)), k=k)

    def reaches(size: int) -> bool:
        drawn = _most_negative(values, _draw_units(unit, size=size, draws=200, rng=rng), k=k)
        return bool(_agreement(full, drawn).mean() >= target)

    too_few, enough, most = 0, 1, 64 * units
    while not reaches(enough):
        if enough == most:
            return None
        too_few, enough = enough, min(2 * enough, most)
    while enough - too_few > max(1, enough // 20):
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if reaches(middle) else (middle, enough)
    return math.ceil(enough * unit.size / units)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, found {value}")


def _finite_rows(values: Float[np.ndarray, "row example"]) -> Float[np.ndarray, "row example"]:
    """Copy to double precision, refusing what would spoil a mean silently."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values must be rows with 1 or more examples, found {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise ValueError(f"values must be finite, found others in row {bad[0]} ({bad.size} rows)")
    return values


def _units(n: int, groups: Groups | None) -> tuple[Int[np.ndarray, " example"], int]:
    """Return the unit of each example, numbered in order of appearance, and how many there are."""
    _require_positive("the number of examples", n)
    if groups is None:
        return np.arange(n), n
    if len(groups) != n:
        raise ValueError(f"groups must label each of {n} examples, found {len(groups)} labels")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups]), len(number)


def _draw_units(
    unit: Int[np.ndarray, " example"], *, size: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw example"]:
    """Draw ``size`` units with replacement; count each example as often as its unit."""
    _require_positive("draws", draws)
    units = unit.max() + 1
    counts = rng.multinomial(size, np.full(units, 1 / units), size=draws)
    return counts.astype(float)[:, unit]


def _weighted_means(
    values: Float[np.ndarray, "row example"], weights: Float[np.ndarray, "draw example"]
) -> Float[np.ndarray, "row draw"]:
    # Divided by the examples drawn, not by n: groups differ in size.
    return values @ weights.T / weights.sum(axis=1)


def _tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, found {level}")
    return (1 - level) / 2, (1 + level) / 2


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf(_tails(level)[1])


def _wilson(rate: float, trials: float, level: float) -> tuple[float, float]:
    z2 = _normal_quantile(level) ** 2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    variance = rate * (1 - rate) / trials + z2 / (4 * trials**2)
    half = math.sqrt(z2 * variance) / (1 + z2 / trials)
    # At the ends one bound is exact; rounding would move it.
    return (centre - half if rate > 0 else 0.0), (centre + half if rate < 1 else 1.0)


def _trials_behind(interval: Interval, groups: Groups | None) -> float:
    """Independent trials behind a bootstrapped rate; see ``clustered_proportion``."""
    if interval.low < interval.high:
        return float(interval.n)
    sizes = np.bincount(_units(interval.n, groups)[0])
    return float(interval.n**2 / (sizes**2).sum())


def _widened(interval: Interval, low: float, high: float, *, least: float) -> Interval:
    """Reach at least from ``low`` to ``high``, within what is possible: ``least`` to 1."""
    low, high = max(least, min(low, interval.low)), min(1.0, max(high, interval.high))
    return replace(interval, low=low, high=high)


def _are_hits(values: Outcomes) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _sign_patterns(
    units: int, *, draws: int, rng: np.random.Generator
) -> Iterator[Float[np.ndarray, "draw unit"]]:
    """Yield blocks of sign patterns: all that exist if they are few, else ``draws`` random ones."""
    if units <= _EXACT_UNITS:
        bits = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
        yield 1.0 - 2.0 * bits
        return
    for start in range(0, draws, _SIGN_BLOCK):
        yield rng.choice((-1.0, 1.0), size=(min(_SIGN_BLOCK, draws - start), units))


def _checked_p(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    p = np.asarray(p, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must all be between 0 and 1, found others")
    return p


def _rankable(
    values: Float[np.ndarray, "row example"], k: int, groups: Groups | None
) -> tuple[Float[np.ndarray, "row example"], Int[np.ndarray, " example"], int]:
    """Check what a ranking needs; return the rows, and the units as ``_units`` does."""
    values = _finite_rows(values)
    if not 1 <= k <= len(values):
        raise ValueError(f"k must be between 1 and the number of rows {len(values)}, found {k}")
    unit, units = _units(values.shape[1], groups)
    if units == 1:
        raise ValueError("stability needs two examples or groups, found one; measure more")
    return values, unit, units


def _most_negative(
    values: Float[np.ndarray, "row example"], weights: Float[np.ndarray, "draw example"], *, k: int
) -> Bool[np.ndarray, "row draw"]:
    """Mark the ``k`` rows with the most negative weighted mean in each draw."""
    means = _weighted_means(values, weights)
    chosen = np.zeros(means.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(means, axis=0, kind="stable")[:k], True, axis=0)
    return chosen


def _agreement(
    a: Bool[np.ndarray, " row #draw"], b: Bool[np.ndarray, " row #draw"]
) -> Float[np.ndarray, " draw"]:
    """Jaccard of two sets of rows, draw by draw."""
    return (a & b).sum(axis=0) / (a | b).sum(axis=0)


def _summary(sample: Float[np.ndarray, " draw"], n: int, level: float) -> Interval:
    low, high = np.quantile(sample, _tails(level)).tolist()
    return Interval(float(sample.mean()), low, high, n=n, level=level)
