"""Merged checkpoints: a delta written into a copy of its base, and taken out again.

The copy is made file by file, piece by piece: headers, layout, index, metadata and every byte
outside the tuned places stay as they are. Base and delta are added in float32 and cast once to
the stored type. Rounding to a 16-bit type loses part of a small delta, so the merged model is run
against the exact one, and the difference is reported.

A merged folder also holds ``components.json`` (the delta's record, and under ``merged`` the tuned
places with digests, see `Declaration`) and a folder ``revert`` with the base's own bytes of these
places. They lie in a folder of their own since some servers load every ``*.safetensors`` beside
``config.json``.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuitune import __version__, models
from circuitune.bases import (
    Base,
    copy_other_files,
    fits,
    live_model,
    logits,
    new_folder,
    open_base,
    tuned_folder,
)
from circuitune.deltas import COMPONENTS, DELTA, Delta, load_delta, tensor_digest
from circuitune.errors import UserError
from circuitune.runs import write_json
from circuitune.tensorfiles import (
    INDEX,
    TensorFile,
    data_size,
    files_of,
    rewrite,
    spans_of,
    widened_header,
)

REVERT = "revert"
BASE_SLICES = "base_slices.safetensors"
PLACE = re.compile(r"(rows|cols)=(\d+):(\d+)")


# ------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Declaration:
    """What a merged checkpoint says about one tuned tensor; ``merged`` in ``components.json``.

    Attributes:
        name: the tensor's name in the delta, which may differ from the stored one.
        places: the parts that may differ from the base, such as ``rows=8:16``, as stored.
        base: sha256 of the base tensor's stored bytes.
        merged: sha256 of the bytes that were written.
    """

    name: str
    places: tuple[str, ...]
    base: str
    merged: str

    @property
    def slices(self) -> list[tuple[slice, ...]]:
        """The places as indices of the tensor."""
        return [_place(text) for text in self.places]


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint folder.

    Attributes:
        folder: where it is.
        facts: the delta's record: base model, components, method, options.
        tensors: the declaration of each tuned tensor, by stored name.
        base_files: sha256 of each of the base's shards.
        delta: sha256 of the delta's file.
    """

    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Declaration]
    base_files: dict[str, str]
    delta: str


