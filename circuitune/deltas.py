"""A delta on disk and in a model: what was trained, as a difference from the base.

A folder holds two files. ``components.json`` names the base model, the sha256 of every touched
base tensor, the heads and MLPs, and how they were trained. ``delta.safetensors`` holds fp32
tensors whose names say which part of which tensor of the base they are added to, in the axes of
that tensor as it is stored:

==========================  ======================================================================
``NAME#rows=384:512``       some rows of a matrix or entries of a bias
``NAME#cols=384:512``       some columns of a matrix
``NAME#all``                a whole tensor
``NAME#lora_A``, ``#lora_B``  two factors (r, inputs) and (outputs, r): B A is added to the matrix
==========================  ======================================================================
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import wide
from circuitune.runs import write_json
from circuitune.slices import Slice, is_transposed

DELTA = "delta.safetensors"
COMPONENTS = "components.json"
# Types in which a base may have been in memory when its digests were taken, the usual ones first.
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNNAMED = "precise"  # the method of a record that names none
KEY = re.compile(r"(?P<name>[^#]+)#(?:(?P<axis>rows|cols)=(\d+):(\d+)|(?P<whole>all|lora_[AB]))")


def tensor_digest(tensor: Tensor) -> str:
    """Sha256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def has_digest(tensor: Tensor, digest: str) -> bool:
    """Whether a tensor, as it is or cast to another type, has a digest of `tensor_digest`.

    So weights are known again in whatever type they were when the digest was taken, unless they
    have been rounded since.
    """
    kinds = dict.fromkeys((tensor.dtype, *KINDS))
    return any(tensor_digest(tensor.to(kind)) == digest for kind in kinds)


