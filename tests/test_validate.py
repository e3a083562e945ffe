"""Knockouts equal plain hooks, the criteria equal what was planted, files say what they hold."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from circuitune import cli
from circuitune.components import Circuit, Head
from circuitune.config import ValidateConfig
from circuitune.controls import PER_SPLIT, Control
from circuitune.criteria import Sampler, draw_subsets, interval_json, judge
from circuitune.effects import EffectTable, measure
from circuitune.errors import UserError
from circuitune.knockout import (
    ABLATIONS,
    PLACES,
    Spare,
    draw_donors,
    knock_out,
    measurable,
    prepare_spare,
)
from circuitune.models import Model
from circuitune.pairs import Encoded, Pair
from circuitune.patching import pair_states
from circuitune.prompts import prefill_pairs
from circuitune.ranks import WHOLE
from circuitune.selection import RULES
from circuitune.stats import Interval
from circuitune.tasks import Task, averaged, prepare, sweep
from circuitune.validate import (
    FURTHER_DRAWS,
    control_circuit,
    further,
    least_important,
    matched_heads,
    own_size,
)
from tests.planted import CARRIERS, D_HEAD, Planted, build
from tests.reference.slow_knockout import head_outputs, logits_without

EVERY = tuple(Head(layer, index) for layer in range(4) for index in range(4))
HEADS = (Head(1, 0), Head(1, 3), Head(2, 2), Head(3, 1))
DOCUMENTED = [
    *("set", "k", "draw", "ablation", "where", "task", "accuracy", "n", "low", "high"),
    *("change", "change_low", "change_high"),
    *("logit_diff", "logit_diff_low", "logit_diff_high", "kl", "kl_low", "kl_high"),
    *("source", "data", "heads"),
]


def test_matched_heads_are_as_many_and_others() -> None:
    """Layer by layer where that can be, from the nearest layers where a layer has too few."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = matched_heads(HEADS, 4, 4, rng)
        assert [head.layer for head in drawn] == [1, 1, 2, 3]
        assert not {*drawn} & {*HEADS}
        crowded = (Head(2, 0), Head(2, 1), Head(2, 2), Head(0, 0))
        drawn = matched_heads(crowded, 4, 4, rng)
        assert len({*drawn} - {*crowded}) == len(crowded)
        found = [head.layer for head in drawn]
        assert found[0] == 0
        assert found.count(2) == 1
        assert found.count(1) + found.count(3) == 2
        rest = matched_heads(EVERY[3:], 4, 4, rng)
        assert rest == EVERY[:3]


def sums() -> list[Pair]:
    """Pairs of several lengths; one prompt of 11 tokens has no donor of its length."""
    operands = [(a, b) for a in range(1, 5) for b in range(2, 5)] + [(10, 1), (12, 3), (100, 4)]
    return [
        Pair(f"{a} + {b} = ", f"{a} @ {b} = ", str((a + b) % 10), "add", "", "test", f"{a},{b}")
        for a, b in operands
    ]


