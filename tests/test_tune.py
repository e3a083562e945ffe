"""The stage that tunes: every method on the same data, resumed where it was, or refused."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from circuitune import cli, methods, tune
from circuitune.config import TuneConfig
from circuitune.deltas import load_delta, merged, tuned_variants
from circuitune.errors import UserError
from circuitune.exercises import TEST_RESERVE, held_out_problems
from circuitune.models import Model, load
from circuitune.pairs import PairSet
from circuitune.prefix import TEXT_TOKENS
from circuitune.problems import Operator, Problem
from circuitune.rates import LEARNING_RATES, USUAL_SIZE, own_rate, weight_size
from circuitune.tune import (
    contamination,
    in_precision,
    lessons_for,
    loop_config,
    outlook,
    training_precision,
)
from circuitune.writing import Writing

FAMILIES = ["llama", "qwen2", "gpt2", "phi3", "gpt_neox", "gemma3_text"]
SMALL = TuneConfig(
    heads=2, steps=3, batch_size=4, learning_rate=1e-2, precision="float32", save_every=1
)


@pytest.fixture(scope="module")
def located(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a circuit and a graph."""
    top = tmp_path_factory.mktemp("located")
    lines = []
    for a in range(1, 5):
        for b in range(1, 5):
            pair = {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)}
            lines.append(json.dumps(pair | {"task": "add", "group": f"{a},{b}"}))
    (top / "own.jsonl").write_text("\n".join(lines))
    words = ["locate", tiny_folder, "--out", top / "run", "--pairs", top / "own.jsonl"]
    cli.app([str(word) for word in [*words, "--most", 4]], standalone_mode=False)
    return top / "run"


@pytest.fixture
def run(located: Path, tmp_path: Path) -> Path:
    """A copy of the run, for one test."""
    return Path(shutil.copytree(located, tmp_path / "run"))


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    return load(str(tiny_folder), device="cpu")


def tuned(model: Model, config: TuneConfig, run: Path, work: Path) -> dict:
    """Run the stage; what it says of itself."""
    work.mkdir()
    tune.tune(model, config, run, work)
    return json.loads((work / "tune.json").read_text())


def test_every_method_trains_on_the_same_data(model: Model, run: Path, tmp_path: Path) -> None:
    """Its delta reproduces its loss, the base is as it was, and only its places differ."""
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    names = tuple(methods.METHODS)
    content = tuned(model, replace(SMALL, methods=names, keep=1.0, mlps=1), run, tmp_path / "work")
    assert list(content["variants"]) == list(names)
    assert {facts["data"]["digest"] for facts in content["variants"].values()} == {
        content["data"]["digest"]
    }
    after = model.hf.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()
    shutil.copytree(tmp_path / "work" / "tuned", run / "tuned")
    deltas = tuned_variants(run)
    assert set(deltas) == set(names)
    for name, delta in deltas.items():
        with merged(model, delta):
            changed = {
                key
                for key, value in model.hf.state_dict().items()
                if not torch.equal(value, before[key])
            }
        assert changed, name
        assert changed <= delta.names | {"lm_head.weight"}, name
    counts = {name: facts["parameters"] for name, facts in content["variants"].items()}
    assert counts["precise"] == counts["random"]
    assert counts["precise"] < counts["layers"] < counts["full"] == model.parameters