def save_delta(
    folder: Path, model: Model, deltas: Mapping[Slice, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write ``delta.safetensors`` and ``components.json`` into a folder.

    Args:
        folder: existing folder.
        model: the model *with its base weights* (nothing attached).
        deltas: trained delta of each slice.
        facts: further facts for ``components.json`` (components, method, training options).

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    save_tensors(folder, model, {part.key(model): value for part, value in deltas.items()}, facts)


def save_tensors(
    folder: Path, model: Model, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a delta whose tensors already have their names, see the top of this module.

    Each file is renamed into place when it is whole. A folder in which only the first of them is
    new is refused by `load_delta`, since the record of the old one is removed before.
    """
    state = model.hf.state_dict()
    names = sorted({_parse_key(key).name for key in tensors})
    content = dict(facts) | {
        "base": model.source,
        "d_head": model.d_head,
        "dtype": str(model.dtype).removeprefix("torch."),
        "touched": {name: tensor_digest(state[name]) for name in names},
        "transposed": [name for name in names if _is_transposed(model, name)],
    }
    stored = {
        key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()
    }
    (folder / COMPONENTS).unlink(missing_ok=True)
    beside = folder / f".{DELTA}-{os.getpid()}"
    try:
        beside.touch()
        mode = beside.stat().st_mode  # else it would be readable by its owner alone
        save_file(stored, beside)
        beside.chmod(mode)
        os.replace(beside, folder / DELTA)
        write_json(folder / COMPONENTS, content)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"A delta must be written to {folder}, that failed ({str(error)[:120]}); free some "
            "room and start again."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _is_transposed(model: Model, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and is_transposed(model.hf.get_submodule(path))


@dataclass(frozen=True)
class _Key:
    """A name in ``delta.safetensors``: the tensor, what is there, and its part of the tensor."""

    name: str
    what: str
    place: tuple[slice, ...]


def _parse_key(key: str) -> _Key:
    found = KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"{key!r} names no part of a tensor")
    name, axis, start, stop, whole = found.groups()
    if whole:
        return _Key(name, whole, ())
    part = slice(int(start), int(stop))
    return _Key(name, axis, (part,) if axis == "rows" else (slice(None), part))


@dataclass(frozen=True)
class Delta:
    """A delta read from disk: tensors by key, and the content of ``components.json``."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def lowest_layer(self) -> int:
        """The lowest layer that is touched; everything below is the base.

        -1 if a tensor outside the layers is touched: then nothing is known to be the base.
        """
        layers = (re.search(r"\.(\d+)\.", name) for name in self.names)
        return min(int(found[1]) if found else -1 for found in layers)

    @property
    def names(self) -> set[str]:
        """The tensors that are touched."""
        return {_parse_key(key).name for key in self.tensors}

    def places(self, name: str) -> list[tuple[slice, ...]]:
        """The parts of a stored tensor that may differ from the base, as indices; () is all."""
        keys = (_parse_key(key) for key in sorted(self.tensors))
        # Of a low-rank pair one speaks for both.
        return [key.place for key in keys if key.name == name and key.what != "lora_A"]

    def added(self, name: str, base: Tensor) -> Tensor:
        """A tensor of the base with its delta: a float32 sum, cast once to the base's type.

        Bytes outside the `places` are those of the base.

        Raises:
            UserError: the delta does not have the shape of its place.
        """
        exact, result = wide(base).clone(), base.clone()
        for place, value in self._changes(name, base.device):
            if exact[place].shape != value.shape:
                raise UserError(
                    f"A delta must have the shape of its place, {tuple(exact[place].shape)} in "
                    f"{name}, found {tuple(value.shape)}; tune again."
                )
            exact[place] += value
        for place in self.places(name):
            result[place] = exact[place].to(base.dtype)
        return result

    def _changes(
        self, name: str, device: torch.device
    ) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """What is added to a tensor and where, low-rank factors multiplied."""
        for key, value in self.tensors.items():
            parsed = _parse_key(key)
            if parsed.name != name or parsed.what == "lora_A":
                continue
            value = value.to(device)
            if parsed.what == "lora_B":
                value = value @ self.tensors[f"{name}#lora_A"].to(device)
                value = value.T if name in self.facts.get("transposed", ()) else value
            yield parsed.place, value


def load_delta(folder: Path) -> Delta:
    """Read a delta.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        facts = json.loads((folder / COMPONENTS).read_text(encoding="utf-8"))
        delta = Delta(load_file(folder / DELTA), facts)
        if delta.names != set(dict(facts["touched"])) or not isinstance(facts["base"], str):
            raise ValueError("its tensors are not those of its record")
        for key, value in delta.tensors.items():
            _check_tensor(key, value, delta)
        return delta
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"A tuned folder must hold {DELTA} and {COMPONENTS}, {folder} does not "
            f"({type(error).__name__}: {str(error)[:100]}); run `circuitune tune` first."
        ) from error


def tuned_variants(run: Path) -> dict[str, Delta]:
    """Every delta of a run by its method: that in ``tuned/``, then those in folders below it.

    Raises:
        UserError: one cannot be read.
    """
    top = run / "tuned"
    inside = sorted(path for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    found = {UNNAMED: load_delta(top)} | {path.name: load_delta(path) for path in inside}
    return {str(delta.facts.get("method", name)): delta for name, delta in found.items()}


def _check_tensor(key: str, value: Tensor, delta: Delta) -> None:
    """Refuse, by a ValueError, a tensor that cannot be what its name says."""
    parsed = _parse_key(key)
    sound = value.is_floating_point()
    if parsed.what in ("rows", "cols"):
        dim = len(parsed.place) - 1
        length = parsed.place[dim].stop - parsed.place[dim].start
        sound &= value.ndim > dim and value.shape[dim] == length > 0
    elif parsed.what != "all":
        a, b = (delta.tensors[f"{parsed.name}#lora_{factor}"] for factor in "AB")
        sound &= a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    if not sound:
        raise ValueError(f"{key} has the shape {tuple(value.shape)}")


def check_base(model: Model, delta: Delta) -> None:
    """Refuse a delta that was trained on other weights.

    The same weights in another type are accepted where that can be seen: rounding weights as they
    are gives those that the delta was trained on, or they have lost nothing by being rounded.

    Raises:
        UserError: a touched tensor is absent or its content differs.
    """
    state = model.hf.state_dict()
    for name, digest in delta.facts["touched"].items():
        if name not in state or not has_digest(state[name], digest):
            where = f"{name} of {model.source}"
            then, now = delta.facts.get("dtype", ""), str(model.dtype).removeprefix("torch.")
            if name in state and _is_rounded(then, model.dtype):
                raise UserError(
                    f"A delta fits only the weights it was trained on, {where} is rounded to {now} "
                    f"here and was {then} in {delta.facts['base']}, so that they cannot be "
                    f"compared; load the model in {then}."
                )
            raise UserError(
                f"A delta fits only the weights it was trained on, {where} differs from "
                f"{delta.facts['base']}; load that model."
            )


def _is_rounded(then: str, now: torch.dtype) -> bool:
    """Whether a type does not hold all numbers of another one, given by its name."""
    known = {str(kind).removeprefix("torch."): kind for kind in KINDS}
    return then in known and torch.promote_types(known[then], now) != now


@contextmanager
def merged(model: Model, delta: Delta) -> Iterator[None]:
    """The model with a delta added to its weights; on leaving, the base bytes are restored.

    Raises:
        UserError: the delta was trained on other weights.
    """
    check_base(model, delta)
    parameters = dict(model.hf.named_parameters(remove_duplicate=False))
    kept = {name: parameters[name].detach().clone() for name in sorted(delta.names)}
    try:
        with torch.no_grad():
            for name, base in kept.items():
                parameters[name].copy_(delta.added(name, base))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