FAMILIES = {
    "llama": {},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 5,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny: Callable[..., Model]) -> Model:
    """A tiny model of two families, one with windows shorter than the prompts and post-norms."""
    return tiny(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def task(model: Model) -> Task:
    """Fifteen pairs on it."""
    return prepare(model, sums())


@pytest.fixture(scope="module")
def spare(model: Model, task: Task) -> Spare:
    """Donors, and outputs of the heads everywhere."""
    return prepare_spare(model, task, HEADS, np.random.default_rng(3))


# ------------------------------------------------------------------------ against plain hooks


def replacement(
    model: Model, task: Task, spare: Spare, ablation: str, where: str
) -> Callable[[int, Head], torch.Tensor]:
    """What a head gets in one example, from one slow pass per corrupt prompt."""
    passed = [head_outputs(model, tokens) for tokens in task.pairs.corrupt]

    def at(example: int, head: Head) -> torch.Tensor:
        width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
        return passed[example][head.layer][-1 if where == "end" else slice(None), width]

    def value(example: int, head: Head) -> torch.Tensor:
        if ablation == "zero":
            return torch.zeros(model.d_head, dtype=torch.float64)
        if ablation == "resample":
            return at(int(spare.donors[example]), head)
        every = [at(other, head).reshape(-1, model.d_head) for other in range(len(passed))]
        return torch.cat(every).mean(dim=0)

    return value


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_equal_plain_hooks(
    model: Model, task: Task, spare: Spare, ablation: str, where: str
) -> None:
    found = knock_out(model, task, HEADS, ablation=ablation, where=where, spare=spare)
    examples = measurable(task, spare, ablation, where)
    alone = ablation == "resample" and where == "all"
    assert len(examples) == len(task.pairs.answers) - (1 if alone else 0)
    value = replacement(model, task, spare, ablation, where)
    positions = slice(-1, None) if where == "end" else slice(None)
    for row, example in enumerate(examples):
        tokens = task.pairs.clean[example]
        given = {head: value(example, head) for head in HEADS}
        logits = logits_without(model, tokens, given, positions)
        choice = logits[list(task.pairs.candidates)].numpy()[None]
        expected = measure(choice, task.pairs.answers[[example]])["logit_diff"][0]
        assert found.logit_diff[row] == pytest.approx(expected, abs=1e-9)
        assert found.correct[row] == (int(logits.argmax()) == task.tokens[example])
        # The divergence from its definition, in the order intact, ablated.
        intact = logits_without(model, tokens, {}, positions).numpy()
        p, q = (np.exp(x - x.max()) for x in (intact, logits.numpy()))
        p, q = p / p.sum(), q / q.sum()
        assert found.kl[row] == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-9)
    assert found.kl.min() > 1e-6


def test_nothing_ablated_is_the_intact_model(model: Model, task: Task) -> None:
    found = knock_out(model, task, ())
    logits = [logits_without(model, tokens, {}, slice(None)) for tokens in task.pairs.clean]
    assert found.correct.tolist() == [
        int(row.argmax()) == token for row, token in zip(logits, task.tokens, strict=True)
    ]
    assert np.abs(found.kl).max() < 1e-12


def test_what_an_ablation_needs_is_asked_for(model: Model, task: Task) -> None:
    for how in ({"ablation": "resample"}, {"where": "all"}):
        with pytest.raises(ValueError, match="needs a spare"):
            knock_out(model, task, HEADS, **how)


# ---------------------------------------------------------------------------------- resampling


def test_donors_are_seeded_and_never_the_same_prompt() -> None:
    prompts = [[1, 2], [1, 3], [1, 2], [1, 4, 5], [7]]
    drawn = [draw_donors(prompts, np.random.default_rng(seed)).tolist() for seed in range(40)]
    assert drawn[0] == draw_donors(prompts, np.random.default_rng(0)).tolist()
    assert len({tuple(donors) for donors in drawn}) > 1
    for donors in drawn:
        assert all(prompts[donor] != prompts[place] for place, donor in enumerate(donors))
        assert donors[0] == 1  # the only other one of its length; [1, 2] again is the same
        assert donors[1] in (0, 2)
    assert {donors[3] for donors in drawn} == {0, 1, 2, 4}  # none of its length: any other


def test_prompts_that_are_all_the_same_have_no_donor(tiny: Callable[..., Model]) -> None:
    assert draw_donors([[1, 2]] * 3, np.random.default_rng(0)).tolist() == [-1] * 3
    pairs = [Pair(f"{a} = ", "# = ", str(a), "own", "", "test", str(a)) for a in range(3)]
    model = tiny("llama")
    task = prepare(model, pairs)
    spare = prepare_spare(model, task, HEADS, np.random.default_rng(0))
    assert measurable(task, spare, "resample", "end") == []
    assert measurable(task, spare, "mean", "all") == [0, 1, 2]


# ------------------------------------------------------------------------------- what was planted


