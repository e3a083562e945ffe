"""Rows and columns of weight matrices as parameters of their own, and their life on disk.

A head owns rows of W_Q (and of W_K, W_V of its key-value head) and columns of W_O. A slice is
trained as a *delta*: an fp32 parameter, zero at the start, added to the output of the frozen
projection. Nothing outside the slices can move, since nothing outside is trainable: gradient
masks would let weight decay and momentum leak into the rest of a matrix.

On disk a delta is two files: ``delta.safetensors``, keyed ``tensor#rows=384:512`` or
``tensor#cols=...``, and ``components.json`` with the base model, the sha256 of every touched
base tensor, the heads, and how they were trained.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import wide
from circuitune.runs import write_json

Axis = Literal["rows", "cols"]
DELTA = "delta.safetensors"
COMPONENTS = "components.json"


@dataclass(frozen=True, order=True)
class Slice:
    """A run of rows or columns of one weight matrix stored as (out, in)."""

    layer: int
    path: str
    axis: Axis
    start: int
    stop: int

    def key(self, model: Model) -> str:
        """The name in ``delta.safetensors``: tensor name, then the rows or columns."""
        return f"{tensor_name(model, self)}#{self.axis}={self.start}:{self.stop}"


def tensor_name(model: Model, part: Slice) -> str:
    """Name of the sliced tensor in the model's state dict."""
    return f"{model.family.layers}.{part.layer}.{part.path}.weight"


def head_slices(model: Model, heads: Sequence[Head]) -> list[Slice]:
    """The q and o slices of heads: rows of W_Q, columns of W_O.

    Keys and values are left alone: under grouped-query attention other heads share them.

    Raises:
        UserError: the family does not keep the queries of a head in rows of their own.
    """
    if model.family.query is None:
        raise UserError(
            f"Tuning needs a family that keeps the queries of each head in rows of one matrix, "
            f"{model.family.name} does not; choose a model of another family to tune."
        )
    parts = []
    for head in heads:
        start, stop = head.index * model.d_head, (head.index + 1) * model.d_head
        parts.append(Slice(head.layer, model.family.query, "rows", start, stop))
        parts.append(Slice(head.layer, model.family.out, "cols", start, stop))
    return sorted(set(parts))


