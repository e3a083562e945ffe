"""Deltas: the folder is whole or refused, sums are rounded once, every base byte comes back."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuitune import deltas as deltas_module
from circuitune.components import Head, Mlp
from circuitune.deltas import (
    Delta,
    load_delta,
    merged,
    save_delta,
    save_tensors,
    tensor_digest,
)
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.slices import Slice, head_slices, mlp_slices, tensor_name
from tests.conftest import tiny_hf
from tests.test_families import make
from tests.test_slices import as_delta, logits, random_deltas, same, state, with_values

HEADS = [Head(2, 3), Head(1, 0), Head(2, 1)]
Q = "model.layers.1.self_attn.q_proj.weight"
Tiny = Callable[..., Model]


def parts_of(model: Model) -> list[Slice]:
    """Slices of three heads and a whole MLP."""
    return [*head_slices(model, HEADS, "qkvo"), *mlp_slices(model, [Mlp(2)])]


# --------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2", "falcon, new", "opt", "mixtral"])
def test_merged_and_attached_deltas_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model = make(case)
    deltas = random_deltas(model, parts_of(model))
    base = logits(model)
    with with_values(model, deltas):
        wanted = logits(model)
    save_delta(tmp_path, model, deltas, {"method": "precise"})
    with merged(model, load_delta(tmp_path)):
        found = logits(model)
    # Some norms round to float32, and a router's choice must not hang on that.
    assert (found - wanted).abs().max() < 1e-6
    assert (found - base).abs().max() > 1e-2


def test_base_bytes_come_back_also_after_an_exception(tiny: Tiny) -> None:
    model = tiny()
    before = state(model)
    delta = as_delta(model, random_deltas(model, parts_of(model)))
    with merged(model, delta):
        assert not same(state(model), before)
    assert same(state(model), before)
    with pytest.raises(ZeroDivisionError), merged(model, delta):
        1 / 0  # noqa: B018
    assert same(state(model), before)
    wrong = dict(delta.tensors)
    wrong[max(wrong)] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"must have the shape of its place, \(8, 24\) in"):
        merged(model, Delta(wrong, delta.facts)).__enter__()
    assert same(state(model), before)


def test_tied_weights_change_together(tiny: Tiny) -> None:
    model = tiny("gpt2")
    part = Slice(-1, "transformer.wte", "all")
    with merged(model, as_delta(model, random_deltas(model, [part]))):
        assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
        changed = logits(model)
    assert (changed - logits(model)).abs().max() > 1e-2


def test_a_delta_of_other_weights_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    save_delta(tmp_path, model, random_deltas(model, head_slices(model, HEADS)), {})
    delta = load_delta(tmp_path)
    other = replace(model, hf=tiny_hf("llama", seed=1), source="another model")
    shallow = tiny("llama", num_hidden_layers=2)
    for wrong in (other, shallow):
        before = state(wrong)
        with pytest.raises(UserError, match="differs from tiny llama; load that model"):
            merged(wrong, delta).__enter__()
        assert same(state(wrong), before)


def cast(model: Model, dtype: torch.dtype) -> Model:
    """A copy of a model in another type."""
    return replace(model, hf=copy.deepcopy(model.hf).to(dtype))


@pytest.mark.parametrize(
    ("stored", "trained", "loaded", "accepted"),
    [
        (torch.float32, torch.float32, torch.bfloat16, False),  # it was rounded since
        (torch.float32, torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float32, torch.bfloat16, True),  # widened: nothing was lost
        (torch.bfloat16, torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float16, torch.bfloat16, False),
        (torch.float16, torch.float32, torch.float16, True),
    ],
)
def test_a_base_in_another_type(
    tiny: Tiny,
    tmp_path: Path,
    stored: torch.dtype,
    trained: torch.dtype,
    loaded: torch.dtype,
    accepted: bool,
) -> None:
    """A delta goes with the same weights, where it can be seen that they are the same."""
    base = cast(tiny(), stored)
    first, second = cast(base, trained), cast(base, loaded)
    deltas = random_deltas(first, head_slices(first, HEADS))
    save_delta(tmp_path, first, deltas, {})
    delta = load_delta(tmp_path)
    before = state(second)
    if accepted:
        with merged(second, delta):
            for part, value in deltas.items():
                name, place = tensor_name(second, part), part.place(second)
                wanted = (before[name][place].float() + value).to(loaded)
                assert torch.equal(state(second)[name][place], wanted)
    else:
        names = [str(kind).removeprefix("torch.") for kind in (loaded, trained)]
        says = f"is rounded to {names[0]} here and was {names[1]} in tiny llama, .* load the model"
        with pytest.raises(UserError, match=says):
            merged(second, delta).__enter__()
    assert same(state(second), before)
    for other in (trained, torch.float64):
        wrong = cast(replace(base, hf=tiny_hf("llama", seed=1)), other)
        with pytest.raises(UserError, match="differs from tiny llama; load that model"):
            merged(wrong, delta).__enter__()


# ---------------------------------------------------------------------------------------- added


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_half_precision_weights_are_rounded_once(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    model = replace(model, hf=model.hf.bfloat16())
    before = state(model)
    deltas = random_deltas(model, parts_of(model))
    with merged(model, as_delta(model, deltas)):
        after = state(model)
    twice = 0
    for part, value in deltas.items():
        name, place = tensor_name(model, part), part.place(model)
        old, new = before[name][place], after[name][place]
        assert torch.equal(new, (old.float() + value).bfloat16())
        twice += int((new != old + value.bfloat16()).sum())
    assert twice > 0, "rounding twice would not have been seen"
    assert same(state(model), before)


def test_slices_that_overlap_are_summed_before_the_cast() -> None:
    base = torch.full((4, 6), 1.0, dtype=torch.bfloat16)
    less = 2.0**-9  # half of what the base can hold next to one: alone it is lost
    tensors = {f"{Q}#rows=1:3": torch.full((2, 6), less), f"{Q}#cols=2:4": torch.full((4, 2), less)}
    delta = Delta(tensors, {})
    wanted = torch.ones(4, 6)
    wanted[1:3, 2:4] += 2.0**-8
    assert torch.equal(delta.added(Q, base), wanted.bfloat16())
    both = {
        f"{Q}#rows=1:3": torch.full((2, 6), 3 * less),
        f"{Q}#cols=2:4": tensors[f"{Q}#cols=2:4"],
    }
    assert float(Delta(both, {}).added(Q, base)[1, 2]) == 1 + 4 * less
    assert delta.places(Q) == [(slice(None), slice(2, 4)), (slice(1, 3),)]
    assert delta.places("another") == []
    assert torch.equal(delta.added("another", base), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_outside_the_places_are_the_bases(dtype: torch.dtype) -> None:
    """Also those that a sum with zero would change: -0.0, and the bits of a NaN."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    base[0], base[5] = -0.0, float("nan")
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    base.view(bits)[5, 3] += 5
    kept = base.clone()
    delta = Delta({f"{Q}#rows=2:4": torch.ones(2, 8)}, {})
    found = delta.added(Q, base)
    assert tensor_digest(base) == tensor_digest(kept)
    outside = [0, 1, 4, 5]
    assert torch.equal(found.view(bits)[outside], base.view(bits)[outside])
    assert not torch.equal(found[2:4], base[2:4])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_factors_are_added_as_they_act(tiny: Tiny, family: str, tmp_path: Path) -> None:
    """Adding B A x to the output: of a matrix stored transposed, also where it is square."""
    model = tiny(family)
    path = {"llama": "self_attn.q_proj", "gpt2": "attn.c_proj"}[family]
    module, name = model.part(1, path), f"{model.family.layers}.1.{path}.weight"
    generator = torch.Generator().manual_seed(0)
    inputs = model.part(1, path).weight.shape[0 if family == "gpt2" else 1]
    a, b = (torch.randn(shape, generator=generator) for shape in ((3, inputs), (32, 3)))
    save_tensors(tmp_path, model, {f"{name}#lora_A": a, f"{name}#lora_B": b}, {"method": "lora"})
    delta = load_delta(tmp_path)
    assert delta.names == {name}
    assert delta.places(name) == [()]
    x = torch.randn(5, inputs, generator=generator).double()
    wanted = module(x) + x @ a.T.double() @ b.T.double()
    with merged(model, delta):
        assert (module(x) - wanted).abs().max() < 1e-4  # the product is taken in float32
    assert (module(x) - wanted).abs().max() > 1


