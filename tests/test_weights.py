"""Weights from disk and in low precision give the effects of weights in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from torch import nn

from circuitune.chains import run_contrasts
from circuitune.config import TuneConfig
from circuitune.errors import UserError
from circuitune.models import Model, load, wrap
from circuitune.patching import direct_effects, end_states, noise_floor, pair_states
from circuitune.prompts import prefill, prefill_pairs
from circuitune.selftest import prove
from circuitune.tune import tune
from circuitune.weights import Shards, present, resident, widened
from tests.conftest import byte_tokenizer, tiny_hf
from tests.test_patching import CANDIDATES, prompts

FAMILIES = ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "olmo2"]


def effects(model: Model) -> np.ndarray:
    """Effects of all components on a few ragged pairs."""
    clean, corrupt = prompts(5, seed=1), prompts(5, seed=2)
    states = pair_states(model, prefill_pairs(model, clean, corrupt))
    answers = np.arange(5) % len(CANDIDATES)
    return direct_effects(model, *states, candidates=CANDIDATES, answers=answers).effect()


def saved(hf: nn.Module, folder: Path) -> Path:
    """A checkpoint folder."""
    hf.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_shards_hold_what_was_saved(tiny_folder: Path) -> None:
    shards = Shards.of(tiny_folder)
    weights = load(str(tiny_folder), device="cpu").hf.state_dict()
    assert set(shards) == set(weights) - {"lm_head.weight"} or set(shards) == set(weights)
    for name in shards:
        assert torch.equal(shards[name], weights[name]), name
    assert shards.numbers == sum(shards[name].numel() for name in shards)
    assert len(shards) == len(list(shards))


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_from_disk_equal_effects_in_memory(family: str, tmp_path: Path) -> None:
    folder = saved(tiny_hf(family), tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole = load(str(folder), device="cpu", dtype="float64")
    parts = load(str(folder), device="cpu", dtype="float64", max_memory="1K")
    assert parts.offloaded
    assert not whole.offloaded
    # Products round by where in memory a weight begins, on some processors in the last bit.
    np.testing.assert_allclose(effects(parts), effects(whole), rtol=0, atol=1e-13)


def test_rows_in_pieces_change_nothing(tiny: Callable[..., Model], monkeypatch) -> None:
    model = tiny("llama")
    whole = effects(model)
    monkeypatch.setattr("circuitune.patching.most_rows", lambda _: 45)  # of 20 senders, 5 pairs
    np.testing.assert_allclose(effects(model), whole, atol=1e-12, rtol=0)


def test_nothing_stays_in_memory(tiny_folder: Path) -> None:
    model = load(str(tiny_folder), device="cpu", max_memory="1K")
    layer = model.layer(1)
    effects(model)
    assert all(weight.device.type == "meta" for weight in layer.parameters())
    with resident(layer):
        layer.mlp(torch.zeros(1, 1, model.d_model))
        assert layer.mlp.up_proj.weight.device.type == "cpu"
        assert layer.self_attn.q_proj.weight.device.type == "meta"  # not used, not read
    assert all(weight.device.type == "meta" for weight in layer.parameters())
    with pytest.raises(TypeError), resident(layer):
        layer.mlp(None)
    with present(layer):
        assert all(weight.device.type == "cpu" for weight in layer.parameters())
    assert all(weight.device.type == "meta" for weight in layer.parameters())


def test_each_weight_is_read_once_per_pass(tiny_folder: Path, monkeypatch) -> None:
    model = load(str(tiny_folder), device="cpu", max_memory="1K")
    prefill(model, [[1, 2]])  # layer 0 is asked once how it returns its result
    reads: list[str] = []
    get = Shards.__getitem__

    def note(shards: Shards, name: str) -> torch.Tensor:
        reads.append(name)
        return get(shards, name)

    monkeypatch.setattr(Shards, "__getitem__", note)
    texts = prompts(7, seed=3, low=3, high=30)  # several batches
    done = prefill(model, texts)
    assert len(done.batches) > 1
    assert len(reads) == len(set(reads)) > 0
    reads.clear()
    states = end_states(model, done)
    assert len(reads) == len(set(reads)) > 0
    reads.clear()
    answers = np.zeros(7, dtype=int)
    direct_effects(model, states, states.averaged(), candidates=CANDIDATES, answers=answers)
    assert len(reads) == len(set(reads)) > 0


def test_a_model_dispatched_by_accelerate_works(tmp_path: Path) -> None:
    whole = wrap(tiny_hf("qwen2"), byte_tokenizer())
    expected = effects(whole)
    hf = tiny_hf("qwen2")
    parts = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    accelerate.dispatch_model(
        hf, rest | parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    model = wrap(hf, byte_tokenizer())
    assert model.offloaded
    assert np.array_equal(effects(model), expected)


def test_everything_may_be_offloaded_also_embeddings() -> None:
    hf = tiny_hf("llama")
    expected = effects(wrap(tiny_hf("llama"), byte_tokenizer()))
    accelerate.cpu_offload(hf, torch.device("cpu"))
    assert np.array_equal(effects(wrap(hf, byte_tokenizer())), expected)


class Int8Linear(nn.Module):
    """A projection with weights of 8 bits, as quantisation libraries make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        weight = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Dequantise and project."""
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale)


def quantised_and_plain() -> tuple[nn.Module, nn.Module]:
    """A model with projections of 8 bits, and a plain one with the rounded weights."""
    hf, plain = tiny_hf("llama"), tiny_hf("llama")
    names = [name for name, part in hf.named_modules() if isinstance(part, nn.Linear)]
    for name in names:
        if "layers" in name:
            parent, _, last = name.rpartition(".")
            quantised = Int8Linear(hf.get_submodule(name))
            setattr(hf.get_submodule(parent), last, quantised)
            rounded = quantised.weight.double() * quantised.scale
            plain.get_submodule(name).weight.data.copy_(rounded)
    return hf, plain


def test_quantised_layers_work() -> None:
    quantised, plain = (wrap(one, byte_tokenizer()) for one in quantised_and_plain())
    np.testing.assert_allclose(effects(quantised), effects(plain), atol=1e-9, rtol=0)


def test_a_quantised_model_is_measured_only_after_the_self_test() -> None:
    hf, _ = quantised_and_plain()
    hf.config.quantization_config = {"quant_method": "own"}
    model = wrap(hf, byte_tokenizer(), source="quantised")
    assert model.quantised
    assert not model.family.proven
    assert prove(model).passed


def test_quantised_and_offloaded_models_are_not_tuned(tiny_folder: Path, tmp_path: Path) -> None:
    model = load(str(tiny_folder), device="cpu", max_memory="1K")
    with pytest.raises(UserError, match="Tuning needs all weights in memory as plain numbers"):
        tune(model, TuneConfig(), tmp_path, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_weights_are_computed_in_float32(family: str) -> None:
    """Effects of a bfloat16 model are near those of float32 with the same values, in all replays.

    Keys and values before END are the model's own, in bfloat16, so the two differ by these.
    """
    low = wrap(tiny_hf(family).bfloat16(), byte_tokenizer())
    wide = wrap(tiny_hf(family).bfloat16().float(), byte_tokenizer())
    clean = prompts(5, seed=1)
    states = end_states(low, prefill(low, clean))
    assert states.entry.dtype == torch.float32
    floor = noise_floor(low, states, candidates=CANDIDATES, answers=np.zeros(5, dtype=int))
    strongest = np.abs(effects(wide)).max()
    assert floor["logit_diff"].max() < 1e-5 * max(1.0, strongest)
    assert np.abs(effects(low) - effects(wide)).max() < 0.1 * strongest


def test_widened_puts_the_weights_back() -> None:
    layer = nn.Linear(3, 2).bfloat16()
    before = layer.weight
    with widened(layer):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, before.float())
    assert layer.weight is before
    with pytest.raises(TypeError), widened(layer):
        layer(None)
    assert layer.weight is before


def header(folder: Path, entries: dict, data: bytes = b"") -> Path:
    """A safetensors file written by hand."""
    text = json.dumps(entries).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        ({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"shape": [1]}}, b""),
    ],
)
def test_damaged_shards_are_refused(tmp_path: Path, entries: dict, data: bytes) -> None:
    with pytest.raises(UserError, match="Every shard must be a whole safetensors file"):
        Shards.of(header(tmp_path, entries, data))


def test_shards_of_another_model_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header(tmp_path, {"strange.weight": entry}, b"1234")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    with pytest.raises(UserError, match="under their own names"):
        load(str(tmp_path), device="cpu", max_memory="1K")


def test_an_empty_folder_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none"):
        Shards.of(tmp_path)


def test_runs_at_every_position_need_room(tiny_folder: Path) -> None:
    """Who feeds the key heads is left out, with the reason, where the bound has no room for it."""
    model = load(str(tiny_folder), device="cpu", max_memory="1M")
    texts = prompts(3, seed=1)
    with pytest.raises(UserError, match="--max-memory must hold the runs at every position"):
        run_contrasts(model, texts, {"same": texts})
