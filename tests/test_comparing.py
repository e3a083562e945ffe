"""Comparisons of variants: by hand, against scipy, and by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from circuitune.comparing import (
    Comparison,
    Scores,
    compare,
    family,
    mean_over_tasks,
    questions_needed,
    score,
)
from circuitune.stats import Interval


def scores(
    values: np.ndarray | list[float], variant: str = "a", seed: int = 0, **more: object
) -> Scores:
    """Scores of questions q0, q1, ..."""
    array = np.asarray(values, dtype=float)
    ids = tuple(f"q{place}" for place in range(len(array)))
    return Scores("task", variant, seed, ids, array, **more)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------- one seed


def test_one_seed_by_hand() -> None:
    """Ten questions: a alone right on five, b alone on one."""
    a = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0]
    b = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    found = compare([scores(a)], [scores(b, "b")], rng=rng(), margin=0.5)
    assert (found.only_a, found.only_b, found.n, found.seeds) == (5, 1, 10, 1)
    assert found.difference.estimate == pytest.approx(0.4)
    assert found.p == pytest.approx(scipy.stats.binomtest(1, 6).pvalue)
    assert found.difference.low < 0.4 < found.difference.high
    assert found.non_inferior == (found.difference.low > -0.5)
    assert math.isnan(found.p_holm)


def test_questions_are_paired_by_name_not_by_place() -> None:
    a = scores([1, 0, 1, 1, 0, 0, 1, 0])
    mixed = Scores("task", "b", 0, a.ids[::-1], a.values[::-1])
    found = compare([a], [mixed], rng=rng())
    assert found.difference.estimate == 0
    assert (found.only_a, found.only_b) == (0, 0)


def test_other_values_are_tested_by_sign_flips() -> None:
    values = np.random.default_rng(1).normal(0.4, 1, size=10)
    found = compare([scores(values)], [scores(np.zeros(10), "b")], rng=rng())
    wanted = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.only_a is None


def test_weights_give_the_weighted_mean() -> None:
    values, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    one = scores(values, weights=weights)
    assert score([one]).estimate == pytest.approx(2.75)
    even = score([scores(np.full(6, 3.0), weights=np.array([1.0, 2, 3, 4, 50, 6]))])
    assert (even.low, even.high) == pytest.approx((3.0, 3.0))  # whatever the lengths
    base = scores(np.zeros(3), "b", weights=weights)
    assert compare([one], [base], rng=rng()).difference.estimate == pytest.approx(2.75)


def test_groups_widen_the_interval() -> None:
    """Twenty copies of each of ten questions say no more than ten questions."""
    values = np.repeat(np.arange(10) % 2, 20).astype(float)
    free = compare([scores(values)], [scores(0 * values, "b")], rng=rng())
    groups = tuple(np.repeat(np.arange(10), 20).tolist())
    tied = compare(
        [scores(values, groups=groups)], [scores(0 * values, "b", groups=groups)], rng=rng()
    )
    ratio = (tied.difference.high - tied.difference.low) / (
        free.difference.high - free.difference.low
    )
    assert ratio > 3
    assert tied.p > 0.01 > free.p


# -------------------------------------------------------------------------------- several seeds


def test_several_seeds_by_hand() -> None:
    """Two questions, three seeds; variances of question means and of seed means add."""
    rows = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    a = [scores(row, seed=seed) for seed, row in enumerate(rows)]
    found = compare(a, [scores([0.0, 0.0], "b")], rng=rng())
    question = np.var([2.5 / 3, 1.5 / 3], ddof=1) / 2
    seed = np.var([0.5, 0.5, 1.0], ddof=1) / 3
    freedom = (question + seed) ** 2 / (question**2 / 1 + seed**2 / 2)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(question + seed)
    assert found.difference.estimate == pytest.approx(4 / 6)
    assert found.difference.high == pytest.approx(4 / 6 + half)
    assert found.difference.low == pytest.approx(4 / 6 - half)
    wanted = 2 * scipy.stats.t.sf(4 / 6 / math.sqrt(question + seed), freedom)
    assert found.p == pytest.approx(wanted)
    assert (found.seeds, found.n) == (3, 2)


def test_without_a_question_part_it_is_students_t_of_the_seeds() -> None:
    means = np.array([0.1, 0.3, 0.2, 0.6])
    a = [scores(np.full(8, mean), seed=seed) for seed, mean in enumerate(means)]
    found = compare(a, [scores(np.zeros(8), "b")], rng=rng())
    wanted = scipy.stats.ttest_1samp(means, 0.0)
    ends = wanted.confidence_interval()
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((ends.low, ends.high))


def test_seeds_that_agree_leave_students_t_of_the_questions() -> None:
    values = np.random.default_rng(2).normal(0.2, 1, size=30)
    a = [scores(values, seed=seed) for seed in range(3)]
    found = compare(a, [scores(np.zeros(30), "b")], rng=rng())
    ends = scipy.stats.ttest_1samp(values, 0.0).confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((ends.low, ends.high))


def simulated(
    chance: np.random.Generator, questions: int, seeds: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of a variant and of its base; the truth is a gain of 5 points.

    Questions differ in how hard they are, seeds shift the gain by ``spread`` points.
    """
    hard = chance.beta(2, 2, size=questions)
    base = chance.random(questions) < hard
    gain = 0.05 + chance.normal(0, spread / 100, size=(seeds, 1))
    moves = chance.random((seeds, questions))
    # Some answers flip either way, so that pairs are discordant; the net change is the gain.
    up = moves < (0.05 + np.maximum(gain, 0)) / (1 - hard.mean())
    down = moves > 1 - (0.05 + np.maximum(-gain, 0)) / hard.mean()
    return np.where(base, ~down, up).astype(float), base.astype(float)


