"""Effects before and after a change of the weights that is known, and what is said of it."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitune.changes import LISTED, Measured, against_others, changes, compared, measured
from circuitune.components import Circuit, Head
from circuitune.deltas import save_delta, tensor_digest
from circuitune.effects import EffectTable
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Pair, PairSet
from circuitune.slices import Slice

SCALED = Head(3, 1)


def digests(model: Model) -> dict[str, str]:
    """The content of every tensor of a model."""
    return {name: tensor_digest(value) for name, value in model.hf.state_dict().items()}


@pytest.fixture
def model(tiny: Callable[..., Model]) -> Model:
    """A tiny model whose logits are linear in what the heads of its last layer give.

    Nothing follows them, so the effect of each is a difference of logits of its own.
    """
    found = tiny("llama")
    found.hf.model.norm = torch.nn.Identity()
    with torch.no_grad():
        found.hf.model.layers[3].mlp.down_proj.weight.zero_()
        out = found.hf.model.layers[3].self_attn.o_proj.weight
        out.copy_(out.float())  # a delta is float32; so twice this weight is exact
    return found


def columns(model: Model) -> tuple[Slice, torch.Tensor]:
    """The columns of W_O that belong to the head."""
    start, stop = SCALED.index * model.d_head, (SCALED.index + 1) * model.d_head
    weight = model.part(SCALED.layer, model.family.out).weight[:, start:stop]
    return Slice(SCALED.layer, model.family.out, "cols", start, stop), weight.detach().clone()


def write(model: Model, run: Path, factors: dict[str, float]) -> Path:
    """A run whose variants scale what one head gives by some factors."""
    pairs = [
        Pair(f"{a}+{b}=", f"{a}@{b}=", "87"[(a + b) % 2], "add", "t", split, f"{a},{b}")
        for a, split in ((2, "test"), (3, "test"), (4, "select"))
        for b in range(1, 5)
    ]
    (run / "tuned" / "random").mkdir(parents=True)
    PairSet(tuple(pairs), {}).save(run)
    circuit = Circuit((), "add", model.source).to_json()
    (run / "circuit.json").write_text(json.dumps(circuit))
    part, weight = columns(model)
    for place, factor in factors.items():
        facts = {"components": [str(SCALED)]}
        save_delta(run / "tuned" / place, model, {part: weight * (factor - 1)}, facts)
    return run


def of(record: dict, head: str) -> dict:
    """The row of a head."""
    return next(row for row in record["heads"] if row["id"] == head)


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_a_scaled_head_changes_by_its_factor_and_no_other_head_does(
    model: Model, tmp_path: Path, factor: float
) -> None:
    whole = digests(model)
    run = write(model, tmp_path, {".": factor, "random": 1.0})
    found = changes(model, run, draws=200)
    assert digests(model) == whole
    assert json.loads(json.dumps(found)) == found
    assert (found["task"], found["split"], found["pairs"], found["groups"]) == ("add", "test", 8, 8)
    precise, random = found["variants"]["precise"], found["variants"]["random"]
    assert precise["tested"] == 16
    row = of(precise, str(SCALED))
    assert abs(row["before"]) > 0.01
    assert row["after"] == pytest.approx(factor * row["before"], abs=1e-10)
    assert row["change"][0] == pytest.approx((factor - 1) * row["before"], abs=1e-10)
    assert row["change"][1] <= row["change"][0] <= row["change"][2]
    assert precise["heads"][0] == row
    assert precise["tuned"] == [row]
    for other in precise["heads"][1:]:
        assert abs(other["change"][0]) < 1e-10
    for other in random["heads"]:
        assert other["change"] == [0.0, 0.0, 0.0]
        assert (other["p_adjusted"], other["direction"]) == (1.0, "unclear")
    assert (random["grew"], random["shrank"]) == (0, 0)
    assert random["accuracy"]["change"][0] == 0
    assert {item["jaccard"] for item in random["overlap"]} == {1.0}


def test_the_tuned_model_is_measured_as_if_its_weights_were_loaded(
    model: Model, tmp_path: Path
) -> None:
    run = write(model, tmp_path, {".": 3.0, "random": 1.0})
    pairs = PairSet.load(run).of("add", "select")
    found = changes(model, run, split="select", draws=50)["variants"]["precise"]
    other = replace(model, hf=copy.deepcopy(model.hf))
    part, weight = columns(model)
    with torch.no_grad():
        other.part(3, part.path).weight[:, part.start : part.stop] = 3 * weight
    base, tuned = measured(model, pairs), measured(other, pairs)
    for row in found["heads"]:
        head = base.heads.rows([Head(*map(int, row["id"].split(".")))])[0]
        old, new = base.effects[head].mean(), tuned.effects[head].mean()
        assert (row["before"], row["after"]) == pytest.approx((old, new), abs=1e-10)
        shares = (old / base.total.mean(), new / tuned.total.mean())
        assert (row["share_before"], row["share_after"]) == pytest.approx(shares, abs=1e-10)
        change = [row["share_change"][place] for place in (1, 0, 2)]
        assert change == sorted(change)
    assert found["accuracy"]["before"][0] == base.correct.mean()
    assert found["accuracy"]["after"][0] == tuned.correct.mean()
    expected = {"before": base.total.mean(), "after": tuned.total.mean()}
    assert found["total_effect"] == pytest.approx(expected)


def test_the_total_is_what_the_whole_corruption_does(model: Model, tmp_path: Path) -> None:
    run = write(model, tmp_path, {".": 1.0, "random": 1.0})
    pairs = PairSet.load(run).of("add", "test")
    found = measured(model, pairs)
    for pair, total, correct in zip(pairs, found.total, found.correct, strict=True):
        clean, corrupt = (
            model.hf(torch.tensor([model.tokenizer(text).input_ids])).logits[0, -1].detach()
            for text in (pair.clean, pair.corrupt)
        )
        right = model.tokenizer(pair.answer).input_ids[0]
        wrong = model.tokenizer("78"["87".index(pair.answer)]).input_ids[0]
        moved = (corrupt[right] - corrupt[wrong]) - (clean[right] - clean[wrong])
        assert total == pytest.approx(float(moved), abs=1e-9)
        assert correct == (int(clean.argmax()) == right)


def synthetic(means: np.ndarray, *, seed: int, total: float = -4.0) -> Measured:
    """Effects of 40 heads on 60 pairs around given means."""
    rng = np.random.default_rng(seed)
    heads = tuple(Head(place // 8, place % 8) for place in range(40))
    values = means[:, None] + 0.01 * rng.standard_normal((40, 60))
    clean = {"logit_diff": np.zeros(60)}
    table = EffectTable(heads, clean, {"logit_diff": values})
    return Measured(table, np.arange(60) >= 6, np.full(60, total))


GROUPS = [f"g{place // 3}" for place in range(60)]


def test_growing_and_shrinking_are_told_apart_and_ranked() -> None:
    before = np.linspace(-0.4, 0.0, 40)
    after = before.copy()
    after[0], after[1], after[30], after[39] = -1.4, 0.1, -0.9, -0.2
    tuned = synthetic(after, seed=2, total=-8.0)
    tuned = replace(tuned, correct=np.ones(60, dtype=bool))
    chosen = ["0.0", "0.1", "3.6"]
    found = compared(synthetic(before, seed=1), tuned, chosen, groups=GROUPS, draws=300)
    assert [row["id"] for row in found["heads"][:4]] == ["0.0", "3.6", "0.1", "4.7"]
    directions = [row["direction"] for row in found["heads"][:4]]
    assert directions == ["grew", "grew", "shrank", "grew"]
    assert found["grew"] + found["shrank"] <= 6  # at a false-discovery rate of 5 %
    assert len(found["heads"]) == LISTED
    assert [row["id"] for row in found["tuned"]] == ["0.0", "3.6", "0.1"]
    first = found["heads"][0]
    assert first["change"][0] == pytest.approx(-1.0, abs=0.01)
    assert first["change"][1] < first["change"][0] < first["change"][2]
    assert first["share_before"] == pytest.approx(0.1, abs=0.002)
    assert first["share_after"] == pytest.approx(1.4 / 8, abs=0.002)
    assert first["share_change"][1] < first["share_change"][0] < first["share_change"][2]
    accuracy = found["accuracy"]
    assert (accuracy["before"][0], accuracy["after"][0]) == (0.9, 1.0)
    assert accuracy["change"][0] == pytest.approx(0.1)
    assert found["overlap"][0]["k"] == 5
    assert found["overlap"][0]["common"] == 4  # 0.1 left, 3.6 came
    assert found["overlap"][0]["jaccard"] == pytest.approx(4 / 6)
    assert found["overlap"][0]["noise"] > 0.5


def test_tuned_heads_against_the_others() -> None:
    rng = np.random.default_rng(5)
    difference = 0.01 * rng.standard_normal((40, 60))
    is_tuned = np.arange(40) < 5
    same = against_others(difference, is_tuned, groups=GROUPS, draws=300)
    assert same["p"] > 0.05
    assert same["difference"][1] < 0 < same["difference"][2]
    difference[:3] -= 0.5
    difference[3:5] += 0.5
    more = against_others(difference, is_tuned, groups=GROUPS, draws=300)
    assert more["tuned"] == pytest.approx(0.5, abs=0.01)
    assert more["others"] < 0.01
    assert more["difference"][1] > 0.48
    assert more["p"] < 1e-3
    assert against_others(difference, np.ones(40, dtype=bool), groups=GROUPS) is None


def test_without_an_effect_of_the_corruption_there_are_no_shares() -> None:
    nothing = synthetic(np.zeros(40), seed=1, total=0.0)
    found = compared(nothing, nothing, ["0.0"], groups=GROUPS, draws=50)
    assert all("share_before" not in row for row in found["heads"])


def test_a_run_that_cannot_be_compared_is_refused(model: Model, tmp_path: Path) -> None:
    run = write(model, tmp_path, {".": 2.0, "random": 1.0})
    with pytest.raises(UserError, match="run `circuitune tune` first"):
        changes(model, tmp_path / "nothing")
    pair_set = PairSet.load(run)
    PairSet(tuple(pair_set.of("add", "select")), {}).save(run)
    with pytest.raises(UserError, match="The test half of add must hold pairs of two groups"):
        changes(model, run)
    pair_set.save(run)
    part, weight = columns(model)
    save_delta(run / "tuned", model, {part: weight}, {})
    with pytest.raises(UserError, match="must list its heads"):
        changes(model, run)
    shutil.rmtree(run / "tuned" / "random")
    save_delta(run / "tuned", model, {part: weight}, {"method": "full", "components": []})
    with pytest.raises(UserError, match="names none; tune with --methods precise,random"):
        changes(model, run)


def test_variants_go_by_their_method_not_by_their_place(model: Model, tmp_path: Path) -> None:
    """The first method lies in ``tuned/`` whatever it is; MLPs are no heads."""
    run = write(model, tmp_path, {".": 2.0, "random": 1.0})
    part, weight = columns(model)
    facts = {"method": "layers", "components": ["2.1", "mlp.3"]}
    save_delta(run / "tuned", model, {part: weight}, facts)
    found = changes(model, run, draws=50)["variants"]
    assert set(found) == {"layers", "random"}
