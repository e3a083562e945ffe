"""What heads and MLPs do: against hand computations, plain hooks, and a model with known parts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from circuitune import cli, neurons, readout
from circuitune.attention import eager, look, vote
from circuitune.components import Choice, Circuit, Head, Mlp
from circuitune.config import ExplainConfig
from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.explain import explain, layer_finals
from circuitune.graph import trace
from circuitune.models import Model, load
from circuitune.pairs import Pair, PairSet
from circuitune.patching import finish, unembed
from circuitune.roles import find_contrasts
from circuitune.tasks import prepare, sweep
from tests.reference.slow_attention import slow_attention
from tests.reference.slow_neurons import passed
from tests.test_families import CAPS, GRANITE, WINDOWS
from tests.test_graph import CARRIES_OPERAND, CARRIES_PLUS, KEY, _planted, own_pairs, planted_pairs

DIGITS = [str(digit) for digit in range(10)]
FAST = ExplainConfig(draws=200, neurons=3, mlps=2, prompts=24)
WHOLE = replace(FAST, prompts=30)
NARROW = WINDOWS | {"num_hidden_layers": 3}
TABLES = ("attention", "readout", "mlps", "lens", "neurons")


def make_run(
    model: Model, pairs: Sequence[Pair], heads: Sequence[Head], folder: Path, *, graph: bool = False
) -> Path:
    """A run directory with what the stage reads, heads given."""
    pair_set = PairSet(tuple(pairs), {"admissible": DIGITS})
    pair_set.save(folder)
    name = pair_set.tasks[0]
    task = prepare(model, pair_set.of(name, "select"), DIGITS)
    sweep(model, task).to_frame().to_parquet(folder / "effects.parquet")
    choices = tuple(Choice(head, -1.0, -2.0, -0.5) for head in heads)
    record = Circuit(choices, name, model.source, size=len(heads)).to_json()
    values = pd.DataFrame()
    if graph:
        found = trace(model, pairs, heads, answers=DIGITS, rng=np.random.default_rng(0), draws=200)
        record["graph"], values = found.to_json(), found.values
    values.to_parquet(folder / "paths.parquet")
    (folder / "circuit.json").write_text(json.dumps(record))
    return folder


def explained(
    model: Model, run: Path, config: ExplainConfig = FAST
) -> tuple[dict[str, pd.DataFrame], dict[str, object]]:
    """Tables and summary of the stage."""
    explain(model, config, run, run)
    folder = run / "explain"
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
    return tables, json.loads((folder / "explain.json").read_text())


# ---------------------------------------------------------------------------- a planted model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, pd.DataFrame], dict]:
    """The planted model of test_graph, explained."""
    model = _planted()
    run = make_run(
        model,
        planted_pairs(),
        [CARRIES_OPERAND, CARRIES_PLUS, KEY],
        tmp_path_factory.mktemp("planted"),
        graph=True,
    )
    return explained(model, run)


def test_the_planted_heads_get_their_labels(planted: tuple[dict, dict]) -> None:
    heads = {head["id"]: head for head in planted[1]["heads"]}
    assert heads["0.1"]["label"] == "operand"
    assert heads["0.2"]["label"] == "operator"
    assert heads["1.0"]["label"] == "other"  # it looks at END, where the others have written
    assert all(heads[name]["confidence"] > 0.99 for name in ("0.1", "0.2", "1.0"))
    assert heads["0.1"]["attention"]["operand 1"] > 0.7
    # What they bring they bring to another head; the answer gets it from the key head alone.
    assert heads["0.1"]["effect_label"] == heads["0.2"]["effect_label"] == "other"
    assert heads["1.0"]["effect_label"] in ("operand", "operator")
    assert heads["1.0"]["brings"] == ["operand 1", "operator"]


def test_the_planted_key_head_writes_the_answer(planted: tuple[dict, dict]) -> None:
    table = planted[0]["readout"].set_index(["component", "run", "token"])["mean"]
    assert table["1.0", "clean", "answer"] > 3
    assert table["1.0", "difference", "answer"] > 1
    assert abs(table["1.0", "clean", "other"]) < 0.1 * table["1.0", "clean", "answer"]
    assert abs(table["0.2", "clean", "answer"]) < 1e-6
    (key,) = [head for head in planted[1]["heads"] if head["id"] == "1.0"]
    assert set(key["writes"][:3]) <= set(DIGITS)


def test_the_planted_answer_rises_in_the_last_layer(planted: tuple[dict, dict]) -> None:
    tables, summary = planted
    lens = tables["lens"].set_index(["layer", "after", "token"])
    assert lens.loc[(1, "mlp", "answer"), "rank"] == 1
    assert lens.loc[(0, "mlp", "answer"), "probability"] < 0.1
    assert lens.loc[(1, "mlp", "answer"), "probability"] > 0.5
    assert {name: summary["rise"][name]["layer"] for name in ("start", "inflection", "end")} == {
        "start": 1,
        "inflection": 1,
        "end": 1,
    }
    effects = tables["mlps"].query("measure == 'effect'")["mean"]
    assert effects.tolist() == [0, 0]  # its MLPs write nothing


# -------------------------------------------------------------------------------- attention


def prompts_of(model: Model) -> tuple:
    """Roles of a user's own prompts of different lengths."""
    pairs = [
        replace(pair, clean="x" * (n % 3) + pair.clean, corrupt="x" * (n % 3) + pair.corrupt)
        for n, pair in enumerate(own_pairs(9, 5))
    ]
    return find_contrasts(model.tokenizer, pairs, rng=np.random.default_rng(0)).prompts


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma2", NARROW | CAPS),
        ("gemma3_text", NARROW | {"num_key_value_heads": 1}),
    ],
)
def test_attention_equals_a_hand_computation(
    tiny: Callable[..., Model], family: str, options: dict[str, object]
) -> None:
    model = tiny(family, **options)
    prompts = prompts_of(model)
    looks = look(model, prompts)
    np.testing.assert_allclose(looks.weights.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(looks.uniform.sum(axis=-1), 1)
    for example, prompt in enumerate(prompts):
        weights = slow_attention(model, prompt.tokens).numpy()
        for column, role in enumerate(looks.roles):
            places = [p for p in prompt.roles.get(role, [0]) if (p == 0) == (role == "start")]
            np.testing.assert_allclose(
                looks.weights[:, :, example, column],
                weights[..., places].sum(axis=-1),
                atol=1e-6,  # the kernels take the softmax in float32
            )


def test_the_kernel_is_put_back(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    before = model.hf.config._attn_implementation
    with eager(model):
        assert model.hf.config._attn_implementation == "eager"
    assert model.hf.config._attn_implementation == before
    with pytest.raises(IndexError), eager(model):
        model.layer(99)
    assert model.hf.config._attn_implementation == before != "eager"


def test_a_label_does_not_depend_on_the_order_of_the_examples() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([f"g{n % 7}" for n in range(30)])
    columns = {"one": rng.normal(0.1, 1, 30), "two": rng.normal(0, 1, 30)}
    order = rng.permutation(30)
    first = vote(columns, groups.tolist(), rng=np.random.default_rng(1))
    moved = {name: values[order] for name, values in columns.items()}
    again = vote(moved, groups[order].tolist(), rng=np.random.default_rng(1))
    assert first == again
    assert 0.2 < first.confidence < 0.999
    clear = vote({"a": columns["one"] + 9, "b": columns["two"]}, groups.tolist(), rng=rng)
    assert (clear.name, clear.confidence) == ("a", 1.0)
    merged = vote(columns, groups.tolist(), rng=rng, kinds={"one": "both", "two": "both"})
    assert (merged.name, merged.confidence) == ("both", 1.0)


# ------------------------------------------------------------------- contributions and the lens


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gemma2", {}),
        ("gemma3_text", NARROW),
        ("olmo2", {"pad_token_id": 0}),
        ("granite", GRANITE),
        ("gpt2", {}),
        ("gpt_neox", {}),
    ],
)
def test_contributions_sum_to_the_logits(
    tiny: Callable[..., Model], family: str, options: dict[str, object]
) -> None:
    """Embedding, all heads, the bias of W_O, all MLPs, and the bias of the final norm."""
    model = tiny(family, **options)
    states = prepare(model, own_pairs(6, 6)).clean
    tokens = list(range(40, 60))
    stream = readout.stream(model, states)
    close = 1e-9 if family.startswith("gpt") else 1e-6  # RMSNorm takes its scale in float32
    norm = readout.final_norm(model, states, stream.after[-1])
    total = readout.contributions(model, norm, states.entry[0], tokens)
    for layer in range(model.layers):
        heads = sum(
            readout.head_writes(model, states, Head(layer, index)) for index in range(model.heads)
        )
        out = model.part(layer, model.family.out)
        if out.bias is None:
            torch.testing.assert_close(heads, stream.attention[layer], atol=close, rtol=0)
        else:
            bias = readout.added(model, states, layer, attention=out.bias.expand_as(heads))
            torch.testing.assert_close(heads + bias, stream.attention[layer], atol=close, rtol=0)
            heads = heads + bias
        total = total + readout.contributions(model, norm, heads, tokens)
        total = total + readout.contributions(model, norm, stream.mlp[layer], tokens)
    rows = model.hf.get_output_embeddings().weight[tokens]
    bias = finish(model, torch.zeros_like(states.entry[0])) @ rows.T
    torch.testing.assert_close(total + bias, states.final @ rows.T, atol=close, rtol=0)
    if family == "llama":
        logits = unembed(model, states.final, tokens)
        torch.testing.assert_close(total, logits, atol=close, rtol=0)


