"""What belongs to a head or an MLP, and its parameters while they train.

A head owns rows of W_Q and their biases, and columns of W_O; it shares rows of W_K and W_V with
the other heads of its key-value head. The bias of W_O belongs to all heads and stays. Rows are
outputs of a projection and columns its inputs, however the matrix is stored.

A slice of a head is trained as a *delta*: an fp32 parameter, zero at the start, whose product is
added to the output of the frozen projection. Nothing outside the slices can move, since nothing
outside is trainable: gradient masks would let weight decay and momentum leak into the rest of a
matrix. Weight decay pulls a delta to zero, that is, back to the base. A whole MLP trains in
place, through fp32 masters: a delta would repeat its product.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from circuitune.components import Head, Kind, Mlp, check_components
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import wide
from circuitune.ports import head_rows

Axis = Literal["rows", "cols", "all"]
Form = Literal["qo", "qkvo"]
# The projections of a head whose rows are trained; columns of W_O always are.
KINDS: dict[str, tuple[Kind, ...]] = {"qo": ("q",), "qkvo": ("q", "k", "v")}


@dataclass(frozen=True, order=True)
class Slice:
    """A part of one parameter.

    Attributes:
        layer: its layer; -1 for a parameter outside the layers.
        path: from the layer (or from the causal model) to the module that has it.
        axis: ``rows``, some outputs of a projection; ``cols``, some of its inputs; ``all``, the
            whole parameter.
        start, stop: which rows or columns; 0 for the whole parameter.
        leaf: the name of the parameter in its module.
    """

    layer: int
    path: str
    axis: Axis
    start: int = 0
    stop: int = 0
    leaf: str = "weight"

    def key(self, model: Model) -> str:
        """The name in ``delta.safetensors``: the tensor, and the part of it as it is stored."""
        name = tensor_name(model, self)
        if self.axis == "all":
            return f"{name}#all"
        axis = ("rows", "cols")[self.dim(model)]
        return f"{name}#{axis}={self.start}:{self.stop}"

    def dim(self, model: Model) -> int:
        """The axis of the stored tensor that the rows or columns are counted along."""
        return _dim(module_of(model, self), self)

    def place(self, model: Model) -> tuple[slice, ...]:
        """The slice as an index of the stored tensor."""
        if self.axis == "all":
            return ()
        return (*[slice(None)] * self.dim(model), slice(self.start, self.stop))


def tensor_name(model: Model, part: Slice) -> str:
    """Name of the sliced tensor in the model's state dict."""
    stem = () if part.layer < 0 else (model.family.layers, str(part.layer))
    return ".".join(name for name in (*stem, part.path, part.leaf) if name)


