"""What tuning will cost, before it starts: parameters, memory and FLOPs.

FLOPs are those of matrix products, two per multiplication, from the shapes of the model's own
weights: an expert counts by its share of the tokens, attention by its scores (the whole square,
as kernels without a causal short cut compute it). A backward pass takes the gradient of each
product's input, if something below it trains, and of its weight, if it trains in place. So the
lowest tuned layer sets the price, not the number of heads. Norms and other elementwise work are
left out; checked against torch's own counter in ``tests/test_plan.py``.

Memory for parameters, gradients and AdamW is exact. What autograd keeps for the backward pass
is *measured*: one layer of each kind runs on one and on two texts, the rest is arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from circuitune.memory import shown
from circuitune.methods import Method, attached, full
from circuitune.models import Model, projection_shape
from circuitune.sites import begin, first, substitute
from circuitune.slices import module_of, tensor_name
from circuitune.supervised import LOGIT_ROWS

FACTOR = 4  # bytes of what trains, of its gradient, and of each of AdamW's two moments
LOGIT = 4  # bytes of a logit: losses are taken in float32
MULTIPLY_ADD = 2  # FLOPs


@dataclass(frozen=True)
class Workload:
    """What a step of training holds.

    Attributes:
        tokens: tokens of training texts per step, all processes together.
        supervised: how many of them have a loss.
        length: tokens of one text.
        steps: optimiser steps.
        anchor_tokens: tokens of plain text per step on which the model is held to the base.
        pieces: pieces of a batch that run one after another, to save memory.
        stored: tokens of all different texts, for the prefix cache; by default every step has
            texts of its own.
        checkpointing: whether tuned layers run twice, to save memory.
    """

    tokens: int
    supervised: int
    length: int
    steps: int
    anchor_tokens: int = 0
    pieces: int = 1
    stored: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Flops:
    """FLOPs of one optimiser step.

    Attributes:
        prefix: forward of the layers below the lowest tuned one; 0 if that is cached.
        forward, backward: of the layers from there on; with checkpointing forward counts
            twice, a little too much: what nothing is kept of is not made again.
        unembedding: forward and backward where logits exist; anchored positions also have the
            base's.
    """

    prefix: int
    forward: int
    backward: int
    unembedding: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Plan:
    """What tuning with a method will cost; sizes in bytes.

    Attributes:
        method: its name.
        trainable: parameters that train; share: of those of the model.
        lowest, layers: lowest layer in which something trains, and how many layers there are.
        steps: optimiser steps.
        weights: the base, also the one that it was loaded as where another precision trains.
        masters: fp32 copies or deltas that train; gradients: theirs; moments: AdamW's two.
        activations: an estimate of what is kept for a backward pass, logits included.
        cache: hidden states that enter the lowest layer, on disk; 0 without a cache.
        flops: of a step; full: of a step in which every parameter trains.
    """

    method: str
    trainable: int
    share: float
    lowest: int
    layers: int
    steps: int
    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    cache: int
    flops: Flops
    full: Flops

    @property
    def memory(self) -> int:
        """Bytes while training, without what the process and its libraries take themselves."""
        trained = self.masters + self.gradients + self.moments
        return self.weights + trained + self.activations

    @property
    def ratio(self) -> float:
        """FLOPs as a share of full tuning's; of its time too, at the same speed per FLOP."""
        return self.flops.total / self.full.total

    def seconds_left(self, seconds: Sequence[float]) -> float:
        """Seconds until the last step, from those of the steps that were run (one at least)."""
        return median(seconds) * (self.steps - len(seconds))

    def lines(self) -> list[str]:
        """The plan in a few lines for the terminal."""
        trained = self.masters + self.gradients + self.moments
        prefix = f"{shown(self.cache)} on disk" if self.cache else "none"
        return [
            f"{self.method}: {self.trainable:,} parameters train, {self.share:.2%} of the model",
            f"layers: backward through {self.layers - self.lowest} of {self.layers}, down to layer "
            f"{self.lowest}; cache of what enters it: {prefix}",
            f"memory: {shown(self.memory)} = weights {shown(self.weights)}, trained parameters "
            f"with gradients and AdamW {shown(trained)}, activations {shown(self.activations)}",
            f"compute: {self.flops.total / 1e9:,.2f} GFLOP a step, {self.ratio:.0%} of full "
            f"tuning; {self.flops.total * self.steps / 1e12:,.2f} TFLOP in {self.steps} steps",
        ]