def planted_task(planted: Planted) -> Task:
    """The planted prompts as a task; each pair is its own group."""
    groups = [str(number) for number in range(len(planted.answers))]
    encoded = Encoded(planted.clean, planted.corrupt, CARRIERS, planted.answers, groups)
    both = prefill_pairs(planted.model, planted.clean, planted.corrupt)
    clean, corrupt = pair_states(planted.model, both)
    prompts = both.first(len(planted.clean))
    return Task(encoded, WHOLE, prompts, clean, corrupt, averaged(corrupt, WHOLE))


def planted_difference(planted: Planted, ablated: set[Head]) -> np.ndarray:
    """Logit differences from the weights by hand: the model is a sum over its heads."""
    model = planted.model
    embedding = model.hf.get_input_embeddings().weight.detach().numpy()
    unembedding = model.hf.get_output_embeddings().weight.detach().numpy()[: len(CARRIERS)]
    logits = np.zeros((len(planted.answers), len(CARRIERS)))
    for layer in range(model.layers):
        attention = model.layer(layer).self_attn
        value, out = (part.weight.detach().numpy() for part in (attention.v_proj, attention.o_proj))
        for index in range(model.heads):
            rows = slice(index * D_HEAD, (index + 1) * D_HEAD)
            map_ = unembedding @ out[:, rows] @ value[rows]
            clean, corrupt = (
                np.stack([embedding[tokens].mean(axis=0) for tokens in prompts]) @ map_.T
                for prompts in (planted.clean, planted.corrupt)
            )
            logits += corrupt.mean(axis=0) if Head(layer, index) in ablated else clean
    return measure(logits, planted.answers)["logit_diff"]


@pytest.mark.parametrize("seed", range(4))
def test_criteria_are_those_of_the_planted_weights(seed: int) -> None:
    planted = build(seed)
    task, circuit = planted_task(planted), planted.heads
    everything = {Head(layer, index) for layer in range(2) for index in range(4)}
    found = judge(planted.model, task, circuit, seed=seed)

    def mean(ablated: set[Head]) -> float:
        return float(planted_difference(planted, ablated).mean())

    close = {"abs": 1e-6}
    whole = mean(set())
    assert found["clean"]["estimate"] == pytest.approx(whole, **close)
    faithful = found["faithfulness"]
    alone = mean(everything - set(circuit))
    floor = found["corrupt"]["estimate"]
    assert faithful["circuit"]["logit_diff"]["estimate"] == pytest.approx(alone, **close)
    share = (alone - floor) / (whole - floor)
    assert faithful["circuit"]["share"]["estimate"] == pytest.approx(share, **close)
    assert faithful["nothing"]["logit_diff"]["estimate"] == pytest.approx(mean(everything), **close)
    # The working heads do it all, nothing else does any of it.
    assert faithful["circuit"]["share"]["estimate"] > 0.9
    assert faithful["nothing"]["share"]["high"] < 0.2
    names = {str(head): head for head in circuit}
    subsets = found["completeness"]["subsets"]
    assert sorted(len(item["removed"]) for item in subsets) == [1, 1, 2]
    for item in subsets:
        removed = {names[name] for name in item["removed"]}
        kept = mean(everything - (set(circuit) - removed))
        assert item["circuit"] == pytest.approx(kept, **close)
        assert item["model"] == pytest.approx(mean(removed), **close)
        assert item["difference"]["estimate"] == pytest.approx(kept - mean(removed), **close)
    for item in found["minimality"]:
        head = names[item["id"]]
        change = mean(everything - set(circuit) | {head}) - alone
        assert item["from_circuit"]["estimate"] == pytest.approx(change, **close)
        change = mean(set(circuit)) - mean(set(circuit) - {head})
        assert item["from_model"]["estimate"] == pytest.approx(change, **close)
        assert item["from_circuit"]["high"] < 0
        assert item["from_model"]["high"] < 0