def module_of(model: Model, part: Slice) -> nn.Module:
    """The module that a slice lies in, also while deltas are attached to it."""
    root = model.hf if part.layer < 0 else model.layer(part.layer)
    module = root.get_submodule(part.path)
    return module.base if isinstance(module, SlicedProjection) else module


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as (in, out)."""
    return isinstance(module, Conv1D)


def _dim(module: nn.Module, part: Slice) -> int:
    if part.leaf == "bias":
        return 0
    return int((part.axis == "cols") != is_transposed(module))


# ------------------------------------------------------------------------- what belongs to what


def head_slices(model: Model, heads: Sequence[Head], form: Form = "qo") -> list[Slice]:
    """The slices of heads, in order, each once.

    Args:
        model: the model.
        heads: the heads.
        form: ``qo`` for rows of W_Q, their biases, and columns of W_O, which no other head has;
            ``qkvo`` also for the rows and biases of W_K and W_V, which under grouped-query
            attention move the heads of `collateral` too.

    Where a norm over all heads follows the projection (OLMo-2), it ties the heads of a layer: a
    change of one query changes the scale of the others a little.

    Raises:
        UserError: there is no such head or form, or the model keeps the queries, keys and values
            of its heads in an unknown way.
    """
    if form not in get_args(Form):
        raise UserError(f"The form of a head's slices must be qo or qkvo, found {form!r}.")
    check_components(heads, model.layers, model.heads)
    parts = []
    for head in heads:
        for kind in KINDS[form]:
            path, rows = head_rows(model, head, kind)
            has_bias = getattr(model.part(head.layer, path), "bias", None) is not None
            for leaf in ("weight", "bias") if has_bias else ("weight",):
                parts.append(Slice(head.layer, path, "rows", rows.start, rows.stop, leaf))
        start = head.index * model.d_head
        parts.append(Slice(head.layer, model.family.out, "cols", start, start + model.d_head))
    return sorted(set(parts))


def collateral(model: Model, heads: Sequence[Head]) -> tuple[Head, ...]:
    """The other heads that read a key-value head of these, and change when it is tuned."""
    share = model.heads // model.kv_heads
    groups = {(head.layer, head.index // share) for head in heads}
    readers = {
        Head(layer, group * share + place) for layer, group in groups for place in range(share)
    }
    return tuple(sorted(readers - set(heads)))


def mlp_slices(model: Model, mlps: Sequence[Mlp]) -> list[Slice]:
    """All parameters of whole MLPs, those of experts and of their router included.

    Raises:
        UserError: there is no such MLP.
    """
    check_components(mlps, model.layers, model.heads)
    return sorted(
        Slice(part.layer, f"{path}.{name}".rpartition(".")[0], "all", leaf=name.split(".")[-1])
        for part in set(mlps)
        for path in _mlp_paths(model, part.layer)
        for name, _ in model.part(part.layer, path).named_parameters()
    )


def _mlp_paths(model: Model, layer: int) -> list[str]:
    """Paths of the modules of an MLP: one, or the matrices beside the attention (OPT)."""
    family = model.family
    if not isinstance(model.part(layer, family.mlp), nn.Linear | Conv1D):
        return [family.mlp]
    return [
        name
        for name, child in model.layer(layer).named_children()
        if isinstance(child, nn.Linear | Conv1D) and name != family.attention
    ]


def head_gains(model: Model, parts: Sequence[Slice]) -> dict[Slice, float]:
    """H/h for every slice of a head: H heads in a layer, h of them chosen there.

    The factor of the gradients in Zhang et al. (ICML 2024). An optimiser that normalises, such
    as AdamW, sees it through clipping and through other parameters alone.
    """
    counts: dict[int, int] = {}
    for part in parts:
        if part.path == model.family.out and part.axis == "cols":
            heads = (part.stop - part.start) // model.d_head
            counts[part.layer] = counts.get(part.layer, 0) + heads
    return {
        part: model.heads / counts[part.layer]
        for part in parts
        if part.axis != "all" and part.layer in counts
    }


# ----------------------------------------------------------------------------- while they train


class _Strip(nn.Module):
    """Slices of one axis of one parameter: their deltas, side by side as they are stored.

    Attributes:
        delta: (slice, inputs) or (outputs, slice), (slice,) for a bias; transposed for Conv1D.
    """

    index: Int[Tensor, " slice"]

    def __init__(self, base: nn.Module, parts: Sequence[Slice], gains: Sequence[float]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.dim = _dim(base, parts[0])
        self.is_output = parts[0].axis == "rows"
        self.transposed = is_transposed(base)
        tensor = getattr(base, parts[0].leaf)
        index = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        self.register_buffer("index", index.to(tensor.device), persistent=False)
        shape = [*tensor.shape[: self.dim], len(index), *tensor.shape[self.dim + 1 :]]
        zeros = torch.zeros(shape, dtype=torch.float32, device=tensor.device)
        self.delta = nn.Parameter(zeros)
        excess = torch.tensor(gains, dtype=torch.float32).repeat_interleave(
            torch.tensor(self.sizes)
        )
        excess = (excess - 1).to(tensor.device)
        if tensor.ndim > 1 and self.dim == 0:
            excess = excess[:, None]
        self.register_buffer("excess", excess if excess.any() else None, persistent=False)

    @property
    def sizes(self) -> list[int]:
        """How many rows or columns each slice has."""
        return [part.stop - part.start for part in self.parts]

    def views(self) -> dict[Slice, Tensor]:
        """A live view of the delta of each slice."""
        return dict(zip(self.parts, self.delta.split(self.sizes, dim=self.dim), strict=True))

    def forward(
        self, x: Float[Tensor, "*batch inputs"], y: Float[Tensor, "*batch outputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """The output ``y`` of the projection at ``x`` with the deltas added."""
        delta = self.delta
        if self.excess is not None:  # adds nothing to the value and ``excess`` to the gradient
            delta = delta + self.excess * (delta - delta.detach())
        if delta.ndim == 1:
            change = delta.expand(*y.shape[:-1], -1)
        else:
            part = wide(x if self.is_output else x.index_select(-1, self.index))
            matrix = delta.T if self.transposed else delta
            change = nn.functional.linear(part, matrix.to(part.dtype))
        change = change.to(y.dtype)
        return y.index_add(-1, self.index, change) if self.is_output else y + change


class SlicedProjection(nn.Module):
    """A frozen projection plus trained deltas on some of its rows, columns and biases.

    Attributes:
        base: the projection as it was, untouched; all that is not found here is read from it.
        strips: the deltas.
    """

    def __init__(
        self, base: nn.Module, parts: Sequence[Slice], gains: Mapping[Slice, float]
    ) -> None:
        """Put zero deltas on ``base``; ``gains`` multiply the gradients of slices."""
        super().__init__()
        self.base = base
        kinds: dict[tuple[str, str], list[Slice]] = {}
        for part in parts:
            kinds.setdefault((part.leaf, part.axis), []).append(part)
        self.strips = nn.ModuleList(
            _Strip(base, members, [gains.get(part, 1.0) for part in members])
            for members in kinds.values()
        )

    def __getattr__(self, name: str) -> Any:
        """What model code asks a projection for: its weight, its width, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The projection with its deltas, ``W x + delta x``, without forming the sum ``W + delta``.

        Products of deltas are taken in float32 or the model's own wider type.
        """
        y = self.base(x)
        for strip in self.strips:
            y = strip(x, y)
        return y


class _InPlace(nn.Module):
    """The parametrisation of a whole parameter: what the model sees of its fp32 master."""

    def __init__(self, base: nn.Parameter) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple: the frozen base is not this module's parameter

    def forward(self, master: Tensor) -> Tensor:
        """The master in the type of the base."""
        return master.to(self.base[0].dtype)


@contextmanager
def attached(
    model: Model, parts: Sequence[Slice], gains: Mapping[Slice, float] | None = None
) -> Iterator[dict[Slice, Tensor]]:
    """Make slices trainable; on leaving, the model is exactly as it was.

    Args:
        model: the model, all of it frozen.
        parts: the slices.
        gains: factors of the gradients of rows and columns, see `head_gains`; 1 by default.

    Yields:
        per slice a live view of its fp32 delta, of the shape of its place in the stored tensor;
        for a whole parameter the fp32 master (float64 in a float64 model) that trains in place.
    """
    projections: dict[tuple[int, str], list[Slice]] = {}
    views: dict[Slice, Tensor] = {}
    with ExitStack() as stack:
        for part in dict.fromkeys(parts):
            if part.axis == "all":
                views[part] = stack.enter_context(_in_place(model, part))
            else:
                projections.setdefault((part.layer, part.path), []).append(part)
        for members in projections.values():
            for strip in stack.enter_context(_sliced(model, members, gains or {})).strips:
                views |= strip.views()
        yield {part: views[part] for part in dict.fromkeys(parts)}


@contextmanager
def _sliced(
    model: Model, parts: Sequence[Slice], gains: Mapping[Slice, float]
) -> Iterator[SlicedProjection]:
    """A projection with deltas in the place of the projection."""
    root = model.hf if parts[0].layer < 0 else model.layer(parts[0].layer)
    stem, _, name = parts[0].path.rpartition(".")
    parent = root.get_submodule(stem)
    base = getattr(parent, name)
    setattr(parent, name, SlicedProjection(base, parts, gains))
    try:
        yield getattr(parent, name)
    finally:
        setattr(parent, name, base)


@contextmanager
def _in_place(model: Model, part: Slice) -> Iterator[nn.Parameter]:
    """A trainable master in the place of a parameter, wherever the model uses it (tied weights)."""
    base = getattr(module_of(model, part), part.leaf)
    owners = [
        (module, name)
        for module in model.hf.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is base
    ]
    master = nn.Parameter(wide(base.detach()).clone())
    with ExitStack() as stack:
        for module, name in owners:
            stack.callback(_put_back, module, dict(module.named_parameters(recurse=False)))
            setattr(module, name, master)
            parametrize.register_parametrization(module, name, _InPlace(base), unsafe=True)
            stack.callback(
                parametrize.remove_parametrizations, module, name, leave_parametrized=False
            )
        yield master


def _put_back(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a module its parameters again, in their order."""
    for name in parameters:
        delattr(module, name)
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)


def trainable(model: Model) -> list[nn.Parameter]:
    """The parameters that train while slices are attached: deltas and masters."""
    return [parameter for parameter in model.hf.parameters() if parameter.requires_grad]


def deltas_of(model: Model, views: Mapping[Slice, Tensor]) -> dict[Slice, Tensor]:
    """Copies of the deltas in fp32; of a whole parameter, its master minus the base.

    Args:
        model: the model, with or without the slices still attached.
        views: what `attached` gave.
    """
    deltas = {}
    # A parameter's storage may have been exchanged since, as by data-parallel training.
    projections = [m for m in model.hf.modules() if isinstance(m, SlicedProjection)]
    now = {part: view for m in projections for s in m.strips for part, view in s.views().items()}
    for part, view in views.items():
        value = now.get(part, view).detach()
        if part.axis == "all":
            value = value - _base(model, part)
        deltas[part] = value.to(torch.float32, copy=True)
    return deltas


def _base(model: Model, part: Slice) -> Tensor:
    module = module_of(model, part)
    if parametrize.is_parametrized(module, part.leaf):
        return module.parametrizations[part.leaf][0].base[0].detach()
    return getattr(module, part.leaf).detach()