def plan(
    model: Model, method: Method, work: Workload, *, cached: bool, dtype: torch.dtype | None = None
) -> Plan:
    """What tuning will cost.

    Args:
        model: the base with nothing attached; parts of it are attached for a moment.
        method: what will train.
        work: what a step holds.
        cached: whether what enters the lowest layer comes from a cache, where it can.
        dtype: of the base's weights while training; by default the one they have. Activations
            are scaled by its size.
    """
    dtype = dtype or model.dtype
    cached = cached and method.prefix
    trainable, masters = _trained(model, method, dtype)
    stored = work.tokens * work.steps if work.stored is None else work.stored
    return Plan(
        method=method.name,
        trainable=trainable,
        share=trainable / model.parameters,
        lowest=method.lowest,
        layers=model.layers,
        steps=work.steps,
        weights=_weights(model, dtype),
        masters=masters,
        gradients=masters,
        moments=2 * masters,
        activations=_activations(model, method, work, dtype),
        cache=stored * model.d_model * dtype.itemsize if cached else 0,
        flops=flops(model, method, work, cached=cached),
        full=flops(model, full(model), replace(work, checkpointing=False), cached=False),
    )


def _weights(model: Model, dtype: torch.dtype) -> int:
    """Bytes of the base: where it trains in another dtype, the loaded one stays beside it."""
    own = model.parameters * model.dtype.itemsize
    return own if dtype == model.dtype else own + model.parameters * dtype.itemsize


def _trained(model: Model, method: Method, dtype: torch.dtype) -> tuple[int, int]:
    """Number of trained parameters, and their bytes."""
    count = size = 0
    for part in method.parts:
        weight = getattr(module_of(model, part), part.leaf)
        if part.axis == "all":
            numbers = weight.numel()
            size += numbers * torch.promote_types(dtype, torch.float32).itemsize
        else:
            numbers = weight.numel() // weight.shape[part.dim(model)] * (part.stop - part.start)
            size += numbers * FACTOR
        count += numbers
    for target in () if method.lora is None else method.lora.targets:
        numbers = method.lora.rank * sum(projection_shape(model.hf.get_submodule(target)))
        count, size = count + numbers, size + numbers * FACTOR
    return count, size


# ----------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class _Matrix:
    """Multiplications that one token takes in a weight, and in what trains on it.

    Attributes:
        own: of the weight.
        in_place: whether the weight trains.
        inner, outer: of added trained products; the inner ones read what the weight reads, the
            outer ones what the inner ones give (LoRA).
    """

    own: int
    in_place: bool
    inner: int
    outer: int

    @property
    def trains(self) -> bool:
        """Whether anything here trains."""
        return self.in_place or self.inner > 0

    @property
    def forward(self) -> int:
        """Multiplications of a forward pass."""
        return self.own + self.inner + self.outer

    def backward(self, *, flows: bool) -> int:
        """Of a backward pass; ``flows``: a gradient is wanted of the input."""
        weights = self.own * self.in_place + self.inner + self.outer
        return weights + self.outer + (self.own + self.inner) * flows


def flops(model: Model, method: Method, work: Workload, *, cached: bool) -> Flops:
    """FLOPs of one step of training.

    Args:
        model: the base with nothing attached.
        method: what trains.
        work: what a step holds.
        cached: whether what enters the lowest layer needs no computing.
    """
    tokens = work.tokens + work.anchor_tokens
    serial = _is_serial(model)
    prefix = forward = backward = 0
    for index in range(model.layers):
        matrices = _matrices(model, method, index)
        scores = 2 * model.heads * model.d_head * work.length  # of a token with all others
        once = sum(m.forward for m in matrices.values()) + scores
        if index < method.lowest:
            prefix += once * work.tokens
            continue
        forward += once * tokens * (1 + work.checkpointing)
        enters = index > method.lowest or not method.prefix
        backward += _backward(model, matrices, scores, enters=enters, serial=serial) * tokens
    keeps = not (cached and method.prefix)
    return Flops(
        prefix=MULTIPLY_ADD * prefix * keeps,
        forward=MULTIPLY_ADD * forward,
        backward=MULTIPLY_ADD * backward,
        unembedding=MULTIPLY_ADD * _unembedding(model, method, work),
    )


