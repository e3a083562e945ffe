"""Weights that are not all in memory: read from safetensors when needed, freed after use.

- `Shards` reads single tensors of a checkpoint by plain file reads. A memory map would be shorter,
  but torch maps a whole shard privately for each tensor, and a limit on a process's memory counts
  every such map.
- `offload` gives a module's weights to accelerate's hooks (one load per call of each part).
- `resident` keeps what is loaded inside it, so that many calls of a layer read it once. It serves
  any model that accelerate dispatched (``device_map``), not only those of `offload`.
- `widened` computes in float32 with the values of lower-precision weights: a patch changes the
  residual stream by less than bfloat16 can hold.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitune.errors import UserError

# Names of types in safetensors headers.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed activations for the next layer.

    glibc gives freed blocks back to the system until it has seen one of their size freed (up to
    32 MiB); until then each layer pays for fresh pages, up to a tenth of a sweep.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed on the spot


class Unallocated(TorchFunctionMode):
    """Inside, ``torch.empty`` takes no memory: modules make their weights with it, not buffers.

    accelerate's ``init_empty_weights`` frees each weight once it is made; the freed memory leaves
    holes that count against a hard limit.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Move ``torch.empty`` to the meta device."""
        kwargs = kwargs or {}
        return func(*args, **kwargs | {"device": "meta"} if func is torch.empty else kwargs)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, first byte, number of bytes, type and shape."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype)
        data = _pages(self.size)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            if stream.readinto(data) != self.size:
                raise UserError(f"{self.file} must stay whole while it is read, it became shorter.")
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def _pages(size: int) -> bytearray | mmap.mmap:
    """Memory that goes back to the system at once when it is freed; the heap would keep holes."""
    if os.name != "posix":
        return bytearray(size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge := getattr(mmap, "MADV_HUGEPAGE", None):
        pages.madvise(huge)  # clearing small pages one by one takes as long as reading
    return pages


@dataclass(frozen=True)
class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read anew whenever it is looked up.

    Attributes:
        stored: where every tensor lies.
    """

    stored: dict[str, Stored]

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        """The tensors of a checkpoint folder, from the headers alone.

        Raises:
            UserError: there are no safetensors files, or one is damaged or of an unknown type.
        """
        found: dict[str, Stored] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                found |= _header(file)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"Every shard must be a whole safetensors file of floating-point weights, "
                    f"{file} is not ({type(error).__name__}: {str(error)[:80]}); download it again."
                ) from error
        if not found:
            raise UserError(
                f"A checkpoint that is read in parts must hold *.safetensors files, {folder} "
                "has none; save the model with save_pretrained."
            )
        return cls(found)

    def renamed(self, name_of: Callable[[str], str]) -> "Shards":
        """The same tensors under other names."""
        return Shards({name_of(name): item for name, item in self.stored.items()})

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(item.count for item in self.stored.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def fill(self, module: nn.Module, device: torch.device, names: Sequence[str]) -> None:
        """Load parameters of a module by name, each in the type that it has there."""
        for name in names:
            owner, _, last = name.rpartition(".")
            holder = module.get_submodule(owner)
            value = self[name].to(device, holder._parameters[last].dtype)
            holder._parameters[last] = nn.Parameter(value, requires_grad=False)


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    found = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = TYPES[entry["dtype"]]
            found[name] = Stored(file, 8 + length + start, end - start, dtype, shape)
    if found and max(item.start + item.size for item in found.values()) != file.stat().st_size:
        raise ValueError("its size is not what its header says")
    return found


def offload(layer: nn.Module, shards: Shards, prefix: str, device: torch.device) -> None:
    """Let accelerate load the weights of a layer from the shards whenever a part of it runs."""
    names = [name for name, _ in layer.named_parameters()]
    cpu_offload(layer, device, state_dict=_Part(shards, prefix, tuple(names)))


@dataclass(frozen=True)
class _Part(Mapping[str, Tensor]):
    """The tensors of one module, by their names inside it."""

    shards: Shards
    prefix: str
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Held(ModelHook):
    """An offloading hook that loads once and frees at the end."""

    def __init__(self, hook: AlignDevicesHook) -> None:
        self.hook = hook
        self.loaded = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Load at the first call; later calls only move their inputs."""
        self.hook.offload = not self.loaded
        self.loaded = True
        try:
            return self.hook.pre_forward(module, *args, **kwargs)
        finally:
            self.hook.offload = True

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Keep the weights."""
        return output

    def release(self, module: nn.Module) -> None:
        """Free what was loaded, and put the hook back."""
        module._hf_hook = self.hook
        if self.loaded:
            self.hook.post_forward(module, None)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Inside, weights that accelerate offloads stay from their first use on; freed at the end."""
    held: list[tuple[nn.Module, _Held]] = []
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            held.append((part, _Held(hook)))
            part._hf_hook = held[-1][1]
    try:
        yield
    finally:
        for part, hook in held:
            hook.release(part)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside, all weights of an offloaded module are in memory, whether it runs or not."""
    with resident(module):
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            if isinstance(hook, _Held):
                hook.pre_forward(part)
        yield


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside, bfloat16 and float16 weights are float32 with the same values.

    Offloaded weights are loaded for it. Quantised weights are left as they are, their modules
    take float32 inputs.
    """
    low = (torch.bfloat16, torch.float16)
    if not any(weight.dtype in low for weight in module.parameters()):
        with resident(module):
            yield
        return
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    with present(module):
        try:
            for part in module.modules():
                for name, weight in part._parameters.items():
                    if weight is not None and weight.dtype in low:
                        kept.append((part, name, weight))
                        part._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)
            yield
        finally:
            for part, name, weight in kept:
                part._parameters[name] = weight
