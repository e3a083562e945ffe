import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from circuitune.components import Component, Head, Mlp
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.racing import FIRST, GROWTH, Race, block_ends, race


def heads(n: int) -> list[Head]:
    return [Head(row // 8, row % 8) for row in range(n)]


@dataclass
class Table:
    """A known table of effects that counts what is asked of it."""

    values: np.ndarray
    asked: np.ndarray = field(init=False)
    blocks: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.asked = np.zeros(self.values.shape, dtype=int)

    def __call__(self, rows: Sequence[int], places: Sequence[int]) -> np.ndarray:
        self.asked[np.ix_(rows, places)] += 1
        self.blocks.add(tuple(places))
        return self.values[np.ix_(rows, places)]

    def race(self, k: int, *, seed: int = 0, **options: float) -> Race:
        rows, examples = self.values.shape
        rng = np.random.default_rng(seed)
        return race(self, heads(rows), examples, k=k, rng=rng, **options)


def full(values: np.ndarray, k: int) -> set[Component]:
    """The set of the full sweep, by the ranking of the effect table itself."""
    zero = np.zeros(values.shape[1])
    table = EffectTable(
        tuple(heads(len(values))), {"logit_diff": zero}, {"logit_diff": values + zero}
    )
    return set(table.rank()[:k])


def chosen(result: Race) -> set[Component]:
    return {choice.component for choice in result.chosen}


def planted(
    seed: int, *, strong: int = 5, rows: int = 60, examples: int = 400, gap: float = 1.0
) -> np.ndarray:
    """Normal effects, all with the same spread; the strong ones lie lower by the gap."""
    rng = np.random.default_rng(seed)
    values = rng.normal(scale=0.3, size=(rows, examples))
    values[rng.choice(rows, strong, replace=False)] -= gap
    return values


# ------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("seed", range(5))
def test_clear_gaps_need_little_more_than_the_first_block(seed: int) -> None:
    table = Table(planted(seed))
    result = table.race(5, seed=seed)
    assert chosen(result) == full(table.values, 5)
    assert result.saving() > 0.8 * 400 / FIRST
    assert result.undecided == 0
    assert result.confidence == 0.95


def test_a_tie_at_the_boundary_is_measured_on_everything_and_goes_to_the_first() -> None:
    values = planted(0, strong=4, gap=6.0)
    low, high = np.argsort(values.mean(axis=1))[[10, 20]]
    low, high = min(low, high), max(low, high)
    values[[low, high]] = values[low] - 3.0  # ranks 5 and 6, the same numbers in both
    result = Table(values).race(5)
    assert (result.used[[low, high]] == 400).all()
    assert heads(60)[low] in chosen(result)
    assert heads(60)[high] not in chosen(result)
    assert chosen(result) == full(values, 5)
    assert result.undecided == 2
    assert result.saving() > 10  # only the two paid for it


def test_constant_components_tie_to_the_end() -> None:
    values = np.full((12, 300), 0.1) * np.array([1.0] * 10 + [-1.0] * 2)[:, None]
    result = Table(values).race(4)
    assert chosen(result) == set(heads(12)[10:]) | set(heads(12)[:2])
    assert result.undecided == 10
    assert result.saving() < 1.2


def test_rounding_does_not_decide() -> None:
    """A constant has no spread, but its mean over 16 examples is not quite that over 300."""
    values = np.full((2, 300), 0.1)
    values[1] += np.tile([1.0, -1.0], 150)
    result = Table(values).race(1)
    assert (result.used == 300).all()
    assert chosen(result) == full(values, 1)


def test_hardly_any_signal_still_gives_the_exact_set() -> None:
    values = planted(3, gap=0.0, examples=80)
    for seed in range(20):
        assert chosen(Table(values).race(7, seed=seed)) == full(values, 7)


def test_few_examples_are_a_full_sweep() -> None:
    values = planted(1, gap=0.0, examples=FIRST)
    result = Table(values).race(5)
    assert chosen(result) == full(values, 5)
    assert (result.spent(), result.saving(), result.rounds) == (60 * FIRST, 1.0, 1)
    assert result.confidence == 1.0
    assert (result.half == 0).all()


def test_all_components_need_no_race() -> None:
    values = planted(1)
    result = Table(values).race(60)
    assert chosen(result) == set(heads(60))
    assert (result.used == FIRST).all()
    assert result.confidence == 1.0


def test_one_example_and_one_component() -> None:
    result = race(
        lambda rows, places: np.full((len(rows), len(places)), -2.0),
        [Mlp(3)],
        1,
        k=1,
        rng=np.random.default_rng(0),
    )
    assert [(choice.component, choice.estimate) for choice in result.chosen] == [(Mlp(3), -2.0)]


def test_chosen_are_in_order_with_their_means() -> None:
    values = planted(2) - np.arange(60)[:, None]
    result = Table(values).race(3)
    assert [choice.component for choice in result.chosen] == heads(60)[:-4:-1]
    for choice, row in zip(result.chosen, (59, 58, 57), strict=True):
        assert choice.low <= values[row].mean() <= choice.high
        assert choice.estimate == pytest.approx((choice.low + choice.high) / 2)


def test_means_of_components_measured_in_full_are_those_of_the_sweep() -> None:
    values = planted(3, gap=0.05)
    result = Table(values).race(5)
    rows = result.used == 400
    assert 2 <= rows.sum() < 60
    assert (result.mean[rows] == values.mean(axis=1)[rows]).all()
    assert (result.half[rows] == 0).all()
    assert (result.half[~rows] > 0).all()


# ---------------------------------------------------------------------------- what is promised


def error_rate(make: str, *, tables: int = 20, seeds: int = 10, **options: float) -> float:
    """Share of wrong sets, over tables with means so close that the race has to be careful."""
    wrong = 0
    for number in range(tables):
        rng = np.random.default_rng(number)
        noise = {
            "normal": lambda rng=rng: rng.normal(size=(40, 250)),
            "heavy": lambda rng=rng: rng.standard_t(3, size=(40, 250)),
            "skewed": lambda rng=rng: rng.exponential(size=(40, 250)),
            "skewed down": lambda rng=rng: -rng.exponential(size=(40, 250)),
            "shared": lambda rng=rng: (
                rng.normal(size=(40, 250)) + 2 * rng.normal(size=(1, 250)) * np.ones((40, 1))
            ),
        }[make]()
        spread = rng.uniform(0.05, 1.0, size=(40, 1))
        values = noise * spread - np.linspace(1.5, 0, 40)[:, None]
        for seed in range(seeds):
            result = Table(values).race(8, seed=seed, **options)
            wrong += chosen(result) != full(values, 8)
    return wrong / (tables * seeds)


@pytest.mark.parametrize("make", ["normal", "heavy", "skewed", "skewed down", "shared"])
def test_the_set_is_wrong_no_more_often_than_allowed(make: str) -> None:
    assert error_rate(make) <= 0.05


def test_less_confidence_costs_less() -> None:
    values = planted(4, gap=0.3)
    spent = [Table(values).race(5, confidence=level).spent() for level in (0.5, 0.95, 0.999999)]
    assert spent == sorted(spent)
    assert spent[0] < spent[2]


def test_an_interval_misses_as_often_as_it_may() -> None:
    """One component: 10 % for two sides, shared by the two blocks before the last."""
    values = np.random.default_rng(0).normal(size=(1, 2 * FIRST))
    assert len(block_ends(2 * FIRST)) == 3
    misses = 0
    for seed in range(2000):
        result = Table(values).race(1, seed=seed, confidence=0.9)  # stops at the first block
        misses += bool(np.abs(result.mean - values.mean()) > result.half)
    assert 0.08 < misses / 2000 < 0.12


def test_a_rare_effect_needs_a_larger_first_block() -> None:
    """The stated limit of t intervals: what shows on one example in twenty is easily missed."""
    rng = np.random.default_rng(0)
    values = rng.normal(scale=0.01, size=(40, 400))
    values[:3] -= 0.1
    values[3, rng.choice(400, 20, replace=False)] -= 10.0  # mean -0.5, the strongest of all
    exact = full(values, 3)
    missed = [
        sum(chosen(Table(values).race(3, seed=seed, first=first)) != exact for seed in range(40))
        for first in (FIRST, 150)
    ]
    assert missed[0] > 4
    assert missed[1] == 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 20),
    examples=st.integers(1, 120),
    gap=st.floats(0, 1),
    data=st.data(),
)
def test_confidence_near_one_gives_the_full_ranking(
    seed: int, rows: int, examples: int, gap: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, rows))
    values = planted(seed, strong=k, rows=rows, examples=examples, gap=gap)
    result = Table(values).race(k, seed=seed, confidence=1 - 1e-9)
    assert chosen(result) == full(values, k)


