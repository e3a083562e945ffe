"""Stability of the selected rows: equality with loops over sets, planted rankings, pure noise."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from circuitune import stats
from circuitune.stats import Interval


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def planted(rng: np.random.Generator, n: int, gap: float = 0.15) -> np.ndarray:
    """Draw 20 rows of noise whose true means rise by ``gap``, the most negative first."""
    return rng.normal(size=(20, n)) + gap * np.arange(20)[:, None]


def test_jaccard_by_hand():
    assert stats.jaccard({1, 2, 3}, [2, 3, 4]) == 0.5
    assert stats.jaccard(["a"], ["b"]) == 0.0
    assert stats.jaccard([], set()) == 1.0
    assert stats.jaccard([], [1]) == 0.0
    assert stats.jaccard([1, 1, 2], [2, 1]) == 1.0


def test_bootstrap_jaccard_equals_a_loop_over_sets():
    values = planted(generator(1), n=30)
    groups = np.repeat(np.arange(10), 3)

    def top(weights: np.ndarray) -> set[int]:
        return set(np.argsort((values * weights).sum(axis=1) / weights.sum())[:4].tolist())

    counts = stats.resample_counts(30, draws=100, rng=generator(2), groups=groups)
    slow = [stats.jaccard(top(draw), top(np.ones(30))) for draw in counts]
    fast = stats.bootstrap_jaccard(values, k=4, rng=generator(2), groups=groups, draws=100)
    assert fast.estimate == pytest.approx(np.mean(slow))
    assert (fast.low, fast.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


@pytest.mark.parametrize("n", [3, 4, 5])  # odd: one example stays out
def test_split_half_agreement_equals_a_loop_over_all_splits(n: int):
    values = generator(6).normal(size=(8, n))

    def top(columns: tuple[int, ...]) -> set[int]:
        return set(np.argsort(values[:, columns].mean(axis=1))[:3].tolist())

    half = n // 2
    slow = [
        stats.jaccard(top(order[:half]), top(order[half : 2 * half]))
        for order in itertools.permutations(range(n))
    ]
    fast = stats.split_half_agreement(values, k=3, rng=generator(), splits=10_000)
    assert fast.estimate == pytest.approx(np.mean(slow), abs=0.01)


def test_split_half_agreement_keeps_groups_apart():
    rng = generator(6)
    # All true means are equal: halves that mix groups agree only on the noise they share.
    groups = np.repeat(np.arange(8), 10)
    values = rng.normal(size=(30, 8))[:, groups] + rng.normal(size=(30, 80))
    mixed = stats.split_half_agreement(values, k=5, rng=rng, splits=200)
    apart = stats.split_half_agreement(values, k=5, rng=rng, splits=200, groups=groups)
    assert mixed.estimate > 0.4
    assert apart.estimate < 0.2


@pytest.mark.parametrize("measure", [stats.bootstrap_jaccard, stats.split_half_agreement])
def test_stability_is_full_for_clear_rows_and_low_for_noise(measure: Callable[..., Interval]):
    clear = measure(planted(generator(1), n=51, gap=5.0), k=4, rng=generator())
    assert clear == Interval(1.0, 1.0, 1.0, n=51)
    noise = measure(generator(2).normal(size=(100, 51)), k=4, rng=generator())
    assert noise.estimate < 0.5
    assert 0.0 <= noise.low <= noise.estimate <= noise.high


def test_stability_is_about_the_most_negative_rows():
    values = generator(3).normal(size=(20, 40))
    values[[4, 9]] -= 10  # the only clear rows; mirrored, they are the last to be chosen
    assert stats.bootstrap_jaccard(values, k=2, rng=generator()).low == 1.0
    assert stats.bootstrap_jaccard(-values, k=2, rng=generator()).low < 1.0


def test_advised_sample_size_reaches_the_target_in_the_measured_population():
    values = planted(generator(1), n=60)
    advised = stats.advise_sample_size(values, k=4, rng=generator(2), target=0.8)
    assert advised == stats.advise_sample_size(values, k=4, rng=generator(2), target=0.8)
    full = set(np.argsort(values.mean(axis=1))[:4].tolist())

    def reached(m: int) -> float:
        samples = [values[:, generator(i).integers(60, size=m)] for i in range(400)]
        tops = [np.argsort(sample.mean(axis=1))[:4].tolist() for sample in samples]
        return float(np.mean([stats.jaccard(top, full) for top in tops]))

    assert reached(advised) == pytest.approx(0.8, abs=0.05)
    assert reached(advised // 4) < 0.75


def test_advised_sample_size_grows_with_target_and_needs_no_more_for_clear_rows():
    values = planted(generator(1), n=60)
    low, high = (
        stats.advise_sample_size(values, k=4, rng=generator(2), target=target)
        for target in (0.5, 0.9)
    )
    assert low < high
    clear = planted(generator(1), n=60, gap=10.0)
    assert stats.advise_sample_size(clear, k=4, rng=generator(2)) == 1


def test_advised_sample_size_may_exceed_the_sample_or_be_out_of_reach():
    values = planted(generator(1), n=20, gap=0.02)
    advised = stats.advise_sample_size(values, k=4, rng=generator(2), target=0.85)
    assert 20 < advised <= 64 * 20
    twins = np.zeros((2, 40))
    twins[0], twins[1] = np.tile([1, -1], 20), np.tile([-1, 1], 20)  # equal means: a coin decides
    assert stats.advise_sample_size(twins, k=1, rng=generator(3), target=0.9) is None


def test_advised_sample_size_counts_the_examples_of_groups():
    few = planted(generator(7), n=30)
    repeated = np.repeat(few, 5, axis=1)  # five copies of each example say nothing new
    groups = np.repeat(np.arange(30), 5)
    single = stats.advise_sample_size(few, k=4, rng=generator(1))
    assert stats.advise_sample_size(repeated, k=4, rng=generator(1), groups=groups) == 5 * single
