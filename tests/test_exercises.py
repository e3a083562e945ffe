"""Problems to train on, to watch and to judge by share no operand pair."""

import pytest

from circuitune.exercises import TEST_RESERVE, exercises, held_out_problems
from circuitune.pairs import PairSet, _halves


@pytest.fixture
def pair_set() -> PairSet:
    """An empty set of pairs with the split of operands that every run has."""
    _, wide = _halves([], seed=0)
    groups = {split: sorted({p.group for p in side}) for split, side in wide.items()}
    selection = {"select_groups": groups["select"], "held_out_groups": groups["test"]}
    return PairSet((), selection)


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("digits", [1, 2])
def test_the_three_lists_are_disjoint(pair_set: PairSet, digits: int, watch: bool) -> None:
    found = exercises(pair_set, ("add", "mul"), digits=digits, n=400, seed=0, watch=watch)
    groups = [
        {problem.group for problem in part} for part in (found.train, found.watch, found.test)
    ]
    assert len(found.train) == 400
    assert len(found.test) == TEST_RESERVE
    assert bool(found.watch) == watch
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert not (groups[0] | groups[1]) & set(pair_set.selection["held_out_groups"])
    assert not groups[2] & set(pair_set.selection["select_groups"])


def test_fewer_test_problems_are_the_first_of_all(pair_set: PairSet) -> None:
    every = held_out_problems(pair_set, ("add",), digits=2, n=TEST_RESERVE, seed=3)
    assert held_out_problems(pair_set, ("add",), digits=2, n=50, seed=3) == every[:50]


def test_training_problems_are_shuffled_by_seed(pair_set: PairSet) -> None:
    def drawn(seed: int) -> list:
        return exercises(pair_set, ("add", "sub"), digits=2, n=60, seed=seed, watch=False).train

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert [problem.operator for problem in drawn(0)] != sorted(
        (problem.operator for problem in drawn(0)), key=str
    )