def test_a_norm_inside_the_stream_is_refused(tiny: Callable[..., Model]) -> None:
    model = tiny("opt", do_layer_norm_before=False)
    states = prepare(model, own_pairs(6, 6)).clean
    with pytest.raises(UserError, match=r"pass it through a norm; .*\."):
        readout.stream(model, states)


def test_what_is_no_norm_is_refused() -> None:
    states = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(UserError, match="something else"):
        readout.freeze(torch.tanh, states)
    assert readout.freeze(lambda values: 3 * values, states).scale == pytest.approx([1] * 4)
    for width in (7, 8):
        norm = torch.nn.LayerNorm(width).double()
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        values = torch.randn(4, width, dtype=torch.float64)
        frozen = readout.freeze(norm, values)
        assert frozen.centred
        torch.testing.assert_close(frozen(values) + norm.bias, norm(values))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_lens_ends_in_the_models_own_choice(tiny: Callable[..., Model], family: str) -> None:
    model = tiny(family)
    task = prepare(model, own_pairs(8, 5))
    asked = np.stack([task.tokens, task.tokens + 1], axis=1)
    lens = readout.lens(model, layer_finals(model, task.clean), asked)
    for example, tokens in enumerate(task.pairs.clean):
        logits = model.hf(torch.tensor([tokens])).logits[0, -1].double()
        chances = logits.softmax(dim=0)
        for column, token in enumerate(asked[example]):
            assert lens.probability[-1, example, column] == pytest.approx(
                float(chances[token]), abs=1e-9
            )
            rank = 1 + int((logits > logits[token]).sum())
            assert lens.rank[-1, example, column] == rank