@pytest.mark.parametrize("seed", range(4))
def test_a_circuit_without_its_backup_is_incomplete(seed: int) -> None:
    """One working head alone: take it away, and the model still has the other one."""
    planted = build(seed)
    task = planted_task(planted)
    whole = judge(planted.model, task, planted.heads)["completeness"]["mean_absolute_difference"]
    half = judge(planted.model, task, planted.heads[:1])["completeness"]
    (only,) = half["subsets"]
    assert only["difference"]["high"] < 0
    assert half["mean_absolute_difference"]["low"] > whole["high"]


def test_a_head_that_does_nothing_is_not_minimal() -> None:
    planted = build(1)
    idle = next(h for h in (Head(0, i) for i in range(4)) if h not in planted.heads)
    found = judge(planted.model, planted_task(planted), [*planted.heads, idle])["minimality"]
    changes = {item["id"]: item["from_circuit"]["estimate"] for item in found}
    assert all(3 * abs(changes[str(idle)]) < -changes[str(head)] for head in planted.heads)


def test_subsets_are_different_seeded_and_not_empty() -> None:
    heads = [Head(0, index) for index in range(6)]
    drawn = draw_subsets(heads, 10, np.random.default_rng(0))
    assert len(set(drawn)) == 10
    assert all(drawn)
    assert drawn == draw_subsets(heads, 10, np.random.default_rng(0))
    assert drawn != draw_subsets(heads, 10, np.random.default_rng(1))
    assert len(set(draw_subsets(heads[:3], 10, np.random.default_rng(0)))) == 7