CELLS = [(50, 1, 0.0), (150, 1, 0.0)]
CELLS += [(n, k, s) for n, k in ((50, 3), (400, 3), (200, 5)) for s in (0.0, 3.0)]


@pytest.mark.parametrize(("questions", "seeds", "spread"), CELLS)
def test_intervals_cover_and_are_not_vacuous(questions: int, seeds: int, spread: float) -> None:
    """One seed is asked about this trained model, several about the recipe."""
    chance = np.random.default_rng([questions, seeds, int(spread)])
    covered, widths = 0, []
    runs = 200 if seeds == 1 else 400
    for _ in range(runs):
        rows, base = simulated(chance, questions, seeds, spread)
        a = [scores(row, seed=seed) for seed, row in enumerate(rows)]
        found = compare(a, [scores(base, "b")], rng=chance).difference
        covered += found.low <= 0.05 <= found.high
        widths.append(found.high - found.low)
    floor = 2 * 1.96 * math.sqrt(0.15 / questions + (spread / 100) ** 2 / seeds)
    factor = {1: 1.4, 3: 2.9, 5: 1.8}[seeds]  # Student's t of few seeds is wide
    assert covered / runs >= 0.925
    assert np.median(widths) < factor * floor


def test_p_values_err_no_more_than_they_say() -> None:
    chance = np.random.default_rng(5)
    for seeds in (1, 3):
        wrong = 0
        for _ in range(300):
            shift = chance.normal(0, 0.03, size=(seeds, 1)) if seeds > 1 else 0.0
            rows = (chance.random((seeds, 80)) < 0.5 + shift).astype(float)
            base = (chance.random(80) < 0.5).astype(float)
            a = [scores(row, seed=seed) for seed, row in enumerate(rows)]
            wrong += compare(a, [scores(base, "b")], rng=chance).p < 0.05
        assert wrong / 300 < 0.08


# ------------------------------------------------------------------------------- over the tasks


def test_holm_over_a_family_by_hand() -> None:
    nothing = Interval(0.0, 0.0, 0.0, 1)
    ps = (0.01, 0.04, 0.03)
    plain = [Comparison("t", "a", "b", nothing, p, math.nan, None, None, None, 1, 1) for p in ps]
    assert [one.p_holm for one in family(plain)] == pytest.approx([0.03, 0.06, 0.06])
    assert family([]) == []


def test_mean_over_tasks_weighs_tasks_not_questions() -> None:
    big = (scores(np.ones(100)), scores(np.zeros(100), "b"))
    values = np.array([1.0, 0.0, 0.0, 0.0])
    small = (replace(scores(values), task="s"), replace(scores(0 * values, "b"), task="s"))
    found = mean_over_tasks([([big[0]], [big[1]]), ([small[0]], [small[1]])])
    assert found.estimate == pytest.approx((1 + 0.25) / 2)
    half = math.sqrt(values.var(ddof=1) / 4) / 2
    assert found.high - found.estimate > 1.96 * half
    assert found.n == 104