class SliceLinear(nn.Module):
    """A frozen projection plus trained deltas on some of its rows or columns.

    Attributes:
        base: the projection as it was, untouched.
        delta: the deltas side by side, fp32, (rows, in) or (out, columns).
    """

    index: Int[Tensor, " slice"]

    def __init__(self, base: nn.Linear, parts: Sequence[Slice]) -> None:
        """Wrap ``base`` with zero deltas for slices of one axis."""
        super().__init__()
        self.base = base
        self.axis: Axis = parts[0].axis
        index = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        self.register_buffer("index", index.to(base.weight.device), persistent=False)
        out_width, in_width = base.weight.shape
        shape = (len(index), in_width) if self.axis == "rows" else (out_width, len(index))
        self.delta = nn.Parameter(torch.zeros(shape, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a projection for its dtype or device."""
        return self.base.weight

    @property
    def in_features(self) -> int:
        """Input width of the projection."""
        return self.base.in_features

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The projection with its deltas, ``(W + delta) x``, without forming the sum."""
        y = self.base(x)
        part = wide(x if self.axis == "rows" else x[..., self.index])
        change = nn.functional.linear(part, self.delta.to(part.dtype)).to(y.dtype)
        return torch.index_add(y, -1, self.index, change) if self.axis == "rows" else y + change


@contextmanager
def attached(model: Model, parts: Sequence[Slice]) -> Iterator[dict[Slice, Tensor]]:
    """Put zero deltas on the model; on leaving, the model is exactly as it was.

    Yields:
        a live view of the delta of each slice, of the slice's shape.
    """
    groups: dict[tuple[int, str, Axis], list[Slice]] = {}
    for part in parts:
        groups.setdefault((part.layer, part.path, part.axis), []).append(part)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    views: dict[Slice, Tensor] = {}
    try:
        for (layer, path, _), members in groups.items():
            parent_path, _, name = path.rpartition(".")
            parent = model.part(layer, parent_path) if parent_path else model.layer(layer)
            base = getattr(parent, name)
            wrapped = SliceLinear(base, members)
            setattr(parent, name, wrapped)
            replaced.append((parent, name, base))
            dim = 0 if wrapped.axis == "rows" else 1
            sizes = [part.stop - part.start for part in members]
            views |= zip(members, wrapped.delta.split(sizes, dim=dim), strict=True)
        yield views
    finally:
        for parent, name, base in reversed(replaced):
            setattr(parent, name, base)


def trainable(model: Model) -> list[nn.Parameter]:
    """The deltas that are attached to the model."""
    return [m.delta for m in model.hf.modules() if isinstance(m, SliceLinear)]


def tensor_digest(tensor: Tensor) -> str:
    """Sha256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(flat.tobytes()).hexdigest()


def save_delta(
    folder: Path, model: Model, deltas: Mapping[Slice, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write ``delta.safetensors`` and ``components.json`` into a folder.

    Args:
        folder: existing folder; the caller renames it into place.
        model: the model *with its base weights* (nothing attached).
        deltas: trained delta of each slice.
        facts: further facts for ``components.json`` (heads, method, training options).
    """
    tensors = {part.key(model): value.detach().cpu().float() for part, value in deltas.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / DELTA)
    state = model.hf.state_dict()
    names = sorted({tensor_name(model, part) for part in deltas})
    content = dict(facts) | {
        "base": model.source,
        "d_head": model.d_head,
        "touched": {name: tensor_digest(state[name]) for name in names},
    }
    write_json(folder / COMPONENTS, content)


@dataclass(frozen=True)
class Delta:
    """A delta read from disk: tensors by key, and the content of ``components.json``."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def lowest_layer(self) -> int:
        """The lowest layer that a slice lies in; everything below is the base."""
        layers = (re.search(r"\.(\d+)\.", key) for key in self.tensors)
        return min(int(found[1]) for found in layers if found)


def load_delta(folder: Path) -> Delta:
    """Read a delta.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        facts = json.loads((folder / COMPONENTS).read_text(encoding="utf-8"))
        delta = Delta(load_file(folder / DELTA), facts)
        untouched = {_parse_key(key)[0] for key in delta.tensors} ^ set(facts["touched"])
        if untouched or not isinstance(facts["base"], str):
            raise ValueError("its tensors are not those of its record")
        return delta
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"A tuned folder must hold {DELTA} and {COMPONENTS}, {folder} does not "
            f"({type(error).__name__}: {str(error)[:100]}); run `circuitune tune` first."
        ) from error


def _parse_key(key: str) -> tuple[str, tuple[slice, ...]]:
    name, _, place = key.partition("#")
    axis, _, span = place.partition("=")
    start, _, stop = span.partition(":")
    part = slice(int(start), int(stop))
    return name, (part,) if axis == "rows" else (slice(None), part)


def check_base(model: Model, delta: Delta) -> None:
    """Refuse a delta that was trained on other weights.

    Raises:
        UserError: a touched tensor is absent or its content differs.
    """
    state = model.hf.state_dict()
    for name, digest in delta.facts["touched"].items():
        if name not in state or tensor_digest(state[name]) != digest:
            raise UserError(
                f"A delta fits only the weights it was trained on, {name} of {model.source} "
                f"differs from {delta.facts['base']}; load that model."
            )


@contextmanager
def merged(model: Model, delta: Delta) -> Iterator[None]:
    """The model with a delta added to its weights; on leaving, the base bytes are restored.

    Raises:
        UserError: the delta was trained on other weights.
    """
    check_base(model, delta)
    parameters = dict(model.hf.named_parameters())
    names = {_parse_key(key)[0] for key in delta.tensors}
    kept = {name: parameters[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for key, value in delta.tensors.items():
                name, place = _parse_key(key)
                target = parameters[name]
                exact = wide(target[place]) + value.to(target.device)
                target[place] = exact.to(target.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
