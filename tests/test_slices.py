"""Slices: the right rows and columns, nothing else moves, and every byte comes back."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.sites import intervene, record
from circuitune.slices import (
    Delta,
    Slice,
    SliceLinear,
    attached,
    head_slices,
    load_delta,
    merged,
    save_delta,
    tensor_digest,
    tensor_name,
    trainable,
)
from tests.conftest import tiny_hf

HEADS = [Head(2, 3), Head(1, 0), Head(2, 1)]
TOKENS = torch.tensor([[5, 80, 200, 31, 7, 99], [1, 2, 3, 4, 5, 6]])
FAMILIES = ["llama", "qwen2"]  # without and with a bias on the queries


def logits(model: Model) -> Tensor:
    """Logits of two fixed texts."""
    return model.hf(TOKENS).logits.detach()


def state(model: Model) -> dict[str, Tensor]:
    """A copy of every tensor of the state dict."""
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts agree in every byte."""
    return left.keys() == right.keys() and all(
        tensor_digest(left[name]) == tensor_digest(right[name]) for name in left
    )


def random_deltas(model: Model, parts: list[Slice], scale: float = 0.1) -> dict[Slice, Tensor]:
    """A random fp32 delta of the right shape for each slice."""
    generator = torch.Generator().manual_seed(0)
    weights = model.hf.state_dict()
    deltas = {}
    for part in parts:
        rows, cols = weights[tensor_name(model, part)].shape
        width = part.stop - part.start
        shape = (width, cols) if part.axis == "rows" else (rows, width)
        deltas[part] = scale * torch.randn(shape, generator=generator)
    return deltas


def as_delta(model: Model, deltas: dict[Slice, Tensor]) -> Delta:
    """The delta as it would be read from disk."""
    names = {tensor_name(model, part) for part in deltas}
    weights = model.hf.state_dict()
    facts = {"base": model.source, "touched": {n: tensor_digest(weights[n]) for n in names}}
    return Delta({part.key(model): value for part, value in deltas.items()}, facts)


@contextmanager
def with_values(model: Model, deltas: dict[Slice, Tensor]) -> Iterator[dict[Slice, Tensor]]:
    """Attach slices and fill them."""
    with attached(model, list(deltas)) as views:
        with torch.no_grad():
            for part, value in deltas.items():
                views[part].copy_(value)
        yield views


# ------------------------------------------------------------------------------ what a head owns