def _backward(
    model: Model, matrices: Mapping[str, _Matrix], scores: int, *, enters: bool, serial: bool
) -> int:
    """Multiplications of a token in the backward pass of a layer.

    Args:
        model: the model.
        matrices: the layer's weights by name, in their order.
        scores: multiplications of attention in the forward pass.
        enters: whether a gradient is wanted of what enters the layer.
        serial: whether the MLP reads what the attention gave.
    """
    family = model.family
    inside = {name: m for name, m in matrices.items() if name.startswith(f"{family.attention}.")}
    out = inside.pop(f"{family.out}.weight", None) or matrices[f"{family.out}.weight"]
    last = [m for name, m in matrices.items() if name not in inside and m is not out]
    total = sum(m.backward(flows=enters) for m in inside.values())
    trained = sum(m.trains for m in inside.values())
    moves = enters or trained > 0
    # Gradients of the pattern, queries, keys and values; fused kernels give all, and make the
    # scores again.
    products = 4 if enters or len(inside) == 1 else 1 + trained
    eager = getattr(model.hf.config, "_attn_implementation", "") == "eager"
    total += moves * (products if eager else 5) * scores // 2
    total += out.backward(flows=moves)
    moves = enters or (serial and (moves or out.trains))
    for place, matrix in enumerate(last):  # the last one reads what the others gave
        inner = place == len(last) - 1 and any(m.trains for m in last[:-1])
        total += matrix.backward(flows=moves or inner)
    return total


def _matrices(model: Model, method: Method, index: int) -> dict[str, _Matrix]:
    """The weight matrices of a layer by their names in it, as a token passes them."""
    layer = model.layer(index)
    stem = f"{model.family.layers}.{index}."
    inner: dict[str, int] = {}
    outer: dict[str, int] = {}
    whole = {tensor_name(model, p).removeprefix(stem) for p in method.parts if p.axis == "all"}
    for part in method.parts:
        name = tensor_name(model, part).removeprefix(stem)
        if part.layer == index and part.axis != "all" and part.leaf == "weight":
            outputs, inputs = projection_shape(module_of(model, part))
            other = inputs if part.axis == "rows" else outputs
            inner[name] = inner.get(name, 0) + (part.stop - part.start) * other
    factors = method.lora
    for target in () if factors is None else factors.targets:
        if target.startswith(stem):
            outputs, inputs = projection_shape(model.hf.get_submodule(target))
            name = f"{target}.weight".removeprefix(stem)
            inner[name], outer[name] = factors.rank * inputs, factors.rank * outputs
    return {
        name: _Matrix(own, name in whole, inner.get(name, 0), outer.get(name, 0))
        for name, own in _own(model, layer)
    }