# ---------------------------------------------------------------------------------- neurons


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_neurons_equal_plain_hooks(tiny: Callable[..., Model], family: str) -> None:
    model, layer = tiny(family), 1
    task = prepare(model, own_pairs(5, 5))
    chosen = [0, 7, 31]
    effects = neurons.neuron_effects(model, task, layer, chosen)
    assert np.abs(effects).max() > 1e-3
    down = neurons.down_projection(model, layer)
    candidates = list(task.pairs.candidates)
    for example, (clean, corrupt) in enumerate(
        zip(task.pairs.clean, task.pairs.corrupt, strict=True)
    ):
        before, z, _ = passed(model, clean, layer, down)
        other = passed(model, corrupt, layer, down)[2]
        for row, neuron in enumerate(chosen):
            after = passed(model, clean, layer, down, z, (neuron, float(other[neuron])))[0]
            values = [
                measure(logits[None, candidates].double().numpy(), task.answers[[example]])
                for logits in (before, after)
            ]
            expected = values[1]["logit_diff"][0] - values[0]["logit_diff"][0]
            assert effects[row, example] == pytest.approx(expected, abs=1e-9)


def test_the_estimate_of_all_neurons_is_the_slope_along_the_change(
    tiny: Callable[..., Model],
) -> None:
    """Summed over neurons it is that of the whole MLP; here by a small step instead."""
    model, layer, step = tiny("llama"), 2, 1e-3
    task = prepare(model, own_pairs(6, 6))
    clean, corrupt = task.clean, task.corrupt
    moved = replace(corrupt, mlp=torch.lerp(clean.mlp, corrupt.mlp, step))
    small = sweep(model, task, senders=[Mlp(layer)], corrupt=moved).mean()[0] / step
    assert neurons.screen(model, task, layer).sum() == pytest.approx(small, rel=1e-2)


# ---------------------------------------------------------------------------------- the stage