def test_a_killed_stage_goes_on_where_it_was(
    model: Model, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained before is kept, and the result is that of a run in one piece."""
    whole = tuned(model, SMALL, run, tmp_path / "whole")
    for path in run.glob(".tune-parts-*"):
        shutil.rmtree(path)
    plain, trained = tune.save_variant, []

    def killed(model: Model, twin: Model, method: methods.Method, *rest: object) -> None:
        trained.append(method.name)
        if method.name == "random":
            raise KeyboardInterrupt
        plain(model, twin, method, *rest)

    monkeypatch.setattr(tune, "save_variant", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, SMALL, run, tmp_path / "killed")
    monkeypatch.setattr(
        tune, "save_variant", lambda *given: (trained.append("again"), plain(*given))
    )
    # Another number of threads, and a model writes another text; the first one must stay.
    monkeypatch.setattr(tune, "own_text", lambda *_, **__: [[5] * TEXT_TOKENS])
    again = tuned(model, SMALL, run, tmp_path / "again")
    assert trained == ["precise", "random", "again"]
    for folder in (Path("tuned"), Path("tuned/random")):
        first, second = (load_delta(tmp_path / name / folder) for name in ("whole", "again"))
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
    seconds = {"seconds", "tokens_per_second"}
    for name, facts in again["variants"].items():
        same = {key: value for key, value in facts.items() if key not in seconds}
        assert same == {k: v for k, v in whole["variants"][name].items() if k not in seconds}


def test_a_file_of_texts_and_replayed_plain_english(
    model: Model, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"{a} + {a} is ", "completion": str(a + a)} for a in range(1, 9)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = replace(SMALL, data=str(path), replay=0.5, methods=("precise",))
    content = tuned(model, config, run, tmp_path / "work")
    data = content["data"]
    assert (data["records"], data["replayed"], data["texts"]) == (8, 8, 16)
    assert data["source"] == str(path)
    assert (data["overlap"]["normalised"], data["overlap"]["problems"]) == (0, 0)
    assert "None of the 600 problems that evaluation may ask is among them." in data["said"]
    assert content["variants"]["precise"]["loss_first"] > 0


WRITING = Writing("Sum: ", spaced_answer=True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("12 + 30 =", "exact"),
        ("12 + 30", "exact"),
        ("12 + 30 = 42", "exact"),
        ("Sum: 12 + 30 =", "exact"),
        ("012+30=", "normalised"),
        ("SUM 12 + 30 =", "normalised"),
        ("7 \N{MULTIPLICATION SIGN} 8", "normalised"),
        ("What is 12 + 30?", None),
        ("7 x 8 = 56", "exact"),
        ("7*8=56", "normalised"),
        ("30 + 12 =", None),
        ("12 - 30 =", None),
        ("112 + 30 =", None),
        ("12 + 30 = 43", None),
    ],
)
def test_training_texts_that_are_held_out_problems(text: str, kind: str | None) -> None:
    held_out = [Problem(Operator.parse(o), a, b) for o, a, b in [("add", 12, 30), ("mul", 7, 8)]]
    facts, said = contamination(["How many?", text, "2 + 2 ="], held_out, WRITING)
    wanted = {"exact": 0, "normalised": 0, "contained": 0, "problems": 0, "held_out": 2}
    assert facts == wanted | ({kind: 1, "problems": 1} if kind else {})
    told = f"1 training texts (1 {kind}) are 1 of the 2" if kind else "None of the 2 problems"
    assert said.startswith(told)
    assert said.endswith(".")


def test_a_training_text_counts_once() -> None:
    """The same problem in two spellings, and twice in the data."""
    held_out = [Problem(Operator.parse("add"), 12, 30)] * 2
    facts, said = contamination(["12 + 30", "12+30=42", "12 + 30"], held_out, WRITING)
    assert (facts["exact"], facts["normalised"]) == (2, 1)
    assert (facts["problems"], facts["held_out"]) == (1, 1)
    assert said.startswith("3 training texts (2 exact, 1 normalised) are 1 of the 1 problems")


def test_data_that_evaluation_asks_are_announced(
    model: Model, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever of its problems the evaluation asks, tuning has told before."""
    asked = held_out_problems(PairSet.load(run), ("add", "sub", "mul"), digits=2, n=5, seed=0)
    rows = [{"prompt": f"{p.a}{p.operator.symbol}{p.b}=", "completion": "0"} for p in asked]
    rows += [{"prompt": "Two and two is ", "completion": "four"}] * 3
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = replace(SMALL, data=str(path), methods=("precise",))
    data = tuned(model, config, run, tmp_path / "work")["data"]
    assert data["overlap"] == {
        "exact": 0,
        "normalised": 5,
        "contained": 0,
        "problems": 5,
        "held_out": TEST_RESERVE,
    }
    warning = "5 training texts (5 normalised) are 5 of the 600 problems that evaluation may ask"
    assert warning in data["said"]
    assert data["said"] in capsys.readouterr().err
    assert load_delta(tmp_path / "work/tuned").facts["data"]["overlap"] == data["overlap"]


def test_watching_stops_at_the_budget(model: Model, run: Path, tmp_path: Path) -> None:
    """With a budget of almost nothing the first evaluated state passes it, and zero is kept."""
    config = replace(
        SMALL, methods=("precise",), steps=6, evaluate_every=2, forget_budget=1e-12, keep=0.0
    )
    facts = tuned(model, config, run, tmp_path / "work")["variants"]["precise"]
    assert (facts["stopped"], facts["kept_step"], facts["steps"]) == ("budget", 0, 2)
    assert facts["evaluations"][0]["kl"] > 1e-12
    assert all(not value.any() for value in load_delta(tmp_path / "work/tuned").tensors.values())


def test_the_outlook_tells_data_mask_and_cost(model: Model, run: Path) -> None:
    lines = [str(line) for line in outlook(model, replace(SMALL, methods=("precise", "full")), run)]
    assert lines[0] == "Generated arithmetic."
    text = "\n".join(lines)
    assert "precise" in text
    assert "full" in text
    assert text.count("learning rate: ") == 2
    assert text.count("components: ") == 1  # heads of the one, all of the other
    assert not list(run.glob(".tune-*"))


def test_keys_and_values_name_the_heads_that_share_them(
    model: Model, run: Path, tmp_path: Path
) -> None:
    content = tuned(model, replace(SMALL, form="qkvo", heads=1), run, tmp_path / "work")
    (head,) = content["variants"]["precise"]["components"]
    layer, index = map(int, head.split("."))
    assert content["variants"]["precise"]["collateral"] == [f"{layer}.{index ^ 1}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("precise", "best")}, "--methods must be some of precise, random"),
        ({"methods": ("full", "full")}, "each once, found full, full"),
        ({"replay": 1.0}, "--replay must be below 1"),
        ({"forget_budget": 0.1}, "need evaluations while training"),
        ({"patience": 2}, "give a number of steps"),
        ({"heads": 99}, "--heads must be at most 16"),
        ({"pick": "best"}, "--pick must be one of direct"),
        ({"form": "q"}, "--form must be qo or qkvo"),
        ({"precision": "int8"}, "precision must be"),
        ({"batch_size": 4, "accumulate": 3}, "A batch must fall into equal pieces"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"learning_rate": 1e30, "weight_decay": 0.1}, "lower the learning rate"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(
    options: dict, message: str, model: Model, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tuned(model, replace(SMALL, **options), run, tmp_path / "work")
    assert str(caught.value).count(". ") == 0
    assert not (tmp_path / "work" / "tune.json").exists()


def test_each_method_has_a_learning_rate_of_its_own(model: Model) -> None:
    assert set(LEARNING_RATES) == set(methods.METHODS)
    own = loop_config(model, replace(SMALL, learning_rate=0.0), "full").learning_rate
    assert own == own_rate(model, "full") < own_rate(model, "precise")
    assert loop_config(model, SMALL, "full").learning_rate == SMALL.learning_rate


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_rates_go_with_the_size_of_the_weights(
    tiny: Callable[..., Model], family: str
) -> None:
    """Weights four times as large: rates four times as large; embeddings do not matter."""
    model = deepcopy(tiny(family, **({"pad_token_id": 0} if family == "phi3" else {})))
    size, rate = weight_size(model), own_rate(model, "precise")
    assert rate == pytest.approx(LEARNING_RATES["precise"] * size / USUAL_SIZE, rel=0.05)
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            inside = name.startswith(model.family.layers) and weight.ndim > 1
            weight *= 4 if inside else 9
    assert weight_size(model) == pytest.approx(4 * size, rel=1e-6)
    assert own_rate(model, "precise") == pytest.approx(4 * rate, rel=0.1)


def test_precision(tiny: Callable[..., Model]) -> None:
    assert training_precision(tiny(), "float32") is torch.float32
    twin = in_precision(tiny(), torch.bfloat16)
    assert twin.dtype is torch.bfloat16
    assert tiny().dtype is torch.float64


def test_a_copy_in_another_precision_is_never_whole_in_the_first(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are cast one by one, tied ones once; buffers keep their precision."""
    model = tiny("gemma3_text")
    copied = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: pytest.fail("a whole copy"))
    twin = in_precision(model, torch.bfloat16)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    assert {p.dtype for p in twin.hf.parameters()} == {torch.bfloat16}
    assert len(list(twin.hf.parameters())) == len(list(model.hf.parameters()))
    kept = dict(model.hf.named_buffers())
    assert kept.keys() == dict(twin.hf.named_buffers()).keys()
    assert all(torch.equal(value, kept[name]) for name, value in twin.hf.named_buffers())


def test_tuning_on_another_gpu_than_the_first_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "device", property(lambda _: torch.device("cuda:1")))
    with pytest.raises(UserError, match="set CUDA_VISIBLE_DEVICES=1 and start with"):
        tune._check(model, SMALL)


def test_texts_do_not_depend_on_the_method(model: Model, run: Path) -> None:
    pair_set = PairSet.load(run)
    first, second = (
        lessons_for(model, pair_set, replace(SMALL, methods=(name,))) for name in ("full", "lora")
    )
    assert first == second
    watched = lessons_for(model, pair_set, replace(SMALL, evaluate_every=1))
    assert watched.watch
    assert not first.watch
