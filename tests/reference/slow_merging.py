"""A merged checkpoint the plain way: every tensor in memory, every delta added by its key."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors beside ``config.json``."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def merged_tensors(base: Path, delta: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Base + delta in float32, rounded once; for slices and whole tensors, stored names only."""
    found = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors_of(base).items()}
    for key, value in load_file(delta / "delta.safetensors").items():
        name, part = key.split("#")
        stored, dense = found[name], torch.zeros(found[name].shape)
        if part == "all":
            dense += value
        else:
            start, stop = map(int, part[5:].split(":"))
            view = dense.T if part[:4] == "cols" else dense
            view[start:stop] += value.T if part[:4] == "cols" else value
        inside = dense != 0
        total = (stored.float() + dense).to(stored.dtype)
        found[name] = torch.where(inside, total, stored)
    return found
