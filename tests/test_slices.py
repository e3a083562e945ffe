"""Slices: the right numbers of each architecture, nothing else moves, everything comes back."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from circuitune.components import Head, Mlp
from circuitune.deltas import Delta, merged, tensor_digest
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.sites import intervene, record
from circuitune.slices import (
    Form,
    Slice,
    SlicedProjection,
    attached,
    collateral,
    deltas_of,
    head_gains,
    head_slices,
    mlp_slices,
    tensor_name,
    trainable,
)
from tests.reference.masked import inside, masked_training
from tests.test_families import CASES, make

HEADS = [Head(2, 3), Head(1, 0), Head(2, 1)]
TOKENS = torch.tensor([[5, 80, 200, 31, 7, 99], [1, 2, 3, 4, 5, 6]])
BATCHES = [TOKENS, TOKENS.flip(1), TOKENS + 7]
EACH = pytest.mark.parametrize("case", CASES)
# Every way to keep queries, keys and values; with and without biases.
LAYOUTS = (
    *("llama", "llama, biases", "qwen2", "gemma3", "olmo2", "phi3, windows", "gpt2", "opt"),
    *("neox, parallel", "falcon, one key-value head", "falcon, all key-value heads", "falcon, new"),
)


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


def place_of(model: Model, part: Slice) -> Tensor:
    """The numbers of a slice in the weights as they are."""
    return model.hf.state_dict()[tensor_name(model, part)][part.place(model)]


def random_deltas(model: Model, parts: Sequence[Slice], scale: float = 0.1) -> dict[Slice, Tensor]:
    """A random fp32 delta of the right shape for each slice."""
    generator = torch.Generator().manual_seed(0)
    return {
        part: scale * torch.randn(place_of(model, part).shape, generator=generator)
        for part in parts
    }


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
                views[part].add_(value)
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


def test_names_count_the_axes_of_the_stored_tensor(tiny: Callable[..., Model]) -> None:
    """GPT-2 stores a weight as (in, out): queries are columns, inputs of the output are rows."""
    model = tiny("gpt2")
    keys = [part.key(model) for part in head_slices(model, [Head(1, 2)], "qkvo")]
    assert keys == [
        "transformer.h.1.attn.c_attn.bias#rows=16:24",
        "transformer.h.1.attn.c_attn.weight#cols=16:24",
        "transformer.h.1.attn.c_attn.bias#rows=48:56",
        "transformer.h.1.attn.c_attn.weight#cols=48:56",
        "transformer.h.1.attn.c_attn.bias#rows=80:88",
        "transformer.h.1.attn.c_attn.weight#cols=80:88",
        "transformer.h.1.attn.c_proj.weight#rows=16:24",
    ]
    assert Slice(-1, "transformer.wte", "all").key(model) == "transformer.wte.weight#all"


@EACH
@pytest.mark.parametrize("form", ["qo", "qkvo"])
def test_slices_are_what_every_output_is_labelled_with(case: str, form: Form) -> None:
    model = make(case)
    wanted = inside(model, HEADS, [Mlp(1)], form)
    found = {name: torch.zeros_like(mask) for name, mask in wanted.items()}
    for part in [*head_slices(model, HEADS, form), *mlp_slices(model, [Mlp(1)])]:
        found[tensor_name(model, part)][part.place(model)] = True
    assert len(wanted) > 4
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())


@EACH
@pytest.mark.usefixtures("exact")
def test_removing_the_o_slice_is_removing_the_heads_output(case: str) -> None:
    model, head = make(case), Head(1, 2)
    (part,) = (part for part in head_slices(model, [head]) if part.axis == "cols")
    base = logits(model)
    with intervene(model, {head: torch.zeros(1, model.d_head)}, where="all"):
        without_head = logits(model)
    with merged(model, as_delta(model, {part: -place_of(model, part).clone()})):
        without_slice = logits(model)
    assert (without_slice - without_head).abs().max() < 1e-9
    assert (without_head - base).abs().max() > 1e-3


@EACH
@pytest.mark.usefixtures("exact")
def test_rows_move_the_heads_that_read_them_and_no_other(case: str) -> None:
    """A query is read by its head, a key and a value by the heads of their group."""
    model, head = make(case), Head(1, 2)
    queries = [part for part in head_slices(model, [head]) if part.axis == "rows"]
    others = set(head_slices(model, [head], "qkvo")) - set(head_slices(model, [head]))
    group = {head.index, *(other.index for other in collateral(model, [head]))}
    for parts, readers in ((queries, {head.index}), (sorted(others), group)):
        with record(model, where="all") as base:
            logits(model)
        with with_values(model, random_deltas(model, parts)), record(model, where="all") as trace:
            logits(model)
        moved = (trace.z[1] - base.z[1]).abs().unflatten(-1, (model.heads, -1)).amax((0, 1, 3))
        expected = [index in readers for index in range(model.heads)]
        if case == "olmo2" and parts is queries:  # its norm spans all heads: the others follow
            assert moved.argmax() == head.index
        elif case != "olmo2":
            assert (moved > 1e-4).tolist() == expected
            assert (moved > 1e-12).tolist() == expected


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head", [Head(1, 0), Head(2, 3)])
def test_removing_the_q_slice_lets_this_head_alone_look_everywhere(
    tiny: Callable[..., Model], kv_heads: int, head: Head
) -> None:
    """A query of zero attends evenly: z is the mean of the values of its key-value head."""
    model = tiny("llama", num_key_value_heads=kv_heads)
    (part,) = (part for part in head_slices(model, [head]) if part.axis == "rows")
    values: list[Tensor] = []
    projection = model.layer(head.layer).self_attn.v_proj
    handle = projection.register_forward_hook(lambda *arguments: values.append(arguments[-1]))
    with record(model) as base:
        logits(model)
    without = as_delta(model, {part: -place_of(model, part).clone()})
    with merged(model, without), record(model) as changed:
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


def test_collateral_heads_share_a_key_value_head(tiny: Callable[..., Model]) -> None:
    grouped = tiny("llama", num_key_value_heads=2)
    assert collateral(grouped, [Head(0, 1)]) == (Head(0, 0),)
    assert collateral(grouped, [Head(0, 1), Head(0, 0), Head(3, 2)]) == (Head(3, 3),)
    assert collateral(tiny("llama", num_key_value_heads=4), HEADS) == ()


def test_what_cannot_be_sliced_is_refused_in_a_sentence(tiny: Callable[..., Model]) -> None:
    model = tiny()
    unknown = replace(model, family=replace(model.family, key="self_attn.q_proj", proven=False))
    with pytest.raises(UserError, match=r"its tuning need .* in an unknown way"):
        head_slices(replace(unknown, kv_heads=4), HEADS)
    fused = make("gpt2")
    fused = replace(fused, family=replace(fused.family, layout=None))
    with pytest.raises(UserError, match="in an unknown way"):
        head_slices(fused, HEADS)
    with pytest.raises(UserError, match="Components must lie in"):
        head_slices(model, [Head(2, 9)])
    with pytest.raises(UserError, match="Components must lie in"):
        mlp_slices(model, [Mlp(4)])
    untyped = inspect.unwrap(head_slices)
    with pytest.raises(UserError, match="must be qo or qkvo, found 'kv'"):
        untyped(model, HEADS, "kv")


# ------------------------------------------------------------------------------------- attached


@EACH
def test_zero_deltas_change_nothing(case: str) -> None:
    model = make(case)
    base = logits(model)
    parts = [*head_slices(model, HEADS, "qkvo"), *mlp_slices(model, [Mlp(0)])]
    with attached(model, parts) as views:
        assert torch.equal(logits(model), base)
        deltas = deltas_of(model, views)
    assert list(views) == parts
    assert all(value.dtype == torch.float32 and not value.any() for value in deltas.values())
    for part, value in deltas.items():
        assert value.shape == place_of(model, part).shape
        assert part.axis == "all" or views[part].dtype == torch.float32


def objects(model: Model) -> dict[str, tuple[int, type, list[tuple[str, int]]]]:
    """Every module of a model: which object, of which class, with which parameters in order."""
    return {
        name: (
            id(module),
            type(module),
            [(own, id(value)) for own, value in module.named_parameters(recurse=False)],
        )
        for name, module in model.hf.named_modules()
    }


@pytest.mark.parametrize("case", ["llama, biases", "gpt2", "opt", "mixtral", "neox, parallel"])
def test_objects_come_back_also_after_an_exception(case: str) -> None:
    model = make(case)
    before, bytes_before = objects(model), state(model)
    embedding = model.hf.get_input_embeddings()
    (path,) = (name for name, module in model.hf.named_modules() if module is embedding)
    tied = Slice(-1, path, "all")
    parts = [*head_slices(model, HEADS), *mlp_slices(model, [Mlp(0), Mlp(2)]), tied]
    with attached(model, parts):
        assert isinstance(model.part(2, model.family.out), SlicedProjection)
        assert objects(model) != before
        optimiser = torch.optim.SGD(trainable(model), lr=0.1)
        model.hf(TOKENS).logits.square().mean().backward()
        optimiser.step()
    assert objects(model) == before
    with pytest.raises(ZeroDivisionError), attached(model, parts):
        1 / 0  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_part"):
        attached(model, [*parts, Slice(2, "no_such_part.x", "rows", 0, 1)]).__enter__()
    assert objects(model) == before
    assert trainable(model) == []
    assert list(model.hf.state_dict()) == list(bytes_before)
    assert same(state(model), bytes_before)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["qwen2", "gpt2", "neox, parallel"])
def test_each_view_is_the_delta_of_its_own_slice(case: str, order: int) -> None:
    """Heads of one layer share a parameter; the order of the slices must not matter."""
    model = make(case)
    parts = [*head_slices(model, HEADS, "qkvo"), *mlp_slices(model, [Mlp(1)])][::order]
    together = random_deltas(model, parts)
    for part in parts:
        alone = {part: together[part]}
        with with_values(model, {**{p: torch.zeros_like(v) for p, v in together.items()}, **alone}):
            found = logits(model)
        with merged(model, as_delta(model, alone)):
            assert (logits(model) - found).abs().max() < 1e-9


def test_rows_and_columns_of_one_projection_add(tiny: Callable[..., Model]) -> None:
    for model, path in ((tiny(), "self_attn.q_proj"), (tiny("gpt2"), "attn.c_proj")):
        parts = [Slice(1, path, "rows", 3, 9), Slice(1, path, "cols", 2, 7)]
        deltas = random_deltas(model, parts)
        base = logits(model)
        with with_values(model, deltas):
            wanted = logits(model)
        with merged(model, as_delta(model, deltas)):
            assert (logits(model) - wanted).abs().max() < 1e-9
        assert (wanted - base).abs().max() > 1e-2


def test_half_precision_base_has_single_precision_deltas(tiny: Callable[..., Model]) -> None:
    model = tiny("qwen2")
    model = replace(model, hf=model.hf.bfloat16())
    parts = [*head_slices(model, HEADS), *mlp_slices(model, [Mlp(1)])]
    base = logits(model)
    down = model.part(1, "mlp.down_proj")
    kept = down.weight
    with attached(model, parts) as views:
        assert torch.equal(logits(model), base)
        assert down.weight.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in trainable(model))
        output = model.hf(TOKENS).logits
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        assert all(value.grad.abs().max() > 0 for value in trainable(model))
        part = Slice(1, "mlp.down_proj", "all")
        with torch.no_grad():  # less than the base can hold: the master keeps it
            views[part].add_(1e-6)
        # The sum is rounded to fp32, so half a unit in its last place is lost.
        torch.testing.assert_close(
            deltas_of(model, views)[part], torch.full_like(kept, 1e-6).float(), atol=1e-7, rtol=0
        )
    assert down.weight is kept


# ------------------------------------------------------------------------------------- training


def loss_of(model: Model, tokens: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    predicted = model.hf(tokens).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten())


def descend(model: Model, parts: Sequence[Slice], rate: float) -> dict[Slice, Tensor]:
    """Deltas after a step of plain gradient descent per batch."""
    with attached(model, parts) as views:
        optimiser = torch.optim.SGD(trainable(model), lr=rate)
        for tokens in BATCHES:
            optimiser.zero_grad()
            loss_of(model, tokens).backward()
            optimiser.step()
        return deltas_of(model, views)


def check_against_masked(
    model: Model, parts: Sequence[Slice], masks: dict[str, Tensor], tolerance: float
) -> None:
    """Training of slices ends where masked full training does, to a tolerance."""
    before = state(model)
    wanted = masked_training(model, masks, BATCHES, rate=0.05)
    with merged(model, as_delta(model, descend(model, parts, rate=0.05))):
        found = state(model)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= tolerance, name
    for name, mask in masks.items():
        moved = (found[name] != before[name])[mask]
        assert moved.float().mean() > 0.5, name  # experts that no token reached stay


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("form", ["qo", "qkvo"])
@pytest.mark.usefixtures("exact")
def test_training_slices_is_masked_training(case: str, form: Form) -> None:
    model = make(case)
    parts = [*head_slices(model, HEADS, form), *mlp_slices(model, [Mlp(2)])]
    check_against_masked(model, parts, inside(model, HEADS, [Mlp(2)], form), 1e-9)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2", "falcon, new"])
def test_training_slices_is_masked_training_in_single_precision(case: str) -> None:
    model = make(case)
    twin = replace(model, hf=type(model.hf)(model.hf.config).eval())
    twin.hf.load_state_dict(model.hf.state_dict())
    twin.hf.requires_grad_(False)
    assert twin.dtype == torch.float32
    parts = [*head_slices(twin, HEADS, "qkvo"), *mlp_slices(twin, [Mlp(2)])]
    check_against_masked(twin, parts, inside(twin, HEADS, [Mlp(2)], "qkvo"), 1e-6)


@pytest.mark.usefixtures("exact")
def test_tied_embeddings_train_as_one(tiny: Callable[..., Model]) -> None:
    model = tiny("gpt2")
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
    part = Slice(-1, "transformer.wte", "all")
    mask = torch.ones_like(model.hf.lm_head.weight, dtype=torch.bool)
    check_against_masked(model, [part], {"transformer.wte.weight": mask}, 1e-9)


@pytest.mark.parametrize("case", [*LAYOUTS, "mixtral", "qwen3-moe"])
def test_training_moves_nothing_outside(case: str) -> None:
    """With momentum, weight decay, clipping and accumulation, which leak through gradient masks."""
    model = make(case)
    before = state(model)
    parts = [*head_slices(model, HEADS, "qkvo"), *mlp_slices(model, [Mlp(2)])]
    with attached(model, parts) as views:
        assert {id(p) for p in model.hf.parameters() if p.requires_grad} == {
            id(p) for p in trainable(model)
        }
        optimiser = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.3)
        losses = []
        for step in range(6):
            for tokens in (TOKENS[:1], TOKENS[1:]):
                loss = loss_of(model, tokens) / 2
                losses.append(loss.item())
                loss.backward()
            nn.utils.clip_grad_norm_(trainable(model), 0.5)
            optimiser.step()
            optimiser.zero_grad()
            assert step or sum(losses) > 0
        deltas = deltas_of(model, views)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert same(state(model), before)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    with merged(model, as_delta(model, deltas)):
        after = state(model)
    masks = inside(model, HEADS, [Mlp(2)], "qkvo")
    for name, value in after.items():
        mask = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert tensor_digest(value[~mask]) == tensor_digest(before[name][~mask]), name
        assert not mask.any() or (value != before[name])[mask].any(), name


@pytest.mark.parametrize("case", ["qwen2", "gpt2"])
@pytest.mark.usefixtures("exact")
def test_gains_multiply_gradients_and_nothing_else(case: str) -> None:
    model = make(case)
    parts = [*head_slices(model, HEADS), *mlp_slices(model, [Mlp(1)])]
    gains = head_gains(model, parts)
    assert {(part.layer, gain) for part, gain in gains.items()} == {(1, 4.0), (2, 2.0)}
    assert set(gains) == set(head_slices(model, HEADS))
    deltas = random_deltas(model, parts)
    found = []
    for given in (None, gains):
        with attached(model, parts, given) as views:
            with torch.no_grad():
                for part, value in deltas.items():
                    views[part].add_(value)
            loss = loss_of(model, TOKENS)
            found.append((loss.item(), torch.autograd.grad(loss, trainable(model))))
    (plain, gradients), (scaled, others) = found
    assert plain == scaled
    ratios = [float(b.norm() / a.norm()) for a, b in zip(gradients, others, strict=True)]
    assert sorted({round(ratio, 9) for ratio in ratios}) == [1.0, 2.0, 4.0]
