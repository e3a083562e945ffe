"""Statistics: equality with scipy, coverage on simulated data, uniform p-values, symmetries."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from circuitune import stats
from circuitune.stats import Interval

finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
matrices = arrays(float, st.tuples(st.integers(1, 5), st.integers(2, 12)), elements=finite)
p_values = arrays(float, st.integers(1, 30), elements=st.floats(0, 1))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([not interval.excludes(truth) for interval in intervals]))


def bounds(intervals: list[Interval]) -> np.ndarray:
    return np.array([(i.estimate, i.low, i.high) for i in intervals])


def clustered(rng: np.random.Generator, rows: int, clusters: int, size: int) -> np.ndarray:
    """Draw rows of mean zero in which examples of a cluster correlate with 0.5."""
    shared = np.repeat(rng.normal(size=(rows, clusters)), size, axis=1)
    return shared + rng.normal(size=shared.shape)


# ---- Interval


def test_interval_excludes_only_values_strictly_outside():
    interval = Interval(2.0, 1.0, 3.0, n=5)
    assert interval.excludes()
    assert interval.excludes(3.5)
    assert not interval.excludes(1.0)
    assert not interval.excludes(3.0)
    assert not Interval(2.0, -math.inf, math.inf, n=1).excludes(1e300)


def test_interval_format_applies_the_spec_to_all_three_numbers():
    interval = Interval(12.345, 10.1234, 14.5678, n=9)
    assert f"{interval:.1f}" == "12.3 [10.1, 14.6]"
    assert f"{Interval(0.5, 0.25, 0.75, n=4):.0%}" == "50% [25%, 75%]"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((12.345, 10.1234, 14.5678), "12.3 [10.1, 14.6]"),
        ((1234.5, 1200.2, 1260.9), "1234 [1200, 1261]"),
        ((-0.00321, -0.00355, -0.00288), "-0.00321 [-0.00355, -0.00288]"),
        ((0.5, 0.5, 0.5), "0.5 [0.5, 0.5]"),
        ((0.5, -math.inf, math.inf), "0.5 [-inf, inf]"),
    ],
)
def test_interval_prints_two_digits_of_its_width(numbers: tuple[float, float, float], text: str):
    interval = Interval(*numbers, n=3)
    assert str(interval) == text
    assert f"{interval}" == text


# ---- Resampling and means


def test_resample_counts_draw_n_examples_each_equally_often():
    counts = stats.resample_counts(20, draws=4000, rng=generator())
    assert counts.shape == (4000, 20)
    np.testing.assert_array_equal(counts.sum(axis=1), 20)
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.06)  # standard error 0.016
    np.testing.assert_allclose(counts.var(axis=0), 0.95, atol=0.1)


def test_resample_counts_keep_groups_whole():
    groups = ["a", ("b", 1), "a", 3, ("b", 1), "a"]  # any hashable, in any order
    counts = stats.resample_counts(6, draws=500, rng=generator(), groups=groups)
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_array_equal(counts[:, 0], counts[:, 5])
    np.testing.assert_array_equal(counts[:, 1], counts[:, 4])
    np.testing.assert_array_equal(counts[:, [0, 1, 3]].sum(axis=1), 3)  # three groups a draw


def test_groups_of_one_example_change_nothing():
    plain = stats.resample_counts(9, draws=50, rng=generator(4))
    grouped = stats.resample_counts(9, draws=50, rng=generator(4), groups=list("ihgfedcba"))
    np.testing.assert_array_equal(plain, grouped)


def test_bootstrap_means_equal_a_loop_over_resamples():
    values = generator(1).normal(size=(3, 15))
    groups = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    counts = stats.resample_counts(15, draws=300, rng=generator(2), groups=groups)
    intervals = stats.bootstrap_means(values, rng=generator(2), groups=groups, draws=300, level=0.9)
    for row, interval in zip(values, intervals, strict=True):
        means = [np.repeat(row, draw.astype(int)).mean() for draw in counts]
        assert interval.estimate == pytest.approx(row.mean())
        assert (interval.low, interval.high) == pytest.approx(
            tuple(np.quantile(means, [0.05, 0.95]))
        )
        assert (interval.n, interval.level) == (15, 0.9)


def test_bootstrap_mean_agrees_with_scipy():
    values = generator(3).exponential(size=80)
    ours = stats.bootstrap_mean(values, rng=generator(0), draws=20_000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=generator(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_same_generator_state_same_interval():
    values = generator(1).normal(size=30)
    first, second = (stats.bootstrap_mean(values, rng=generator(7)) for _ in range(2))
    assert first == second


def test_bootstrap_interval_covers_about_nominally():
    values = generator(10).normal(loc=2.0, size=(2000, 50))
    for level in (0.8, 0.95):
        intervals = stats.bootstrap_means(values, rng=generator(11), draws=1000, level=level)
        assert coverage(intervals, 2.0) == pytest.approx(level, abs=0.025)


def test_clustered_bootstrap_covers_where_the_naive_one_fails():
    values = clustered(generator(12), rows=2000, clusters=40, size=6)
    groups = np.repeat(np.arange(40), 6)
    naive = stats.bootstrap_means(values, rng=generator(13), draws=1000)
    honest = stats.bootstrap_means(values, rng=generator(13), draws=1000, groups=groups)
    assert coverage(naive, 0.0) < 0.75
    assert coverage(honest, 0.0) == pytest.approx(0.95, abs=0.025)


def test_clustered_bootstrap_covers_with_groups_of_unequal_size():
    rng = generator(14)
    groups = np.repeat(np.arange(40), np.tile([1, 2, 4, 9], 10))
    values = rng.normal(size=(1000, 40))[:, groups] + rng.normal(size=(1000, groups.size))
    intervals = stats.bootstrap_means(values, rng=rng, draws=1000, groups=groups)
    assert coverage(intervals, 0.0) == pytest.approx(0.94, abs=0.03)


def test_a_single_unit_gives_an_unbounded_interval():
    one_example = stats.bootstrap_mean(np.array([3.0]), rng=generator())
    one_group = stats.bootstrap_mean(np.arange(4.0), rng=generator(), groups=["a"] * 4)
    assert one_example == Interval(3.0, -math.inf, math.inf, n=1)
    assert one_group == Interval(1.5, -math.inf, math.inf, n=4)


def test_a_constant_row_gives_exactly_zero_width():
    interval = stats.bootstrap_mean(np.full(7, 0.1), rng=generator(), groups=list("aabbbcc"))
    assert interval == Interval(0.1, 0.1, 0.1, n=7)


@settings(max_examples=50)
@given(values=matrices, seed=st.integers(0, 99))
def test_permuted_rows_permute_intervals(values: np.ndarray, seed: int):
    order = generator(seed).permutation(len(values))
    straight = bounds(stats.bootstrap_means(values, rng=generator(seed), draws=50))
    permuted = bounds(stats.bootstrap_means(values[order], rng=generator(seed), draws=50))
    np.testing.assert_allclose(permuted, straight[order], rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(values=matrices, shift=finite, scale=st.floats(0.01, 100))
def test_intervals_follow_shift_scale_and_sign(values: np.ndarray, shift: float, scale: float):
    def measure(rows: np.ndarray) -> np.ndarray:
        return bounds(stats.bootstrap_means(rows, rng=generator(5), draws=50))

    straight = measure(values)
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    np.testing.assert_allclose(
        measure(values * scale + shift), straight * scale + shift, **tolerance
    )
    np.testing.assert_allclose(measure(-values), -straight[:, [0, 2, 1]], **tolerance)


# ---- Rates


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (0, 30), (1, 7), (50, 100), (997, 1000), (8, 8)]
)
def test_proportion_equals_scipy_wilson(successes: int, n: int, level: float):
    ours = stats.proportion(successes, n, level=level)
    theirs = scipy_stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert ours.estimate == successes / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12, abs=1e-15)


@settings(max_examples=30)
@given(n=st.integers(2, 60), hit=st.booleans())
def test_clustered_proportion_without_variation_is_the_wilson_interval(n: int, hit: bool):
    interval = stats.clustered_proportion(np.full(n, hit), rng=generator(), draws=20)
    assert interval == stats.proportion(n * hit, n)


def test_clustered_proportion_without_variation_counts_groups_not_examples():
    hits = np.ones(60, dtype=bool)
    even = stats.clustered_proportion(hits, rng=generator(), groups=np.repeat(np.arange(12), 5))
    assert (even.low, even.high) == pytest.approx((stats.proportion(12, 12).low, 1.0))
    assert even.n == 60
    # Kish: 60**2 / (40**2 + 20 * 1**2) = 2.22 groups, far fewer than the 21 there are.
    uneven = stats.clustered_proportion(hits, rng=generator(), groups=[0] * 40 + list(range(1, 21)))
    effective, z2 = 3600 / 1620, 1.959964**2
    assert uneven.low == pytest.approx(effective / (effective + z2), rel=1e-6)


def test_clustered_proportion_of_equal_groups_is_as_wide_as_wilson():
    hits = np.tile([0.0, 1.0], 10)  # every group holds one hit and one miss
    interval = stats.clustered_proportion(hits, rng=generator(), groups=np.repeat(np.arange(10), 2))
    assert interval == Interval(
        0.5, stats.proportion(5, 10).low, stats.proportion(5, 10).high, n=20
    )


def test_clustered_proportion_of_one_group_knows_nothing():
    interval = stats.clustered_proportion(np.ones(5), rng=generator(), groups=[1] * 5)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_one_miss_does_not_narrow_the_interval():
    hits = np.ones(100)
    perfect = stats.clustered_proportion(hits, rng=generator())
    hits[0] = 0
    assert stats.clustered_proportion(hits, rng=generator()).low < perfect.low


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_clustered_proportion_covers_where_wilson_fails(rate: float):
    rng = generator(20)
    groups = np.repeat(np.arange(40), 5)
    honest, naive = [], []
    for _ in range(300):
        chance = rng.beta(rate, 1 - rate, size=40)  # hits of a group correlate with 0.5
        hits = rng.random(200) < chance[groups]
        honest.append(stats.clustered_proportion(hits, rng=rng, groups=groups, draws=300))
        naive.append(stats.proportion(int(hits.sum()), 200))
    assert coverage(naive, rate) < 0.86
    assert coverage(honest, rate) > 0.90


# ---- Differences


def test_paired_difference_is_the_mean_of_differences():
    a, b = generator(1).normal(size=(2, 25))
    ours = stats.paired_difference(a, b, rng=generator(2))
    assert ours == stats.bootstrap_mean(a - b, rng=generator(2))
    flipped = stats.paired_difference(b, a, rng=generator(2))
    assert (flipped.low, flipped.high) == pytest.approx((-ours.high, -ours.low))


def test_paired_difference_removes_what_the_pairs_share():
    shared = generator(3).normal(scale=100, size=200)
    noise = generator(4).normal(size=(2, 200))
    interval = stats.paired_difference(shared + noise[0] + 1, shared + noise[1], rng=generator(5))
    assert not interval.excludes(1.0)
    assert interval.high - interval.low < 1.0


def test_agreement_on_few_examples_is_not_equality():
    hits = np.array([True] * 8 + [False] * 2)
    interval = stats.paired_difference(hits, hits, rng=generator())
    half = 1.959964 * math.sqrt(2 / 12 / 12)  # Bonett & Price with no discordant pair
    assert (interval.low, interval.high) == pytest.approx((-half, half), rel=1e-6)
    assert not stats.non_inferior(interval, margin=0.05)
    many = np.ones(500)
    assert stats.non_inferior(stats.paired_difference(many, many, rng=generator()), margin=0.05)
    pairs = np.repeat(np.arange(5), 2)
    wider = stats.paired_difference(hits, hits, rng=generator(), groups=pairs)
    assert wider.high == pytest.approx(1.959964 * math.sqrt(2 / 7 / 7), rel=1e-6)


def test_paired_difference_of_rates_stays_in_range():
    interval = stats.paired_difference(np.ones(10), np.zeros(10), rng=generator())
    assert (interval.estimate, interval.high) == (1.0, 1.0)
    assert 0.0 < interval.low < 1.0


def test_paired_difference_covers_with_rare_disagreement():
    rng = generator(21)
    intervals = []
    for _ in range(400):
        kind = rng.choice(3, p=[0.96, 0.03, 0.01], size=100)  # agree, only a, only b
        intervals.append(stats.paired_difference(kind == 1, kind == 2, rng=rng, draws=300))
    assert coverage(intervals, 0.02) > 0.93


@pytest.mark.parametrize(
    ("low", "shown"), [(-0.01, True), (-0.02, False), (-0.03, False), (0.1, True)]
)
def test_non_inferior_wants_the_bound_above_minus_margin(low: float, shown: bool):
    assert stats.non_inferior(Interval(0.0, low, 0.2, n=9), margin=0.02) is shown


# ---- P-values


def test_sign_flip_p_by_hand():
    values = np.array([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-5.0, -5.0, -5.0]])
    # Two of eight patterns reach |6|; the others are always or never exceeded.
    np.testing.assert_array_equal(stats.sign_flip_p(values, rng=generator()), [0.25, 1, 1, 0.25])


def test_sign_flip_p_flips_whole_groups():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    grouped = stats.sign_flip_p(values, rng=generator(), groups=["a", "b", "a", "b"])
    np.testing.assert_array_equal(grouped, [0.5])  # two units: 2 of 4 patterns
    one_group = stats.sign_flip_p(values, rng=generator(), groups=["a"] * 4)
    np.testing.assert_array_equal(one_group, [1.0])


@pytest.mark.parametrize(("n", "tolerance"), [(10, 1e-12), (20, 0.02)])
def test_sign_flip_p_agrees_with_scipy(n: int, tolerance: float):
    values = generator(6).normal(loc=0.4, size=n)
    theirs = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9999, rng=generator(1)
    ).pvalue
    ours = stats.sign_flip_p(values[None], rng=generator(2), draws=9999)
    np.testing.assert_allclose(ours, [theirs], atol=tolerance)


def test_sign_flip_p_lies_between_one_draw_and_one():
    extremes = np.array([np.ones(40), np.zeros(40)])
    p = stats.sign_flip_p(extremes, rng=generator(), draws=999)
    np.testing.assert_array_equal(p, [1 / 1000, 1.0])


def test_sign_flip_p_ignores_scale_and_sign():
    values = generator(8).normal(size=(6, 25))
    p, scaled = (stats.sign_flip_p(v, rng=generator(1)) for v in (values, -1e-9 * values))
    np.testing.assert_array_equal(p, scaled)


@pytest.mark.parametrize("n", [8, 20])
def test_sign_flip_p_counts_ties_despite_rounding(n: int):
    integers = generator(9).integers(-5, 6, size=(50, n)).astype(float)  # sums tie often
    whole, tenths = (stats.sign_flip_p(v, rng=generator(1)) for v in (integers, integers / 10))
    np.testing.assert_array_equal(whole, tenths)


def test_sign_flip_p_is_uniform_under_the_null():
    values = generator(30).standard_t(df=3, size=(1500, 30))  # symmetric, heavy tails
    p = stats.sign_flip_p(values, rng=generator(31), draws=2000)
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_grouped_sign_flip_p_is_uniform_where_the_naive_one_is_not():
    values = clustered(generator(32), rows=1500, clusters=25, size=4)
    groups = np.repeat(np.arange(25), 4)
    honest = stats.sign_flip_p(values, rng=generator(33), draws=2000, groups=groups)
    naive = stats.sign_flip_p(values, rng=generator(33), draws=2000)
    assert scipy_stats.kstest(honest, "uniform").pvalue > 0.01
    assert np.mean(naive < 0.05) > 0.15


@pytest.mark.parametrize(
    ("only_a", "only_b"),
    [(0, 0), (1, 0), (3, 3), (5, 1), (2, 19), (40, 61), (2400, 2600), (0, 3000)],
)
def test_mcnemar_equals_scipy(only_a: int, only_b: int):
    n = only_a + only_b
    theirs = scipy_stats.binomtest(only_a, n).pvalue if n else 1.0
    assert stats.mcnemar(only_a, only_b) == pytest.approx(theirs, rel=1e-9)
    assert stats.mcnemar(only_b, only_a) == stats.mcnemar(only_a, only_b)


def test_holm_by_hand():
    p = np.array([0.04, 0.01, 0.03, 0.5])
    # 0.01 * 4, 0.03 * 3, max(0.09, 0.04 * 2), 0.5 * 1
    np.testing.assert_allclose(stats.holm(p), [0.09, 0.04, 0.09, 0.5])
    np.testing.assert_allclose(stats.holm(np.array([0.6, 0.7])), [1.0, 1.0])


@settings(max_examples=100)
@given(p=p_values)
def test_benjamini_hochberg_equals_scipy(p: np.ndarray):
    theirs = scipy_stats.false_discovery_control(p, method="bh")
    np.testing.assert_allclose(stats.benjamini_hochberg(p), theirs, rtol=1e-12)


@settings(max_examples=100)
@given(p=p_values, seed=st.integers(0, 99))
def test_corrections_keep_order_and_never_lower_p(p: np.ndarray, seed: int):
    holm, bh = stats.holm(p), stats.benjamini_hochberg(p)
    assert (p <= bh).all()
    assert (bh <= holm * (1 + 1e-12)).all()
    assert (holm <= 1).all()
    order = generator(seed).permutation(p.size)
    for adjust, adjusted in ((stats.holm, holm), (stats.benjamini_hochberg, bh)):
        assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
        np.testing.assert_array_equal(adjust(p[order]), adjusted[order])


# ---- Errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_row(bad: float):
    values = np.zeros((4, 3))
    values[2, 1] = bad
    with pytest.raises(ValueError, match="row 2"):
        stats.bootstrap_means(values, rng=generator())
    with pytest.raises(ValueError, match="row 2"):
        stats.sign_flip_p(values, rng=generator())


ROWS = np.arange(12.0).reshape(3, 4)
BAD_CALLS: dict[str, Callable[[], object]] = {
    "1 or more examples": lambda: stats.bootstrap_means(np.zeros((2, 0)), rng=generator()),
    "level must be": lambda: stats.bootstrap_means(ROWS, rng=generator(), level=95.0),
    "draws must be 1": lambda: stats.bootstrap_means(ROWS, rng=generator(), draws=0),
    "found 3 labels": lambda: stats.bootstrap_means(ROWS, rng=generator(), groups=["a"] * 3),
    "number of examples": lambda: stats.resample_counts(0, draws=5, rng=generator()),
    "found 5 of 4": lambda: stats.proportion(5, 4),
    "found 0 of 0": lambda: stats.proportion(0, 0),
    "0 or 1": lambda: stats.clustered_proportion(np.array([0.0, 0.5]), rng=generator()),
    "draws must": lambda: stats.sign_flip_p(ROWS, rng=generator(), draws=0),
    "counts must be": lambda: stats.mcnemar(-1, 3),
    "p-values must": lambda: stats.holm(np.array([0.1, np.nan])),
    "between 0 and 1": lambda: stats.benjamini_hochberg(np.array([1.1])),
    "margin must be": lambda: stats.non_inferior(Interval(0.0, 0.0, 0.0, n=2), 0.0),
    "number of rows 3, found 4": lambda: stats.bootstrap_jaccard(ROWS, k=4, rng=generator()),
    "k must be between 1": lambda: stats.split_half_agreement(ROWS, k=0, rng=generator()),
    "splits must": lambda: stats.split_half_agreement(ROWS, k=1, rng=generator(), splits=0),
    "two examples": lambda: stats.bootstrap_jaccard(ROWS[:, :1], k=1, rng=generator()),
    "target must": lambda: stats.advise_sample_size(ROWS, k=1, rng=generator(), target=0.0),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_arguments_out_of_range_are_refused(message: str):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_unpaired_arrays_are_refused():
    # Where shapes are checked at run time, the annotation refuses first, with a TypeError.
    with pytest.raises((ValueError, TypeError)):
        stats.paired_difference(np.zeros(3), np.zeros(4), rng=generator())
