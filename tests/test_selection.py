"""Rules that choose heads: each does what its name says, and the fast ways find the exact set."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from circuitune.components import Head
from circuitune.config import LocateConfig
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair
from circuitune.selection import (
    _sizes,
    check_rule,
    exactly,
    flat_from,
    race_heads,
    screened,
    select,
)
from circuitune.tasks import Task, prepare, survivors, sweep

CONFIG = LocateConfig(most=6, draws=100)


def make_task(model: Model) -> Task:
    """Sums with one-digit answers; a random model need not know them."""
    sums = [(a, b) for a in range(1, 6) for b in range(1, 5)]
    pairs = [
        Pair(f"{a} + {b} = ", f"{a} @ {b} = ", str(a + b), "add", "", "select", f"{a},{b}")
        for a, b in sums
    ]
    return prepare(model, pairs)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Model]) -> Model:
    """A tiny Llama: 4 layers of 4 heads."""
    return tiny("llama")


@pytest.fixture(scope="module")
def task(model: Model) -> Task:
    """Twenty pairs on it."""
    return make_task(model)


def heads_of(model: Model, task: Task) -> EffectTable:
    """Exact effects of all heads in the intact model."""
    table = sweep(model, task)
    return table.select([part for part in table.components if isinstance(part, Head)])


def chosen(model: Model, task: Task, config: LocateConfig) -> tuple[list[Head], dict, int]:
    """Heads in order, the record of the rule, and the size of the circuit."""
    heads = heads_of(model, task)
    found, record, size = select(model, task, heads, config, np.random.default_rng(0))
    return [choice.component for choice in found], record, size


def test_the_first_round_takes_the_strongest_head_and_ablates_it(model: Model, task: Task) -> None:
    found, record, size = chosen(model, task, CONFIG)
    assert len(set(found)) == CONFIG.most
    heads = heads_of(model, task).components
    first = sweep(model, task, senders=heads, corrupt=task.average).rank()[0]
    assert found[0] == first
    second = sweep(model, task, ablated=[first], corrupt=task.average)
    second = second.select([part for part in second.components if isinstance(part, Head)])
    assert found[1] == second.rank()[0]
    points = {point["heads"]: point["accuracy"] for point in record["curve"]}
    assert points[0] == survivors(model, task).mean()
    assert points[2] == survivors(model, task, found[:2]).mean()
    assert size == flat_from(record["curve"])


def test_single_is_the_order_of_one_sweep(model: Model, task: Task) -> None:
    found, record, size = chosen(model, task, replace(CONFIG, rule="single"))
    assert found == heads_of(model, task).rank()[: CONFIG.most]
    assert record["metric"] == "logit_diff"
    assert 0 <= size <= CONFIG.most


def test_the_papers_rule_cuts_the_relative_logit(model: Model, task: Task) -> None:
    heads = heads_of(model, task)
    means = np.sort(heads.mean("relative_logit"))
    cut = float(means[2:4].mean())
    found, record, size = chosen(model, task, replace(CONFIG, rule="paper", cut=cut))
    assert found == heads.rank("relative_logit")[: CONFIG.most]
    assert size == 3
    assert (record["metric"], record["cut"]) == ("relative_logit", cut)


def test_a_cut_that_no_head_passes_is_refused(model: Model, task: Task) -> None:
    with pytest.raises(UserError, match=r"the strongest changes it by .*raise --cut"):
        chosen(model, task, replace(CONFIG, rule="paper", cut=-1e6))


def test_a_screen_of_all_heads_is_the_exact_selection(model: Model, task: Task) -> None:
    exact, _, size = chosen(model, task, CONFIG)
    found, record, same = chosen(model, task, replace(CONFIG, screen=16))
    assert (found, same) == (exact, size)
    assert record["screen"] == 16


def test_screened_takes_the_largest_estimates(model: Model, task: Task) -> None:
    few, more = screened(model, task, 4), screened(model, task, 8)
    assert len(few) == 4
    assert set(few) < set(more)
    assert Head(0, 0) not in screened(model, task, 15, ablated=[Head(0, 0)])


def test_a_race_over_few_pairs_is_exact(model: Model, task: Task) -> None:
    """With 20 pairs all undecided heads see all pairs; the effects are those of the sweep."""
    for ablated in ([], [Head(1, 1)]):
        table = sweep(model, task, ablated=ablated, corrupt=task.average)
        table = table.select([part for part in table.components if isinstance(part, Head)])
        result = race_heads(model, task, 5, np.random.default_rng(0), ablated=ablated)
        assert {choice.component for choice in result.chosen} == set(table.rank()[:5])
        means = dict(zip(table.components, table.mean(), strict=True))
        for part, mean, used in zip(result.components, result.mean, result.used, strict=True):
            if used == 20:
                assert mean == pytest.approx(means[part], abs=1e-9)


def test_a_raced_selection_is_the_exact_one(model: Model, task: Task) -> None:
    exact, _, _ = chosen(model, task, CONFIG)
    found, record, _ = chosen(model, task, replace(CONFIG, race=0.99))
    assert found == exact
    assert record["race"]["confidence"] == 0.99
    assert record["race"]["evaluations"] <= record["race"]["full_evaluations"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "best"}, "--rule must be iterated, single, paper, joint, found 'best'"),
        ({"race": 1.0}, "--race must be a confidence below 1"),
        ({"race": 0.9, "screen": 5}, "--race speeds up .* leave one out"),
        ({"rule": "single", "screen": 5}, "--screen speeds up the rounds of --rule iterated"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_rule(replace(CONFIG, **options))


def test_exact_overrules_racing_and_screening() -> None:
    fast = replace(CONFIG, race=0.9, screen=5)
    assert exactly(fast) == fast
    assert exactly(replace(fast, exact=True)) == replace(CONFIG, exact=True)


def test_a_race_runs_in_one_process() -> None:
    with pytest.raises(UserError, match="2 process"):
        check_rule(replace(CONFIG, race=0.9), processes=2)


@pytest.mark.parametrize("most", [1, 2, 5, 13, 60, 200])
def test_rounds_add_up(most: int) -> None:
    sizes = _sizes(most)
    assert sum(sizes) == most
    assert min(sizes) >= 1