def test_own_pairs_have_no_operands(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny("llama")
    run = make_run(model, own_pairs(60, 11), [Head(3, 1), Head(1, 2)], tmp_path)
    tables, summary = explained(model, run)
    assert summary["notes"] == {}
    assert set(tables["lens"]["token"]) == {"answer"}
    assert set(tables["readout"]["token"]) == {"answer", "other"}
    sums = tables["attention"].groupby("component")["mean"].sum()
    assert sums.to_numpy() == pytest.approx(1)
    assert set(tables["attention"]["role"]) == {"start", "before", "changed", "after", "end"}
    assert set(tables["attention"]["component"]) == {
        "3.1",
        "1.2",
        "layer 1",
        "layer 3",
        "all heads",
    }
    assert {head["label"] for head in summary["heads"]} <= {"changed", "other"}
    assert len(tables["neurons"]) == 2 * 3
    assert len(summary["example"]["layers"]) == model.layers
    for table in tables.values():
        low, high = (
            c for c in table.columns if c in ("low", "rank_low") or c in ("high", "rank_high")
        )
        assert (table[low] <= table[high]).all()


def test_the_stage_repeats_bit_for_bit(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny("llama")
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = make_run(model, own_pairs(60, 11), [Head(3, 1)], tmp_path / name)
        found.append(explained(model, run))
    for name in TABLES:
        pd.testing.assert_frame_equal(found[0][0][name], found[1][0][name])
    assert found[0][1] == found[1][1]


def test_effects_of_mlps_are_those_of_the_held_out_half(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model, pairs = tiny("llama"), own_pairs(60, 11)
    tables, summary = explained(model, make_run(model, pairs, [Head(3, 1)], tmp_path), WHOLE)
    task = prepare(model, [pair for pair in pairs if pair.split == "test"], DIGITS)
    assert summary["pairs"] == len(task.pairs.clean) == 30
    found = tables["mlps"].query("measure == 'effect'")["mean"].to_numpy()
    expected = sweep(model, task, senders=[Mlp(layer) for layer in range(model.layers)]).mean()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "options", "part", "text"),
    [
        (
            "mixtral",
            {"experts_implementation": "eager", "num_local_experts": 4, "num_experts_per_tok": 2},
            "neurons",
            "one down projection",
        ),
        ("opt", {"do_layer_norm_before": False}, "readout", "pass it through a norm"),
    ],
)
def test_what_a_model_does_not_allow_is_a_note(
    tiny: Callable[..., Model],
    tmp_path: Path,
    family: str,
    options: dict[str, object],
    part: str,
    text: str,
) -> None:
    model = tiny(family, **options)
    tables, summary = explained(model, make_run(model, own_pairs(60, 11), [Head(3, 1)], tmp_path))
    assert text in summary["notes"][part]
    assert len(tables[part]) == 0
    assert len(tables["lens"]) > 0
    assert len(tables["attention"]) > 0


def test_prompts_of_unequal_lengths_have_no_roles(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny("llama")
    pairs = [replace(pair, corrupt=pair.corrupt + "?") for pair in own_pairs(60, 11)]
    tables, summary = explained(model, make_run(model, pairs, [Head(3, 1)], tmp_path))
    assert "another length" in summary["notes"]["attention"]
    assert len(tables["attention"]) == 0
    assert len(tables["readout"]) > 0


def test_offloaded_weights_give_the_same_but_for_neurons(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = own_pairs(60, 11)
    found = []
    for name, bound in (("whole", None), ("parts", "1K")):
        model = load(str(tiny_folder), device="cpu", dtype="float64", max_memory=bound)
        (tmp_path / name).mkdir()
        run = make_run(model, pairs, [Head(3, 1)], tmp_path / name)
        found.append(explained(model, run))
    assert "offloaded" in found[1][1]["notes"]["neurons"]
    for name in ("attention", "readout", "mlps", "lens"):
        pd.testing.assert_frame_equal(found[0][0][name], found[1][0][name], atol=1e-9)


def test_a_circuit_without_heads_is_refused(tiny: Callable[..., Model], tmp_path: Path) -> None:
    run = make_run(tiny("llama"), own_pairs(60, 11), [], tmp_path)
    with pytest.raises(UserError, match="at least one key head"):
        explain(tiny("llama"), FAST, run, run)


def test_no_held_out_pairs_are_refused(tiny: Callable[..., Model], tmp_path: Path) -> None:
    pairs = [replace(pair, split="select") for pair in own_pairs(60, 11)]
    run = make_run(tiny("llama"), pairs, [Head(3, 1)], tmp_path)
    with pytest.raises(UserError, match="in the test half, found none"):
        explain(tiny("llama"), FAST, run, run)


def test_a_run_without_a_circuit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = {"model": {"id": "nowhere"}, "load": {}, "config": {}, "stages": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "selection.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["circuitune", "explain", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "needs effects.parquet" in capsys.readouterr().err