def test_names_and_places_of_slices(tiny: Callable[..., Model]) -> None:
    model = tiny()
    keys = [part.key(model) for part in head_slices(model, [Head(2, 3), Head(0, 1), Head(2, 3)])]
    assert keys == [
        "model.layers.0.self_attn.o_proj.weight#cols=8:16",
        "model.layers.0.self_attn.q_proj.weight#rows=8:16",
        "model.layers.2.self_attn.o_proj.weight#cols=24:32",
        "model.layers.2.self_attn.q_proj.weight#rows=24:32",
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head", [Head(1, 0), Head(2, 3)])
def test_removing_the_o_slice_is_removing_the_heads_output(
    tiny: Callable[..., Model], kv_heads: int, head: Head
) -> None:
    model = tiny("llama", num_key_value_heads=kv_heads)
    (part,) = (part for part in head_slices(model, [head]) if part.axis == "cols")
    weight = model.hf.state_dict()[tensor_name(model, part)]
    minus = {part: -weight[:, part.start : part.stop].clone()}
    base = logits(model)
    with intervene(model, {head: torch.zeros(1, model.d_head)}, where="all"):
        without_head = logits(model)
    with merged(model, as_delta(model, minus)):
        without_slice = logits(model)
    assert (without_slice - without_head).abs().max() < 1e-9
    assert (without_head - base).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head", [Head(1, 0), Head(2, 3)])
def test_removing_the_q_slice_lets_this_head_alone_look_everywhere(
    tiny: Callable[..., Model], kv_heads: int, head: Head
) -> None:
    """A query of zero attends evenly: z is the mean of the values of its key-value head."""
    model = tiny("llama", num_key_value_heads=kv_heads)
    (part,) = (part for part in head_slices(model, [head]) if part.axis == "rows")
    weight = model.hf.state_dict()[tensor_name(model, part)]
    minus = {part: -weight[part.start : part.stop].clone()}
    values: list[Tensor] = []
    projection = model.layer(head.layer).self_attn.v_proj
    handle = projection.register_forward_hook(lambda *arguments: values.append(arguments[-1]))
    with record(model) as base:
        logits(model)
    with merged(model, as_delta(model, minus)), record(model) as changed:
        logits(model)
    handle.remove()
    shape = (2, model.heads, model.d_head)
    before, after = (trace.z[head.layer].reshape(shape) for trace in (base, changed))
    others = [index for index in range(model.heads) if index != head.index]
    assert torch.equal(before[:, others], after[:, others])
    group = head.index // (model.heads // kv_heads)
    mean = values[-1].reshape(2, -1, kv_heads, model.d_head)[:, :, group].mean(dim=1)
    assert (after[:, head.index] - mean).abs().max() < 1e-9
    assert (after[:, head.index] - before[:, head.index]).abs().max() > 1e-3


def test_a_family_without_rows_for_queries_cannot_be_tuned(tiny: Callable[..., Model]) -> None:
    model = tiny()
    other = replace(model, family=replace(model.family, query=None))
    with pytest.raises(UserError, match="choose a model of another family to tune"):
        head_slices(other, HEADS)


# ------------------------------------------------------------------------------------- attached


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_deltas_change_nothing(tiny: Callable[..., Model], family: str) -> None:
    model = tiny(family)
    base = logits(model)
    with attached(model, head_slices(model, HEADS)) as views:
        assert torch.equal(logits(model), base)
        assert all(view.dtype == torch.float32 and not view.any() for view in views.values())


def modules(model: Model) -> dict[str, int]:
    """Every module of a model by name, and which object it is."""
    return {name: id(module) for name, module in model.hf.named_modules()}


def test_modules_come_back_also_after_an_exception(tiny: Callable[..., Model]) -> None:
    model = tiny()
    before, bytes_before = modules(model), state(model)
    with attached(model, head_slices(model, HEADS)):
        assert len(trainable(model)) == 4
        assert isinstance(model.layer(2).self_attn.q_proj, SliceLinear)
    assert modules(model) == before
    with pytest.raises(ZeroDivisionError), attached(model, head_slices(model, HEADS)):
        1 / 0  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_part"):
        attached(
            model, [*head_slices(model, HEADS), Slice(3, "no_such_part.x", "rows", 0, 1)]
        ).__enter__()
    assert modules(model) == before
    assert trainable(model) == []
    assert same(state(model), bytes_before)


@pytest.mark.parametrize("order", [1, -1])
def test_each_view_is_the_delta_of_its_own_slice(tiny: Callable[..., Model], order: int) -> None:
    """Heads of one layer share a parameter; the order of the slices must not matter."""
    model = tiny()
    parts = head_slices(model, HEADS)[::order]
    together = random_deltas(model, parts)
    for part in parts:
        alone = {part: together[part]}
        with with_values(model, {**{p: torch.zeros_like(v) for p, v in together.items()}, **alone}):
            found = logits(model)
        with merged(model, as_delta(model, alone)):
            assert (logits(model) - found).abs().max() < 1e-9


# --------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_attached_deltas_give_the_same_logits(
    tiny: Callable[..., Model], family: str, tmp_path: Path
) -> None:
    model = tiny(family)
    deltas = random_deltas(model, head_slices(model, HEADS))
    base = logits(model)
    with with_values(model, deltas):
        wanted = logits(model)
    save_delta(tmp_path, model, deltas, {"method": "precise"})
    with merged(model, load_delta(tmp_path)):
        found = logits(model)
    assert (found - wanted).abs().max() < 1e-9
    assert (found - base).abs().max() > 1e-2


