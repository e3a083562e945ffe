"""Joint selection: sets are measured exactly, and the rules pick the set that they say."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from circuitune import cli
from circuitune.components import Head
from circuitune.config import LocateConfig
from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.joint import (
    PROPOSERS,
    Left,
    Panel,
    beam_search,
    best_of,
    check_joint,
    in_order,
    largest,
    panel,
)
from circuitune.masks import by_mask, learn_mask
from circuitune.models import Model, load
from circuitune.pairs import Pair
from tests.planted import build
from tests.reference.slow_knockout import head_outputs, logits_without
from tests.test_validate import planted_task

A, B, C, D = (Head(0, index) for index in range(4))


def pairs_of(task: str, sign: str, top: int) -> list[Pair]:
    """One-digit problems of a task; a random model need not know them."""
    return [
        Pair(f"{a} {sign} {b} = ", f"{a} @ {b} = ", str((a + b) % 10), task, "", "select", f"{a}")
        for a in range(1, top)
        for b in range(2, 4)
    ]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def watched(request: pytest.FixtureRequest, tiny: Callable[..., Model]) -> Panel:
    """Two targets and a spared task with answers of its own, on a tiny model."""
    words = [Pair(f"say {w}: ", "say #: ", w, "copy", "", "select", w) for w in "xyz"]
    targets = {"add": pairs_of("add", "+", 5), "sub": pairs_of("sub", "-", 4)}
    return panel(tiny(request.param), targets, {"copy": words}, [str(d) for d in range(10)])


@pytest.mark.parametrize("heads", [(Head(1, 0),), (Head(0, 2), Head(2, 1), Head(3, 3))])
def test_what_is_left_equals_plain_hooks(watched: Panel, heads: tuple[Head, ...]) -> None:
    model, pairs = watched.model, watched.task.pairs
    found = watched.left(heads)
    for name, rows in watched.rows.items():
        outputs = [head_outputs(model, pairs.corrupt[row]) for row in rows]
        given = {
            head: torch.stack(
                [
                    layers[head.layer][-1, head.index * model.d_head :][: model.d_head]
                    for layers in outputs
                ]
            ).mean(dim=0)
            for head in heads
        }
        whole = torch.stack(
            [logits_without(model, pairs.clean[row], given, slice(-1, None)) for row in rows]
        )
        tokens = np.array(pairs.candidates)[pairs.answers[rows]]
        # Only the answers of the task compete; digits are all admissible.
        own = sorted(set(tokens) | (set(pairs.candidates[:10]) if name != "copy" else set()))
        places = np.array([own.index(token) for token in tokens])
        difference = measure(whole[:, own].numpy(), places)["logit_diff"].mean()
        assert found.logit_diff[name] == pytest.approx(difference, abs=1e-9)
        assert found.accuracy[name] == (whole[:, own].argmax(-1).numpy() == places).mean()
        assert watched.answered(heads)[name] == (whole.argmax(-1).numpy() == tokens).mean()


def test_a_set_is_measured_once(watched: Panel) -> None:
    before = len(watched.measured)
    first = watched.left([Head(2, 0), Head(1, 1)])
    assert watched.left([Head(1, 1), Head(2, 0)]) is first
    assert len(watched.measured) == before + 1


def test_every_task_has_the_same_weight(watched: Panel) -> None:
    weights = watched.weights()
    sums = {name: weights[rows].sum() for name, rows in watched.rows.items()}
    assert sums == pytest.approx({"add": 0.5, "sub": 0.5, "copy": -1.0})


# ------------------------------------------------------------------------------ the choice of sets


def hand_made(accuracy: Callable[[frozenset], tuple[float, float]]) -> Panel:
    """A panel of four heads whose every set is measured already, as (target, spared)."""
    found = object.__new__(Panel)  # no model: nothing is left to measure
    for name, value in (("targets", ("sum",)), ("spared", ("copy",)), ("measured", {})):
        object.__setattr__(found, name, value)
    for size in range(5):
        for heads in itertools.combinations((A, B, C, D), size):
            target, spared = accuracy(frozenset(heads))
            left = {"sum": target, "copy": spared}
            found.measured[frozenset(heads)] = Left(left, dict.fromkeys(left, 0.0))
    return found


def backups(heads: frozenset) -> tuple[float, float]:
    """B and C back each other up; A alone does a little; D serves every task."""
    target = 1.0 - 0.1 * (A in heads) - 0.75 * ({B, C} <= heads) - 0.8 * (D in heads)
    return max(target, 0.0), 0.2 if D in heads else 1.0


def test_the_beam_finds_backups_and_spares_what_all_tasks_need() -> None:
    watched = hand_made(backups)
    sets = beam_search(watched, (A, B, C, D), 3, harm=0.03)
    assert sets == [[A], [B, C], [A, B, C]]
    assert in_order(watched, [A, B, C], harm=0.03)[0] == A
    assert watched.harm([D]) == {"copy": 0.8}


def test_less_harm_is_better_than_a_little_more_damage() -> None:
    watched = hand_made(backups)
    assert watched.loss([B, C], harm=0.03) < watched.loss([D], harm=0.03)
    assert watched.loss([A, B, C], harm=0.03) < watched.loss([B, C], harm=0.03)


# -------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mask_finds_the_planted_heads(seed: int) -> None:
    planted = build(seed)
    task = planted_task(planted)
    count = len(planted.answers)
    everything = np.ones((count, len(task.pairs.candidates)), dtype=bool)
    mask = learn_mask(planted.model, task, everything, np.full(count, 1 / count), steps=40)
    assert set(by_mask(mask)[:2]) == set(planted.heads)
    assert ((mask >= 0) & (mask <= 1)).all()


def test_a_mask_leaves_a_spared_task_alone() -> None:
    planted = build(3)
    task = planted_task(planted)
    count = len(planted.answers)
    everything = np.ones((count, len(task.pairs.candidates)), dtype=bool)
    mask = learn_mask(planted.model, task, everything, np.full(count, -1 / count), steps=40)
    assert mask.max() < 0.1


def test_a_mask_leaves_no_trace(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    watched = panel(model, {"add": pairs_of("add", "+", 4)}, {})
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    lengths = [batch.cache.get_seq_length() for batch in watched.task.prompts.batches]
    learn_mask(model, watched.task, watched.admissible, watched.weights(), steps=2)
    assert [b.cache.get_seq_length() for b in watched.task.prompts.batches] == lengths
    assert all(torch.equal(value, before[n]) for n, value in model.hf.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.hf.modules())
    assert all(parameter.grad is None for parameter in model.hf.parameters())


# ------------------------------------------------------------------------------------ the options


def test_the_largest_set_is_a_share_of_the_heads(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")  # 16 heads
    assert largest(model, LocateConfig(share=0.02)) == 2
    assert largest(model, LocateConfig(share=0.5)) == 8
    assert largest(model, LocateConfig(share=0.5, most=3)) == 3


@pytest.mark.parametrize("options", [{"left": 0.0}, {"harm": 1.0}, {"share": 2.0}])
def test_goals_out_of_range_are_refused(options: dict, tiny: Callable[..., Model]) -> None:
    with pytest.raises(UserError, match="a share between 0 and 1"):
        check_joint(tiny("llama"), LocateConfig(**options))


def test_offloaded_weights_are_refused_before_anything_is_measured(tiny_folder: Path) -> None:
    model = load(str(tiny_folder), device="cpu", max_memory="1K")
    assert model.offloaded
    with pytest.raises(UserError, match="needs all weights in memory"):
        check_joint(model, LocateConfig())


# ------------------------------------------------------------------------------ on the command line


@pytest.fixture(scope="module")
def selected(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by joint selection against two tasks of a random model, validated."""
    folder = tmp_path_factory.mktemp("joint")
    both = [*pairs_of("add", "+", 7), *pairs_of("sub", "-", 7)]
    halves = [asdict(pair) | {"split": split} for pair in both for split in ("select", "test")]
    lines = [json.dumps(item | {"group": item["group"] + item["split"]}) for item in halves]
    (folder / "own.jsonl").write_text("\n".join(lines))
    run = folder / "run"
    locate = ["locate", tiny_folder, "--out", run, "--pairs", folder / "own.jsonl", "--no-graph"]
    joint = ["--rule", "joint", "--targets", "add,sub", "--share", "0.2", "--left", "0.001"]
    cli.app([str(word) for word in (*locate, *joint)], standalone_mode=False)
    sizes = ["--sizes", "1", "--controls", "2", "--where", "end", "--ablations", "mean"]
    cli.app(["validate", str(run), *sizes], standalone_mode=False)
    return run