def _own(model: Model, layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Multiplications of a token in each weight of a layer; in experts, its share of them."""
    config = model.hf.config.get_text_config()
    for name, weight in layer.named_parameters():
        if weight.ndim == 2:
            yield name, weight.numel()
        elif weight.ndim == 3:  # (expert, ...)
            yield name, weight.numel() // len(weight) * config.num_experts_per_tok


def _unembedding(model: Model, method: Method, work: Workload) -> int:
    """Multiplications of a step in the unembedding; the base's own logits are not trained on."""
    weight = model.hf.get_output_embeddings().weight
    shared = {id(getattr(module_of(model, p), p.leaf)) for p in method.parts if p.layer < 0}
    times = 2 + (id(weight) in shared)
    return weight.numel() * (times * (work.supervised + work.anchor_tokens) + work.anchor_tokens)


class _Seen(Exception):
    """What was wanted is known; the rest of the layer need not run."""


@torch.enable_grad()
def _is_serial(model: Model) -> bool:
    """Whether an MLP reads what the attention of its layer gave; in parallel blocks it does not."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    start = begin(model, input_ids=token, use_cache=False)
    args, kwargs = start.calls[0]
    out = model.part(0, model.family.out)
    own = out.forward
    found: list[bool] = []

    def give(z: Tensor) -> Tensor:
        return own(z).detach().requires_grad_()

    def look(values: Tensor, *_: object) -> None:
        found.append(values.requires_grad)
        raise _Seen

    with substitute(out, give), substitute(model.part(0, model.family.mlp), look), suppress(_Seen):
        model.layer(0)(start.entering, *args, **kwargs)
    return any(found)


# ---------------------------------------------------------------------------------------- memory


def _activations(model: Model, method: Method, work: Workload, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass of one piece of a batch."""
    texts = (work.tokens + work.anchor_tokens) / work.pieces / work.length
    entering = texts * work.length * model.d_model * dtype.itemsize
    known: dict[object, tuple[int, int]] = {}
    kept = highest = 0.0
    for index in range(method.lowest, model.layers):
        own = _of_layer(model, method, index)
        enters = index > method.lowest or not method.prefix
        kind = (enters, _pattern(model, own, index))
        if kind not in known:
            one, two = (_kept(model, own, index, work.length, n, enters=enters) for n in (1, 2))
            known[kind] = (2 * one - two, two - one)
        fixed, each = known[kind]
        layer = (fixed + each * texts) * dtype.itemsize / model.dtype.itemsize
        kept, highest = kept + layer, max(highest, layer)
    if work.checkpointing:
        kept = highest + entering * (model.layers - method.lowest)
    rows = min(work.supervised / work.pieces, LOGIT_ROWS) + 2 * work.anchor_tokens / work.pieces
    vocabulary = projection_shape(model.hf.get_output_embeddings())[0]
    return round(kept + rows * vocabulary * LOGIT)


def _of_layer(model: Model, method: Method, index: int) -> Method:
    """The part of a method that lies in one layer."""
    parts = tuple(part for part in method.parts if part.layer == index)
    factors = method.lora
    if factors is not None:
        stem = f"{model.family.layers}.{index}."
        targets = tuple(name for name in factors.targets if name.startswith(stem))
        kept = tuple(part for part in factors.kept if part.layer == index)
        factors = replace(factors, targets=targets, kept=kept) if targets else None
    return replace(method, parts=parts, lora=factors)


def _pattern(model: Model, own: Method, index: int) -> object:
    """What two layers must have in common to keep the same number of bytes."""
    stem = f"{model.family.layers}.{index}."
    parts = [(p.path, p.leaf, p.axis, p.stop - p.start) for p in own.parts]
    targets = () if own.lora is None else own.lora.targets
    shapes = [(name, tuple(p.shape)) for name, p in model.layer(index).named_parameters()]
    return tuple(parts), tuple(name.removeprefix(stem) for name in targets), tuple(shapes)


@torch.enable_grad()
def _kept(model: Model, own: Method, index: int, length: int, texts: int, *, enters: bool) -> int:
    """Bytes that a layer keeps for the backward pass of some texts; no weights among them."""
    tokens = torch.zeros(texts, length, dtype=torch.long, device=model.device)
    start = begin(model, input_ids=tokens, use_cache=False)
    args, kwargs = start.calls[index]
    hidden = start.entering.detach().requires_grad_(enters)
    with attached(model, own):
        given = [hidden, *model.hf.parameters(), *model.hf.buffers()]
        known = {_place(value) for value in given} | set(_places((args, kwargs)))
        sizes: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            if _place(value) not in known:
                sizes[_place(value)] = value.untyped_storage().nbytes()
            return value

        with saved_tensors_hooks(keep, lambda value: value):
            output = first(model.layer(index)(hidden, *args, **kwargs))
        sizes.pop(_place(output), None)  # the next layer counts what it keeps of its input
        return sum(sizes.values()) + enters * hidden.untyped_storage().nbytes()


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _places(values: object) -> Iterator[int]:
    """The storages of all tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield _place(values)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _places(value)
    elif isinstance(values, dict):
        yield from _places(list(values.values()))