def test_base_bytes_come_back_also_after_an_exception(tiny: Callable[..., Model]) -> None:
    model = tiny()
    before = state(model)
    delta = as_delta(model, random_deltas(model, head_slices(model, HEADS)))
    with merged(model, delta):
        assert not same(state(model), before)
    assert same(state(model), before)
    with pytest.raises(ZeroDivisionError), merged(model, delta):
        1 / 0  # noqa: B018
    assert same(state(model), before)
    wrong = dict(delta.tensors)
    wrong[max(wrong)] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        merged(model, Delta(wrong, delta.facts)).__enter__()
    assert same(state(model), before)


def test_half_precision_weights_are_rounded_once(tiny: Callable[..., Model]) -> None:
    model = tiny()
    model = replace(model, hf=model.hf.bfloat16())
    before = state(model)
    parts = head_slices(model, HEADS)
    deltas = random_deltas(model, parts)
    with merged(model, as_delta(model, deltas)):
        after = state(model)
    for part, value in deltas.items():
        name = tensor_name(model, part)
        place = slice(part.start, part.stop)
        old, new = (
            weights[name][place] if part.axis == "rows" else weights[name][:, place]
            for weights in (before, after)
        )
        assert torch.equal(new, (old.float() + value).bfloat16())
    assert same(state(model), before)


def test_a_delta_of_other_weights_is_refused(tiny: Callable[..., Model], tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_nothing_outside_the_slices(
    tiny: Callable[..., Model], tmp_path: Path, family: str
) -> None:
    """With momentum and weight decay, which leak through gradient masks."""
    model = tiny(family)
    before = state(model)
    parts = head_slices(model, HEADS)
    with attached(model, parts) as views:
        assert [p for p in model.hf.parameters() if p.requires_grad] == trainable(model)
        optimiser = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.3)
        losses = []
        for _ in range(6):
            predicted = model.hf(TOKENS).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(predicted, TOKENS[:, 1:].flatten())
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        deltas = {part: view.detach().clone() for part, view in views.items()}
    assert losses[-1] < losses[0]
    assert same(state(model), before)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    save_delta(tmp_path, model, deltas, {})
    with merged(model, load_delta(tmp_path)):
        after = state(model)
    outside = {name: torch.ones_like(value, dtype=torch.bool) for name, value in after.items()}
    for part in parts:
        name = tensor_name(model, part)
        place = slice(part.start, part.stop)
        index = (place,) if part.axis == "rows" else (slice(None), place)
        outside[name][index] = False
        assert (after[name][index] != before[name][index]).any()
    for name, mask in outside.items():
        assert torch.equal(after[name][mask], before[name][mask]), name


# -------------------------------------------------------------------------------------- on disk


def test_a_delta_survives_its_folder(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny()
    deltas = random_deltas(model, head_slices(model, HEADS))
    save_delta(tmp_path, model, deltas, {"method": "precise", "components": ["2.3"]})
    assert {path.name for path in tmp_path.iterdir()} == {"delta.safetensors", "components.json"}
    delta = load_delta(tmp_path)
    assert delta.tensors.keys() == {part.key(model) for part in deltas}
    for part, value in deltas.items():
        assert torch.equal(delta.tensors[part.key(model)], value)
    assert delta.facts["method"] == "precise"
    assert delta.facts["base"] == model.source
    assert delta.facts["d_head"] == model.d_head
    assert delta.facts["touched"].keys() == {key.split("#")[0] for key in delta.tensors}
    assert delta.lowest_layer == 1


def test_a_damaged_folder_is_refused(tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny()
    save_delta(tmp_path, model, random_deltas(model, head_slices(model, HEADS)), {})
    facts = json.loads((tmp_path / "components.json").read_text())
    weights = (tmp_path / "delta.safetensors").read_bytes()
    first = next(iter(facts["touched"]))
    fewer = {name: digest for name, digest in facts["touched"].items() if name != first}
    spoiled = [facts | {"touched": fewer}, {"base": "x"}, facts | {"base": None}, []]
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


def test_digests_see_bytes_not_values() -> None:
    zero = torch.zeros(3)
    assert tensor_digest(zero) == tensor_digest(torch.zeros(3))
    assert tensor_digest(zero) != tensor_digest(-zero)
    assert tensor_digest(torch.ones(4).bfloat16()) != tensor_digest(torch.ones(2))
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert tensor_digest(transposed) == tensor_digest(transposed.contiguous())