def test_mean_over_tasks_keeps_what_seeds_share() -> None:
    """A seed that is good on all tasks does not average out over them."""
    means = np.array([0.1, 0.2, 0.6])
    tasks = []
    for name in ("one", "two", "three"):
        a = [replace(scores(np.full(5, m), seed=i), task=name) for i, m in enumerate(means)]
        tasks.append((a, [replace(scores(np.zeros(5), "b"), task=name)]))
    found = mean_over_tasks(tasks)
    ends = scipy.stats.ttest_1samp(means, 0.0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_advice_holds_in_simulation() -> None:
    """At the advised size, equal variants are shown to be within the margin as often as said."""
    size = questions_needed(0.1, margin=0.05)
    chance = np.random.default_rng(3)
    shown = 0
    for _ in range(120):
        moves = chance.random(size)
        a, b = (moves < 0.05).astype(float), (moves > 0.95).astype(float)
        found = compare([scores(a)], [scores(b, "b")], rng=chance, margin=0.05)
        shown += bool(found.non_inferior)
    assert 0.7 <= shown / 120 <= 0.9


# ------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare([scores([1, 0])], [scores([1, 0, 1], "b")], rng=rng())
    with pytest.raises(ValueError, match="one seed or those of a"):
        compare([scores([1, 0])] * 3, [scores([1, 0], "b")] * 2, rng=rng())
    with pytest.raises(ValueError, match="one value for each"):
        Scores("task", "a", 0, ("q", "q"), np.zeros(2))
    with pytest.raises(ValueError, match="at least one task"):
        mean_over_tasks([])
    with pytest.raises(ValueError, match="shares"):
        questions_needed(0.1, margin=0.0)


# ------------------------------------------------------------------------- few questions, seeds


@pytest.mark.parametrize("seeds", [2, 3])
def test_seeds_that_agree_on_few_questions_show_nothing(seeds: int) -> None:
    """As one seed would not: imagined questions stand beside the ten."""
    same = [scores([1, 0] * 5, seed=seed) for seed in range(seeds)]
    found = compare(same, [replace(one, variant="b") for one in same], rng=rng(), margin=0.01)
    assert found.difference.estimate == 0
    assert found.difference.low < -0.15 < 0.15 < found.difference.high
    assert found.non_inferior is False
    wins = [scores([1] * 3, seed=seed) for seed in range(seeds)]
    found = compare(wins, [scores([0] * 3, "b")], rng=rng())
    assert found.p > 0.1
    assert found.difference.high == 1
    none = score([scores([0] * 10, seed=seed) for seed in range(seeds)])
    assert (none.estimate, none.low) == (0, 0)
    assert 0.15 < none.high < 0.5


def test_intervals_stay_where_shares_can_be() -> None:
    chance = np.random.default_rng(2)
    rows = [scores((chance.random(60) < share).astype(float)) for share in (0.02, 0.25)]
    found = score(rows)
    assert found.low == 0
    assert found.high <= 1


def test_a_mean_over_tasks_of_few_questions_is_not_certain() -> None:
    tasks = [([scores([0] * 5)], [scores([0] * 5, "b")]) for _ in range(4)]
    found = mean_over_tasks(tasks)
    assert found.estimate == 0
    assert found.low < -0.1 < 0.1 < found.high
    numbers = [([scores([0.5] * 5)], [scores([0.5] * 5, "b")])]
    assert mean_over_tasks(numbers).low == 0  # nothing is imagined beside measured numbers


@pytest.mark.parametrize("questions", [50, 100, 300])
def test_a_real_loss_is_seldom_called_none(questions: int) -> None:
    """Three seeds that lose the same questions, 1.5 points of all: the margin is one point."""
    chance = np.random.default_rng(questions)
    wrong = 0
    for _ in range(400):
        lost = chance.random(questions) < 0.015
        base = scores(np.ones(questions), "b")
        tuned = [scores(1.0 - lost, seed=seed) for seed in range(3)]
        wrong += compare(tuned, [base], rng=rng(), margin=0.01).non_inferior is True
    assert wrong <= 400 * 0.025 + 3 * math.sqrt(400 * 0.025)