def test_a_share_needs_a_scale() -> None:
    sampler = Sampler([str(n) for n in range(8)], 0)
    part = np.linspace(1, 2, 8)
    exact = sampler.share(part, 2 * part)
    assert (exact.estimate, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    assert sampler.share(part, part - part.mean()) is None
    assert interval_json(None) is None
    unknown = interval_json(Interval(1.0, -np.inf, np.inf, 3))
    assert unknown == {"estimate": 1.0, "low": None, "high": None, "n": 3}


# -------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on own pairs, located and validated."""
    top = tmp_path_factory.mktemp("validated")
    lines = [
        {"clean": p.clean, "corrupt": p.corrupt, "answer": p.answer, "task": "add"} for p in sums()
    ]
    (top / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    locate = f"locate {tiny_folder} --out {top / 'run'} --pairs {top / 'own.jsonl'}"
    for words in (f"{locate} --most 3 --draws 100", f"validate {top / 'run'} --sizes 1,3"):
        cli.app(words.split(), standalone_mode=False)
    return top / "run"


def test_rows_have_the_documented_columns(run: Path) -> None:
    table = pd.read_parquet(run / "knockout.parquet")
    assert list(table.columns) == DOCUMENTED
    own = Circuit.from_json(json.loads((run / "circuit.json").read_text())).size or 1
    further = table[(table["ablation"] != "mean") | (table["where"] != "end")]
    assert set(further["k"]) == {own}
    assert set(zip(further["ablation"], further["where"], strict=True)) == {
        (ablation, where) for ablation in ABLATIONS for where in PLACES
    } - {("mean", "end")}
    draws = further[further["set"] == "matched"].groupby(["ablation", "where"]).size()
    assert (draws == FURTHER_DRAWS).all()
    curves = table.drop(further.index)
    assert set(curves["set"]) == {"top", "single_pass", "matched", "random", "least"}
    assert set(curves["k"]) == {0, 1, 3, own}
    for low, value, high in (
        ("low", "accuracy", "high"),
        ("logit_diff_low", "logit_diff", "logit_diff_high"),
        ("kl_low", "kl", "kl_high"),
    ):
        assert (table[low] <= table[value] + 1e-12).all()
        assert (table[value] <= table[high] + 1e-12).all()
    assert (table.query("k == 0")["kl"].abs() < 1e-9).all()
    assert (table.query("ablation == 'zero'")["data"] == "").all()
    assert set(table.query("ablation != 'zero'")["data"]) == {
        "the corrupt prompts of add, test half"
    }


def test_controls_hold_no_head_of_the_circuit(run: Path) -> None:
    table = pd.read_parquet(run / "knockout.parquet")
    tops = table.query("set == 'top' and k > 0").drop_duplicates("k").set_index("k")["heads"]
    controls = table[table["set"].isin(["matched", "random", "least"])]
    assert len(controls)
    for _, row in controls.iterrows():
        assert not set(row["heads"].split()) & set(tops[row["k"]].split())
    effects = pd.read_parquet(run / "effects.parquet").query("metric == 'logit_diff'")
    heads = effects[~effects["component"].str.startswith("mlp")]
    size = heads["effect"].abs().groupby(heads["component"]).mean().drop(tops[3].split())
    least = controls.query("set == 'least' and k == 3 and where == 'end' and ablation == 'mean'")
    assert set(least["heads"].item().split()) == set(size.nsmallest(3).index)


def test_dropped_controls_are_stated(run: Path) -> None:
    content = json.loads((run / "validate.json").read_text())
    facts = {item["task"]: item for item in content["controls"]}
    assert set(facts) == {"copy_number", "copy_word", "capital"}
    assert facts["copy_number"]["tried"] == facts["copy_number"]["one_token"] == 4 * PER_SPLIT
    assert facts["copy_word"]["one_token"] == 0  # one token per byte
    assert not any(item["kept"] for item in facts.values())


def test_the_judgement_is_on_the_circuit_and_the_test_half(run: Path) -> None:
    content = json.loads((run / "validate.json").read_text())
    circuit = Circuit.from_json(json.loads((run / "circuit.json").read_text()))
    size = own_size(circuit, ValidateConfig(sizes=(1, 3)))
    assert content["heads"] == [str(head) for head in circuit.heads[:size]]
    assert content["pairs"] == 7
    assert content["ablation"] == "mean over the corrupt prompts of add, test half, at END"


def test_a_control_has_its_own_circuit_by_the_same_rule(tiny: Callable[..., Model]) -> None:
    """Screening holds all sixteen heads here, so the exact rule finds the same."""
    model = tiny("llama")
    pairs = tuple(Pair(**vars(pair) | {"split": "select"}) for pair in sums())
    control = Control("copy", pairs, {})
    task = prepare(model, pairs)
    single = {"name": RULES["single"], "metric": "logit_diff"}
    order = [part for part in sweep(model, task).rank() if isinstance(part, Head)]
    assert control_circuit(model, control, (), single, 3) == tuple(order[:3])
    iterated = control_circuit(model, control, (), {"name": RULES["iterated"]}, 3)
    first = sweep(model, task, corrupt=task.average).rank()
    assert iterated[0] == next(part for part in first if isinstance(part, Head))
    after = sweep(model, task, ablated=iterated[:1], corrupt=task.average).rank()
    assert iterated[1] == next(part for part in after if isinstance(part, Head))


def test_least_important_is_by_size_not_by_mean() -> None:
    parts = (Head(0, 0), Head(0, 1), Head(0, 2))
    values = np.array([[3.0, -3.0], [1.0, 1.0], [-2.0, -2.0]])
    table = EffectTable(parts, {"logit_diff": np.zeros(2)}, {"logit_diff": values})
    assert least_important(table) == (Head(0, 1), Head(0, 2), Head(0, 0))


def test_unknown_ablations_and_places_are_refused() -> None:
    for options, says in (
        ({"ablations": ("median",)}, "--ablations must be among mean, zero, resample, found 'med"),
        ({"where": ("middle",)}, "--where must be among end, all, found 'middle'"),
    ):
        with pytest.raises(UserError, match=says):
            further(ValidateConfig(**options))
    assert further(ValidateConfig(ablations=("mean",), where=("end",))) == []
    assert further(ValidateConfig(ablations=("zero",))) == [("zero", "end"), ("zero", "all")]
