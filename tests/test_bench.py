"""The benchmark's own parts: prompts of exact length, peers that agree with the sweep, counts."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from tests.conftest import byte_tokenizer

BENCH = Path(__file__).parents[1] / "bench"


def by_path(name: str) -> ModuleType:
    """A module of the benchmark, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods = by_path("methods")
bench = by_path("sweep")

# In bytes: header "Math:\n" 6, question "3 + 5 = " 8, a solved sum 10, " sums" in the header 5.
LENGTHS = (14, 19, 44)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmax round to float32; here they keep float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)


# ------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("shared", [False, True])
def test_prompts_have_the_length_and_differ_in_the_operator(tokens: int, shared: bool) -> None:
    tokenizer = byte_tokenizer()
    task = bench.make_task(tokenizer, tokens, 8, shared=shared)
    assert len(task.clean) == len(task.corrupt) == 8
    assert len(task.candidates) == 10
    for clean, corrupt, answer in zip(task.clean, task.corrupt, task.answers, strict=True):
        assert len(clean) == len(corrupt) == tokens
        changed = [i for i in range(tokens) if clean[i] != corrupt[i]]
        assert changed == [tokens - 6]
        question = tokenizer.decode(clean)[-8:]
        assert question[2] == "+"
        assert tokenizer.decode(corrupt)[-6] == "@"
        digit = tokenizer.decode([task.candidates[answer]])
        assert int(question[0]) + int(question[4]) == int(digit)


def test_solved_sums_are_shared_or_each_prompts_own() -> None:
    tokenizer = byte_tokenizer()
    contexts = {
        shared: {
            tokenizer.decode(prompt)[:-8]
            for prompt in bench.make_task(tokenizer, 44, 8, shared=shared).clean
        }
        for shared in (False, True)
    }
    assert len(contexts[True]) == 1
    assert len(contexts[False]) == 8
    for context in contexts[True] | contexts[False]:
        header, *lines, end = context.split("\n")
        assert (header, len(lines), end) == ("Math:", 3, "")
        assert all(eval(line.replace("=", "==")) for line in lines)