def test_every_proposal_is_judged_on_both_halves(selected: Path) -> None:
    circuit = json.loads((selected / "circuit.json").read_text())
    rule = circuit["rule"]
    proposals = {(item["by"], item["k"]): item for item in rule["proposals"]}
    assert set(proposals) == set(itertools.product(PROPOSERS, (1, 2, 3)))  # 20 % of 16 heads
    assert rule["targets"] == ["add", "sub"]
    table = pd.read_parquet(selected / "knockout.parquet").query("set == 'proposal'")
    for (by, k), item in proposals.items():
        rows = table[(table["source"] == by) & (table["k"] == k)]
        assert list(rows["heads"]) == [" ".join(item["heads"])] * 2
        assert set(rows["task"]) == {"add", "sub"}


def test_the_best_set_is_the_circuit(selected: Path) -> None:
    circuit = json.loads((selected / "circuit.json").read_text())
    proposals = circuit["rule"]["proposals"]
    assert {item["id"] for item in circuit["components"]} == set(best_of(proposals)["heads"])
    assert circuit["size"] == len(circuit["components"])
    # A random model answers nothing, so nothing is left whatever is ablated.
    for item in proposals:
        assert item["reached"] == (max(item["accuracy"].values()) <= 0.001)


def test_a_smaller_set_wins_if_it_is_nearly_as_good() -> None:
    def proposal(k: int, loss: float, reached: bool) -> dict:
        return {"k": k, "loss": loss, "reached": reached}

    far, lucky, good, larger = (
        proposal(1, 0.9, False),
        proposal(2, 0.3, True),
        proposal(3, 0.1, True),
        proposal(4, 0.05, True),
    )
    assert best_of([far, lucky, good, larger]) is good
    assert best_of([far, lucky]) is lucky
    assert best_of([far, proposal(2, 0.85, False)]) is far


def test_unknown_targets_are_refused(selected: Path, tmp_path: Path, tiny_folder: Path) -> None:
    words = ["locate", tiny_folder, "--out", tmp_path / "run", "--rule", "joint"]
    words += ["--pairs", selected.parent / "own.jsonl", "--targets", "add,pow"]
    with pytest.raises(UserError, match="among add, sub, found 'pow'"):
        cli.app([str(word) for word in words], standalone_mode=False)
    assert not (tmp_path / "run" / "circuit.json").exists()