@settings(max_examples=60)
@given(
    values=arrays(float, (6, FIRST), elements=st.floats(-1e6, 1e6)),
    k=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_any_table_that_fits_the_first_block_is_exact(
    values: np.ndarray, k: int, seed: int
) -> None:
    result = Table(values).race(k, seed=seed)
    assert [choice.component for choice in result.chosen] == list(
        np.array(heads(6), dtype=object)[np.argsort(values.mean(axis=1), kind="stable")[:k]]
    )


# -------------------------------------------------------------------------------- what it takes


def test_counts_are_those_of_the_calls() -> None:
    table = Table(planted(5, gap=0.2))
    result = table.race(5)
    assert table.asked.max() == 1  # nothing is measured twice
    assert (table.asked.sum(axis=1) == result.used).all()
    assert result.spent() == table.asked.sum()
    assert result.full() == 60 * 400
    assert result.saving() == result.full() / result.spent()
    assert result.undecided == (table.asked.sum(axis=1) == 400).sum()
    costs = [float(cost) for cost in range(1, 61)]
    assert result.spent(costs) == (table.asked.sum(axis=1) * costs).sum()
    assert result.full(costs) == 400 * sum(costs)


def test_blocks_are_the_same_for_all_components() -> None:
    table = Table(planted(5, gap=0.05))
    assert table.race(5).undecided
    assert len(table.blocks) <= len(block_ends(400))
    assert sorted(place for block in table.blocks for place in block) == list(range(400))


@given(examples=st.integers(1, 5000), first=st.integers(2, 200))
def test_blocks_grow_steadily_to_all_examples(examples: int, first: int) -> None:
    ends = block_ends(examples, first)
    assert ends[0] == min(first, examples)
    assert ends[-1] == examples
    assert all(a < b <= GROWTH * a + 1 for a, b in pairwise(ends))


def test_the_seed_decides_all() -> None:
    table = planted(6, gap=0.2)
    one, same, other = (Table(table).race(5, seed=seed) for seed in (1, 1, 2))
    assert (one.used == same.used).all()
    assert (one.mean == same.mean).all()
    assert (one.mean != other.mean).any()


def test_the_order_of_the_components_does_not_matter() -> None:
    values = planted(7, gap=0.2)
    order = np.random.default_rng(0).permutation(60)
    one, two = Table(values).race(5), Table(values[order]).race(5)
    assert (one.used[order] == two.used).all()
    assert (one.mean[order] == two.mean).all()
    assert one.rounds == two.rounds


def test_the_record_is_plain_json() -> None:
    record = json.loads(json.dumps(Table(planted(5)).race(5).to_json()))
    assert len(record["chosen"]) == record["k"] == 5
    assert record["full_evaluations"] == 24000


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be between 1"),
        ({"k": 61}, "k must be between 1"),
        ({"k": 5, "confidence": 1.0}, "confidence must be"),
        ({"k": 5, "confidence": 0.0}, "confidence must be"),
        ({"k": 5, "first": 1}, "first block of 2"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Table(planted(0)).race(**options)


def test_no_examples_are_refused() -> None:
    with pytest.raises(UserError, match="1 example or more"):
        Table(np.zeros((4, 0))).race(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_effects_that_are_not_finite_are_refused(bad: float) -> None:
    values = planted(0)
    values[7] = bad
    with pytest.raises(UserError, match="component number 7"):
        Table(values).race(5)


def test_a_measure_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(UserError, match="one row per component"):
        race(
            lambda rows, places: np.zeros((len(places), len(rows))),
            heads(5),
            40,
            k=2,
            rng=np.random.default_rng(0),
        )


def test_costs_must_fit() -> None:
    with pytest.raises(UserError, match="each of 60 components"):
        Table(planted(0)).race(5).spent([1.0])