def test_the_same_seed_gives_the_same_prompts() -> None:
    one, same, other = (
        bench.make_task(byte_tokenizer(), 44, 8, shared=False, seed=seed).clean
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(("tokens", "pairs"), [(13, 8), (15, 8), (44, 1), (44, 37)])
def test_what_cannot_be_had_is_refused(tokens: int, pairs: int) -> None:
    with pytest.raises(UserError):
        bench.make_task(byte_tokenizer(), tokens, pairs, shared=True)


def test_without_solved_sums_there_is_one_text() -> None:
    options = bench.parse(["--tokens", "14", "44", "--pairs", "4"])
    found = [where for where, _ in bench.conditions(byte_tokenizer(), options)]
    assert [(item["tokens"], item["text"]) for item in found] == [
        (14, "sum alone"),
        (44, "own text"),
        (44, "shared prefix"),
    ]


# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("peer", ["hooked forward", "hooked, END only"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("exact")
def test_peers_measure_the_same_effects(
    tiny: Callable[..., Model], peer: str, shared: bool
) -> None:
    model = tiny("llama")
    task = bench.make_task(model.tokenizer, 34, 5, shared=shared)
    heads = methods.all_heads(model)
    exact = methods.ours(model, task)
    swept = methods.sweep(methods.PEERS[peer](model), model, task, heads)
    assert exact.table.components == swept.table.components == tuple(heads)
    assert len(swept.each) == len(heads) == 16
    difference = swept.table.effect() - exact.table.effect()
    assert np.abs(difference).max() < 1e-9
    assert np.abs(exact.table.effect()).min(axis=1).max() > 1e-2
    assert set(exact.phases) == {"prefill", "end", "replay"}


@pytest.mark.usefixtures("exact")
def test_a_screen_leaves_exact_effects(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    task = bench.make_task(model.tokenizer, 24, 5, shared=False)
    some = methods.screened(model, task, 6)
    assert some.table.components == some.order[:6]
    assert set(some.order) == set(methods.all_heads(model))
    exact = methods.ours(model, task).table.select(some.table.components)
    assert np.abs(some.table.effect() - exact.effect()).max() < 1e-9


def test_operations_equal_a_count_by_hand(tiny: Callable[..., Model]) -> None:
    mlp = 24 * 40 + 24 * 40 + 40 * 24  # gate, up, down
    out = 4 * 8 * 24
    per_example = 0
    for sender_layer in range(4):
        for _head in range(4):
            per_example += out
            for _layer in range(sender_layer, 4):
                per_example += mlp
    assert methods.replay_flop(tiny("llama"), 3) == 3 * 2 * per_example


def test_a_sample_of_heads_is_spread_over_the_layers() -> None:
    heads = [Head(layer, index) for layer in range(30) for index in range(9)]
    some = methods.spread(heads, 27, seed=0)
    assert [heads.index(head) // 10 for head in some] == list(range(27))
    assert some == methods.spread(heads, 27, seed=0)
    assert some != methods.spread(heads, 27, seed=1)
    assert methods.spread(heads, 1000, seed=0) == heads


# --------------------------------------------------------------------------------- measurement


def test_time_of_all_heads_from_some() -> None:
    record = bench._total(2.0, [1.0, 2.0, 3.0], 30, seed=0)
    assert record["seconds"] == pytest.approx(2 + 30 * 2)
    assert record["scaled"]
    assert 2 + 30 * 1 <= record["low"] < record["seconds"] < record["high"] <= 2 + 30 * 3
    whole = bench._total(2.0, [1.0, 2.0, 3.0], 3, seed=0)
    assert whole["seconds"] == pytest.approx(8.0)
    assert not whole["scaled"]
    assert "low" not in whole


def test_records_of_every_method(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = bench.make_task(byte_tokenizer(), 24, 4, shared=False)
    job = bench.Job(str(tiny_folder), task, repeats=2, peer_heads=4, screen=16, seed=0)
    names = [*bench.OWN, "hooked forward", "hooked, END only"]
    measured = [bench.measure(name, job) for name in names]
    where = {"tokens": 24, "text": "own text"}
    runs = [where | bench.compare(item, measured[0]) for item in measured]
    json.dumps(runs)
    assert [run["method"] for run in runs] == names
    assert [run["scaled"] for run in runs] == [False, False, True, True]
    assert runs[0]["ratio"] == 1.0
    assert runs[0]["replay_gflop"] == methods.replay_flop(bench.load(str(tiny_folder)), 4) / 1e9
    assert 0 < runs[0]["share_of_gemm"] < 1
    assert runs[1]["same_top"]
    assert runs[1]["top_found"] == 13 <= runs[1]["heads_needed"] <= 16
    for run in runs[1:]:
        assert run["largest_mean_difference"] <= run["largest_difference"] < 1e-3
    bench.Console(width=100).print(bench.table_of(runs), *bench.notes(runs), sep="\n")
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)


def test_different_effects_are_seen(tiny_folder: Path) -> None:
    """The comparison must fail where the prompts are others."""
    tasks = [bench.make_task(byte_tokenizer(), 24, 4, shared=False, seed=seed) for seed in (0, 1)]
    one, other = (
        bench.measure("circuitune", bench.Job(str(tiny_folder), task, 1, 4, 4, 0)) for task in tasks
    )
    assert bench.compare(other, one)["largest_mean_difference"] > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_steps_of_tuning_cost_less_with_the_cache_and_lose_the_same() -> None:
    """Our rows and the peers' train on a tiny model, and report what the table needs."""
    from circuitune.models import wrap
    from tests.conftest import tiny_hf

    tune = by_path("tune")
    model = wrap(tiny_hf("llama").float(), byte_tokenizer())
    texts = tune.examples(model, "sums", 12)
    cached, anew = (
        tune.ours(model, texts, ["2.0", "3.1"], 4, 3, cached) for cached in (True, False)
    )
    assert cached["losses"] == pytest.approx(anew["losses"], abs=1e-6)
    assert cached["flops"] < anew["flops"]
    assert len(cached["seconds"]) == 2
    count, tensors = model.parameters, len(list(model.hf.parameters()))  # before LoRA adds its own
    full, lora = (tune.peer(model, texts, row, 4, 3) for row in ("full", "lora"))
    assert full["trained"] == count
    assert full["optimizer_bytes"] == 8 * count + 4 * tensors
    assert cached["flops"] < full["flops"] < lora["flops"]  # rank 16 is much for a width of 24
    rows = {"full": full, "lora": lora, "precise": cached}
    rounds = [
        {name: row | {"step_seconds": seconds, "peak_mib": 1} for name, row in rows.items()}
        for seconds in (1.0, 2.0)
    ]
    table = tune.table(rounds)
    assert table["precise"]["faster_than_full_rounds"] == [1.0, 1.0]
    assert table["precise"]["fewer_flops_than_lora"] > table["precise"]["fewer_flops_than_full"] > 1
    assert table["full"]["state_share_of_full"] == 1


def test_the_scores_beside_lm_evals_own_are_those_written() -> None:
    """Every task with 100 questions or three articles, no difference, and the factors in words."""
    found = json.loads((BENCH / "evaluate.json").read_text(encoding="utf-8"))["tasks"]
    asked = {task: row["ours"]["beside_hflm-1"] for task, row in found.items()}
    assert {task for task, row in asked.items() if row["documents"] >= 100} == {
        *("svamp", "gsm8k", "commonsense_qa", "mmlu", "bbh")
    }
    assert asked["wikitext"]["documents"] == 3
    for row in asked.values():
        assert row["outcomes_that_differ"] == row["answers_that_differ"] == 0
        assert row["largest_difference_of_scores"] == 0
    order = ("svamp", "gsm8k", "commonsense_qa", "mmlu", "bbh", "wikitext")
    factors = [found[task]["ours"]["faster_than_hflm-1"]["cpu_seconds"] for task in order]
    words = [f"{factor:.1f}" for factor in factors]
    page = (BENCH.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"takes {', '.join(words[:-1])} and {words[-1]} times as long" in " ".join(page.split())