# -------------------------------------------------------------------------------------- on disk


def test_a_delta_survives_its_folder(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    deltas = random_deltas(model, parts_of(model))
    save_delta(tmp_path, model, deltas, {"method": "precise", "components": ["2.3"]})
    assert {path.name for path in tmp_path.iterdir()} == {"delta.safetensors", "components.json"}
    delta = load_delta(tmp_path)
    assert delta.tensors.keys() == {part.key(model) for part in deltas}
    for part, value in deltas.items():
        assert torch.equal(delta.tensors[part.key(model)], value)
        assert delta.places(tensor_name(model, part)).count(part.place(model)) == 1
    assert delta.facts["method"] == "precise"
    assert delta.facts["base"] == model.source
    assert delta.facts["d_head"] == model.d_head
    assert delta.facts["touched"].keys() == delta.names
    assert delta.names == {key.split("#")[0] for key in delta.tensors}
    assert delta.lowest_layer == 1


def test_nothing_is_below_a_tensor_outside_the_layers() -> None:
    tensors = {f"{Q}#all": torch.zeros(2, 2)}
    assert Delta(tensors, {}).lowest_layer == 1
    assert Delta({**tensors, "model.embed.weight#all": torch.zeros(2)}, {}).lowest_layer == -1


def test_a_damaged_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    save_delta(tmp_path, model, random_deltas(model, head_slices(model, HEADS)), {})
    facts = json.loads((tmp_path / "components.json").read_text())
    weights = (tmp_path / "delta.safetensors").read_bytes()
    first = next(iter(facts["touched"]))
    fewer = {name: digest for name, digest in facts["touched"].items() if name != first}
    lists = facts | {"touched": list(facts["touched"])}
    spoiled = [facts | {"touched": fewer}, {"base": "x"}, facts | {"base": None}, [], lists]
    for content in spoiled:
        (tmp_path / "components.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="run `circuitune tune` first"):
            load_delta(tmp_path)
    (tmp_path / "components.json").write_text(json.dumps(facts))
    assert load_delta(tmp_path).facts == facts
    for content in (weights[:40], weights[:-4], b""):
        (tmp_path / "delta.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="run `circuitune tune` first"):
            load_delta(tmp_path)
    (tmp_path / "delta.safetensors").unlink()
    with pytest.raises(UserError, match=r"must hold delta\.safetensors and components\.json"):
        load_delta(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{Q}#rows=8:16": torch.zeros(7, 24)},
        {f"{Q}#rows=8:8": torch.zeros(0, 24)},
        {f"{Q}#cols=8:16": torch.zeros(8)},
        {f"{Q}#rows=8:16": torch.zeros(8, 24, dtype=torch.int32)},
        {f"{Q}#rows=8": torch.zeros(8, 24)},
        {f"{Q}#some": torch.zeros(8, 24)},
        {Q: torch.zeros(8, 24)},
        {f"{Q}#lora_A": torch.zeros(2, 24)},
        {f"{Q}#lora_A": torch.zeros(2, 24), f"{Q}#lora_B": torch.zeros(32, 3)},
        {f"{Q}#lora_A": torch.zeros(24), f"{Q}#lora_B": torch.zeros(32, 24)},
    ],
)
def test_tensors_that_cannot_be_what_they_are_called_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    deltas_module.save_file(tensors, tmp_path / "delta.safetensors")
    facts = {"base": "x", "touched": {Q: ""}}
    (tmp_path / "components.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="run `circuitune tune` first"):
        load_delta(tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "write_json"])
def test_a_write_that_stops_leaves_no_wrong_delta(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The tensors of one training never stand beside the record of another."""
    model = tiny()
    parts = head_slices(model, HEADS)
    save_delta(tmp_path, model, random_deltas(model, parts), {"method": "old"})
    own = getattr(deltas_module, failing)

    def fail(content: object, path: object) -> None:
        if failing == "save_file":
            own(content, path)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(deltas_module, failing, fail)
        with pytest.raises(UserError, match=r"that failed \(no space left\); free some room"):
            save_delta(tmp_path, model, random_deltas(model, parts, 0.5), {"method": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["delta.safetensors"]
    with pytest.raises(UserError, match="run `circuitune tune` first"):
        load_delta(tmp_path)
    save_delta(tmp_path, model, random_deltas(model, parts, 0.5), {"method": "new"})
    assert load_delta(tmp_path).facts["method"] == "new"
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # who may read the record may read the tensors


def test_digests_see_bytes_not_values() -> None:
    zero = torch.zeros(3)
    assert tensor_digest(zero) == tensor_digest(torch.zeros(3))
    assert tensor_digest(zero) != tensor_digest(-zero)
    assert tensor_digest(torch.ones(4).bfloat16()) != tensor_digest(torch.ones(2))
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert tensor_digest(transposed) == tensor_digest(transposed.contiguous())
    assert tensor_digest(torch.tensor(1.0)) == tensor_digest(torch.ones(1))
