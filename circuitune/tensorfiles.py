"""Safetensors files as bytes: read, rewritten and compared in pieces, never a whole file at once.

`circuitune.weights` gives the tensors of a checkpoint to a model that runs. Here the bytes count:
every type that a file can hold passes through untouched, known or not, and a header that need not
change is written as it was read. Format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from circuitune.errors import UserError
from circuitune.weights import TYPES

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Bytes read at a time; a multiple of every item size.
PIECE = 16 * 2**20
METADATA = "__metadata__"


@dataclass(frozen=True)
class Span:
    """One tensor in a file: type by its name in the header, shape, first and last byte + 1."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return self.stop - self.start

    @property
    def item(self) -> int:
        """Bytes of one number; 1 where there are none."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return self.size // count if count and self.size >= count else 1


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file and where everything in it lies.

    Attributes:
        path: the file.
        header: its JSON header as it was read, padding included.
        tensors: where each tensor lies, counted from the first byte of the file, in file order.
    """

    path: Path
    header: bytes
    tensors: dict[str, Span]

    @classmethod
    def of(cls, path: Path) -> "TensorFile":
        """Read the header of a file.

        Raises:
            UserError: the file is absent, damaged or cut short.
        """
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = stream.read(length)
            spans = spans_of(header)
            ends = [8 + length, *(span.stop for span in spans.values())]
            starts = [span.start for span in spans.values()]
            if starts != ends[:-1] or ends[-1] != path.stat().st_size:
                raise ValueError("its size is not what its header says")
            return cls(path, header, spans)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"Every shard must be a whole safetensors file, {path} is not "
                f"({type(error).__name__}: {str(error)[:80]}); download or export it again."
            ) from error

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, piece by piece."""
        span = self.tensors[name]
        with self.path.open("rb") as stream:
            stream.seek(span.start)
            for start in range(0, span.size, PIECE):
                yield stream.read(min(PIECE, span.size - start))

    def read(self, name: str) -> Tensor:
        """A floating-point tensor, in memory of its own.

        Raises:
            UserError: its type is none that a model computes in.
        """
        span = self.tensors[name]
        if span.dtype not in TYPES:
            raise UserError(
                f"A tuned tensor must be stored as plain floating-point numbers, {name} in "
                f"{self.path} is of type {span.dtype}; name an unquantised checkpoint by --base."
            )
        if not span.size:
            return torch.empty(span.shape, dtype=TYPES[span.dtype])
        data = bytearray()
        for piece in self.pieces(name):
            data += piece
        return torch.frombuffer(data, dtype=TYPES[span.dtype]).reshape(span.shape)


def spans_of(header: bytes) -> dict[str, Span]:
    """Where the tensors lie in a file with this header, in file order."""
    first = 8 + len(header)
    entries = {name: entry for name, entry in json.loads(header).items() if name != METADATA}
    spans = {
        name: Span(
            entry["dtype"],
            tuple(entry["shape"]),
            first + entry["data_offsets"][0],
            first + entry["data_offsets"][1],
        )
        for name, entry in entries.items()
    }
    return dict(sorted(spans.items(), key=lambda pair: (pair[1].start, pair[1].stop)))


def files_of(folder: Path) -> list[TensorFile]:
    """The shards that transformers loads from a checkpoint folder: one file, or those of an index.

    Raises:
        UserError: there are none, or one is damaged.
    """
    if (folder / WHOLE).is_file():
        return [TensorFile.of(folder / WHOLE)]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"A checkpoint folder must hold {WHOLE}, or {INDEX} and its shards, {folder} does not "
            f"({type(error).__name__}: {str(error)[:80]}); save the model with save_pretrained."
        ) from error
    return [TensorFile.of(folder / name) for name in names]


def widened_header(header: bytes) -> bytes:
    """The header of the same tensors with bfloat16 and float16 ones as float32."""
    entries: dict[str, Any] = json.loads(header)
    spans = spans_of(header)
    end = 0
    for name, span in spans.items():
        widen = span.dtype in ("BF16", "F16")
        size = span.size * 2 if widen else span.size
        entries[name]["dtype"] = "F32" if widen else span.dtype
        entries[name]["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def data_size(header: bytes) -> int:
    """Bytes that the tensors of a header take."""
    return sum(span.size for span in spans_of(header).values())


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def cast(piece: bytes, was: str, becomes: str) -> bytes:
    """Numbers of one type as numbers of another, once rounded; untouched if the types agree."""
    if was == becomes or not piece:
        return piece
    numbers = torch.frombuffer(bytearray(piece), dtype=TYPES[was])
    return raw(numbers.to(TYPES[becomes]))


Change = Callable[[Tensor], Tensor]


def rewrite(
    source: TensorFile, target: Path, header: bytes, changes: Mapping[str, Change]
) -> tuple[str, str]:
    """Write a file with other values of some tensors, or other types; the rest passes as it is.

    Args:
        source: the file to read.
        target: the file to write.
        header: its header, with the names and shapes of the source.
        changes: what a tensor becomes, of the type that ``header`` gives it, by its name.

    Returns:
        sha256 of the source's bytes, and of the target's.
    """
    read, written = hashlib.sha256(), hashlib.sha256()

    def put(stream: BinaryIO, data: bytes) -> None:
        written.update(data)
        stream.write(data)

    read.update(len(source.header).to_bytes(8, "little") + source.header)
    after = spans_of(header)
    with target.open("wb") as stream:
        put(stream, len(header).to_bytes(8, "little") + header)
        for name, span in source.tensors.items():
            if name in changes:
                value = source.read(name)
                read.update(raw(value))
                put(stream, raw(changes[name](value)))
                continue
            for piece in source.pieces(name):
                read.update(piece)
                put(stream, cast(piece, span.dtype, after[name].dtype))
    return read.hexdigest(), written.hexdigest()


def first_difference(ours: TensorFile, theirs: TensorFile, name: str) -> tuple[int, ...] | None:
    """Index of the first number of a tensor that differs between two files, None if none does.

    Where ``theirs`` is of a narrower type, its numbers are compared in the type of ``ours``.
    """
    mine, base = ours.tensors[name], theirs.tensors[name]
    passed = 0  # bytes of ``ours`` that are known to agree
    if mine.dtype == base.dtype:
        pairs = zip(ours.pieces(name), theirs.pieces(name), strict=True)
    else:
        pairs = _cast_pairs(ours, theirs, name)
    for found, expected in pairs:
        if found != expected:
            unequal = np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8)
            flat = (passed + int(unequal.argmax())) // mine.item
            return tuple(int(i) for i in np.unravel_index(flat, mine.shape))
        passed += len(found)
    return None


def _cast_pairs(ours: TensorFile, theirs: TensorFile, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of a tensor, and the pieces of a narrower one in the same type."""
    was, becomes = theirs.tensors[name].dtype, ours.tensors[name].dtype
    with ours.path.open("rb") as stream:
        stream.seek(ours.tensors[name].start)
        for piece in theirs.pieces(name):
            expected = cast(piece, was, becomes)
            yield stream.read(len(expected)), expected


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of every number of a tensor: uint8, its shape and a last axis over bytes."""
    flat = np.frombuffer(raw(tensor), np.uint8)
    return flat.reshape(*tensor.shape, tensor.element_size())


def first_outside(
    found: Tensor,
    expected: Tensor,
    places: Sequence[tuple[slice, ...]] = (),
) -> tuple[int, ...] | None:
    """Index of the first number outside some places whose bytes differ; None if none does."""
    unequal = (bytes_of(found) != bytes_of(expected)).any(axis=-1)
    for place in places:
        unequal[place] = False
    if not unequal.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(unequal.argmax()), unequal.shape))