def read_merged(folder: Path) -> Merged:
    """The record of a merged checkpoint.

    Raises:
        UserError: the folder is not one that `merge` wrote.
    """
    try:
        facts = json.loads((folder / COMPONENTS).read_text(encoding="utf-8"))
        record = facts.pop("merged")
        tensors = {
            name: Declaration(entry["name"], tuple(entry["places"]), entry["base"], entry["merged"])
            for name, entry in record["tensors"].items()
        }
        for declared in tensors.values():
            if not declared.slices:
                raise ValueError(f"{declared.name} has no places")
        return Merged(folder, facts, tensors, dict(record["base_files"]), record["delta"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"A merged checkpoint must hold the {COMPONENTS} that `circuitune export --as merged` "
            f"wrote, {folder} does not ({type(error).__name__}: {str(error)[:80]}); check the path."
        ) from error


def _place(text: str) -> tuple[slice, ...]:
    """Index of a place, from the words of a delta's keys."""
    if text == "all":
        return ()
    found = PLACE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no place")
    axis, start, stop = found.groups()
    part = slice(int(start), int(stop))
    return (part,) if axis == "rows" else (slice(None), part)


def _words(place: tuple[slice, ...]) -> str:
    """A place in the words of a delta's keys."""
    axes = [(axis, part) for axis, part in zip(("rows", "cols"), place, strict=False)]
    limits = [f"{axis}={part.start}:{part.stop}" for axis, part in axes if part != slice(None)]
    return limits[0] if limits else "all"


# ------------------------------------------------------------------------------------- merge


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        folder: the merged checkpoint.
        base: the base model's name.
        tensors: names of the tensors that changed, as stored.
        shards: files of weights.
        size: bytes of these files.
        numbers: how many numbers the delta may change.
        changed: how many of them differ from the base after rounding.
        difference: largest difference of a logit between the merged model and base + delta in
            float32, both computed in float32, on plain text; None if the model does not fit into
            memory.
        seconds: how long it took.
    """

    folder: Path
    base: str
    tensors: tuple[str, ...]
    shards: int
    size: int
    numbers: int
    changed: int
    difference: float | None
    seconds: float


@dataclass
class _Ledger:
    """What is learnt while shards are written."""

    slices: dict[str, Tensor]
    tensors: dict[str, Declaration]
    numbers: int = 0
    changed: int = 0

    def adder(self, stored: str, name: str, delta: Delta, wide: bool) -> Callable[[Tensor], Tensor]:
        """The change that adds the delta to one stored tensor, and notes what it replaces."""

        def add(base: Tensor) -> Tensor:
            places = delta.places(name)
            least = torch.promote_types(base.dtype, torch.float32) if wide else base.dtype
            full = delta.added(name, base.to(least))
            touched = torch.zeros(base.shape, dtype=torch.bool)
            for place in places:
                self.slices[f"{stored}#{_words(place)}"] = base[place].clone()
                touched[place] = True
            self.numbers += int(touched.sum())
            self.changed += int((full != base.to(full.dtype)).sum())
            words = tuple(_words(place) for place in places)
            self.tensors[stored] = Declaration(
                name, words, tensor_digest(base), tensor_digest(full)
            )
            return full

        return add

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of itself: this program, and every touched tensor."""
        entries = sorted(self.tensors.items())
        return {
            "circuitune": __version__,
            "tensors": {name: asdict(entry) for name, entry in entries},
        }


def _is_wide(dtype: str | None) -> bool:
    if dtype not in (None, "float32"):
        raise UserError(
            f"--dtype of a merged checkpoint must be float32 or left out, found {dtype!r}; without "
            "it every tensor keeps its stored type."
        )
    return dtype == "float32"


def merge(
    delta_folder: Path, out: Path, *, base: str | None = None, dtype: str | None = None
) -> MergeReport:
    """Write base + delta as a checkpoint that any program loads, in the layout of the base.

    Args:
        delta_folder: a folder with a delta, or a run directory whose ``tuned`` holds one.
        out: the folder to make.
        base: the base model, if it is not at the place that the delta names.
        dtype: ``float32`` to store all tensors of 16-bit types in float32, which loses nothing of
            the delta; by default every tensor keeps its stored type.

    Raises:
        UserError: the delta does not fit the base, or ``out`` cannot be written.
    """
    started = time.monotonic()
    wide = _is_wide(dtype)
    folder = tuned_folder(delta_folder)
    delta = load_delta(folder)
    source = open_base(base or delta.facts["base"])
    tuned = source.tuned(delta)
    headers = {
        file.path.name: widened_header(file.header) if wide else file.header
        for file in source.files
    }
    size = sum(map(data_size, headers.values()))
    ledger = _Ledger({}, {})
    with new_folder(out, size) as work:
        copy_other_files(source.folder, work)
        (work / REVERT).mkdir()
        base_files = {}
        for file in source.files:
            changes = {
                name: ledger.adder(name, tuned[name], delta, wide)
                for name in file.tensors
                if name in tuned
            }
            header = headers[file.path.name]
            base_files[file.path.name], _ = rewrite(file, work / file.path.name, header, changes)
            if header != file.header:
                (work / REVERT / f"{file.path.name}.header").write_bytes(file.header)
        if wide:
            _note_widening(work, size)
        save_file(ledger.slices, work / REVERT / BASE_SLICES)
        shutil.copymode(work / "config.json", work / REVERT / BASE_SLICES)  # else the owner's alone
        record = {"delta": file_digest(folder / DELTA), "base_files": base_files}
        record |= ledger.record()
        write_json(work / COMPONENTS, delta.facts | {"base": source.name, "merged": record})
        difference = _difference(source, delta, work)
    return MergeReport(
        folder=out,
        base=source.name,
        tensors=tuple(sorted(tuned)),
        shards=len(source.files),
        size=size,
        numbers=ledger.numbers,
        changed=ledger.changed,
        difference=difference,
        seconds=time.monotonic() - started,
    )


def _note_widening(work: Path, size: int) -> None:
    """Say float32 in the configuration and the new size in the index; keep what they said."""
    for name in ("config.json", INDEX):
        if not (work / name).is_file():
            continue
        shutil.copyfile(work / name, work / REVERT / name)
        content = json.loads((work / name).read_text(encoding="utf-8"))
        if name == INDEX:
            content["metadata"] = (content.get("metadata") or {}) | {"total_size": size}
        else:
            content |= {key: "float32" for key in ("dtype", "torch_dtype") if key in content}
        write_json(work / name, content)


def file_digest(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _difference(base: Base, delta: Delta, folder: Path) -> float | None:
    """Largest difference of a logit between the exact model and the checkpoint in a folder."""
    if not fits(base):
        return None
    exact = live_model(base, delta)
    expected = logits(exact.hf, exact)
    del exact  # two models need not fit
    stored = models.load(str(folder), device="cpu", dtype="float32")
    return float((logits(stored.hf, stored) - expected).abs().max())


# ------------------------------------------------------------------------------------- revert


@dataclass(frozen=True)
class RevertReport:
    """What `revert` did.

    Attributes:
        folder: the restored base.
        base: the base model's name.
        tensors: how many tensors were restored.
        shards: files of weights, each equal to the base's by its sha256.
        size: bytes of these files.
        seconds: how long it took.
    """

    folder: Path
    base: str
    tensors: int
    shards: int
    size: int
    seconds: float


def revert(merged: Path, out: Path) -> RevertReport:
    """Restore the base from a merged checkpoint, byte for byte, without the base at hand.

    Raises:
        UserError: the folder is no merged checkpoint, something in it has changed since, or
            ``out`` cannot be written.
    """
    started = time.monotonic()
    record = read_merged(merged)
    files = files_of(merged)
    kept = _read_slices(record)
    size = sum(file.path.stat().st_size for file in files)
    with new_folder(out, size) as work:
        copy_other_files(merged, work)
        for name in ("config.json", INDEX):
            if (merged / REVERT / name).is_file():
                shutil.copyfile(merged / REVERT / name, work / name)
        written = 0
        for file in files:
            changes = {
                name: _restorer(name, entry, kept)
                for name, entry in record.tensors.items()
                if name in file.tensors
            }
            target = work / file.path.name
            _, digest = rewrite(file, target, _base_header(merged, file), changes)
            written += target.stat().st_size
            if digest != record.base_files.get(file.path.name):
                raise UserError(
                    f"A merged checkpoint must be as it was written, {file.path} has changed "
                    "outside the tuned places since; `circuitune verify` tells where."
                )
    return RevertReport(
        folder=out,
        base=record.facts["base"],
        tensors=len(record.tensors),
        shards=len(files),
        size=written,
        seconds=time.monotonic() - started,
    )


def _base_header(merged: Path, file: TensorFile) -> bytes:
    path = merged / REVERT / f"{file.path.name}.header"
    if not path.is_file():
        return file.header
    try:
        header = path.read_bytes()
        spans_of(header)
        return header
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must be as `circuitune export` wrote it, it cannot be read "
            f"({type(error).__name__}); take the folder from a copy."
        ) from error


def _read_slices(record: Merged) -> Mapping[str, Tensor]:
    """The base's own bytes of the tuned places.

    Raises:
        UserError: they are absent or damaged.
    """
    path = record.folder / REVERT / BASE_SLICES
    try:
        with safe_open(path, framework="pt") as stored:
            return {
                f"{name}#{place}": stored.get_tensor(f"{name}#{place}")
                for name, entry in record.tensors.items()
                for place in entry.places
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"A merged checkpoint must keep the base's bytes in {REVERT}/{BASE_SLICES}, {path} "
            f"cannot be read ({str(error)[:80]}); take the base itself."
        ) from error


def _restorer(
    name: str, entry: Declaration, kept: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The change that puts the base's bytes back into one tensor, checked against its digest."""

    def restore(merged: Tensor) -> Tensor:
        parts = [kept[f"{name}#{place}"] for place in entry.places]
        base = merged.to(parts[0].dtype)
        for place, part in zip(entry.slices, parts, strict=True):
            base[place] = part
        if tensor_digest(base) != entry.base:
            raise UserError(
                f"A merged checkpoint must be as it was written, {name} has changed outside "
                "the tuned places since; `circuitune verify` tells where."
            )
        return base

    return restore
