"""The proof that nothing outside the tuned places changed: every byte against the base.

A merged checkpoint declares which parts of which tensors may differ (`circuitune.merging`). All
other bytes of all shards are compared with the base's, header by header and tensor by tensor. The
inside is compared with base + delta where the delta is given, and else with the digests that were
taken when it was written. The declaration itself is only as good as its author: give the delta, or
read the places that are reported.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from circuitune.bases import checkpoint_folder, open_base, other_files, tuned_folder
from circuitune.deltas import COMPONENTS, DELTA, Delta, load_delta, tensor_digest
from circuitune.errors import UserError
from circuitune.merging import Declaration, Merged, read_merged
from circuitune.tensorfiles import TYPES, TensorFile, files_of, first_difference, first_outside

WIDENED = ("BF16", "F16")


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` has proven.

    Attributes:
        folder: the merged checkpoint, or the folder of the delta.
        base: the base model's name.
        components: the heads and MLPs that were tuned, as the record names them.
        tensors: tensors compared: all of a merged checkpoint, the touched ones of a delta.
        touched: how many of them may differ from the base.
        shards: files compared; 0 for a delta.
        compared: bytes of the compared tensors.
        inside: bytes that may differ from the base.
        proof: what the inside was compared with: base + ``delta``, the ``digest`` of what was
            written, or, for a delta, ``nothing``.
        other_files: files without weights that differ from the base's, or are absent there.
        seconds: how long it took.
    """

    folder: Path
    base: str
    components: tuple[str, ...]
    tensors: int
    touched: int
    shards: int
    compared: int
    inside: int
    proof: Literal["delta", "digest", "nothing"]
    other_files: tuple[str, ...]
    seconds: float


def verify(tuned: Path, base: str, *, delta: Path | None = None) -> VerifyReport:
    """Prove that a tuned model is its base outside the declared places.

    Args:
        tuned: a merged checkpoint, a folder with a delta, or a run directory whose ``tuned`` holds
            one. Of a delta only the digests of the touched base tensors can be checked.
        base: the base model's name.
        delta: the folder of the delta that a checkpoint was merged from.

    Raises:
        UserError: something differs; the sentence names the tensor and the first index.
    """
    started = time.monotonic()
    folder = tuned_folder(tuned)
    if (folder / DELTA).is_file():
        if delta is not None:
            raise UserError(
                f"--delta belongs to a merged checkpoint, {tuned} is a delta itself; leave it out."
            )
        return _verify_delta(folder, base, started)
    record = read_merged(tuned)
    known = None if delta is None else _matching_delta(record, tuned_folder(delta))
    source = checkpoint_folder(base)
    theirs, ours = files_of(source), files_of(tuned)
    # Before the merged files, since with a wrong base everything else would differ too.
    _check_base(record, theirs, base)
    _check_layout(ours, theirs, base)
    for mine, other in zip(ours, theirs, strict=True):
        for name in other.tensors:
            declared = record.tensors.get(name)
            if declared is None:
                _check_untouched(mine, other, name)
            else:
                _check_touched(mine, other, name, declared, known)
    inside = sum(_inside(ours, name, declared) for name, declared in record.tensors.items())
    return VerifyReport(
        folder=tuned,
        base=base,
        components=_components(record.facts),
        tensors=sum(len(file.tensors) for file in ours),
        touched=len(record.tensors),
        shards=len(ours),
        compared=sum(span.size for file in ours for span in file.tensors.values()),
        inside=inside,
        proof="digest" if known is None else "delta",
        other_files=_changed_files(tuned, source),
        seconds=time.monotonic() - started,
    )


def _verify_delta(folder: Path, base: str, started: float) -> VerifyReport:
    """Check that the tensors which a delta is added to are those that it was trained on."""
    delta = load_delta(folder)
    source = open_base(base)
    tuned = source.tuned(delta)
    inside = compared = 0
    for file in source.files:
        for stored in tuned.keys() & file.tensors.keys():
            span = file.tensors[stored]
            compared += span.size
            inside += _count(span.shape, delta.places(tuned[stored])) * span.item
    return VerifyReport(
        folder=folder,
        base=base,
        components=_components(delta.facts),
        tensors=len(tuned),
        touched=len(tuned),
        shards=0,
        compared=compared,
        inside=inside,
        proof="nothing",
        other_files=(),
        seconds=time.monotonic() - started,
    )


def _components(facts: dict[str, object]) -> tuple[str, ...]:
    found = facts.get("components")
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _matching_delta(record: Merged, folder: Path) -> Delta:
    """The delta in a folder, refused if the checkpoint was not merged from one of its places."""
    delta = load_delta(folder)
    for stored, declared in record.tensors.items():
        known = delta.places(declared.name) if declared.name in delta.names else []
        if set(map(repr, declared.slices)) - set(map(repr, known)):
            raise UserError(
                f"A checkpoint may declare only places of its delta, {record.folder} has others "
                f"in {stored} than {folder}; give the delta that it was merged from."
            )
    if absent := sorted(delta.names - {declared.name for declared in record.tensors.values()}):
        raise UserError(
            f"A checkpoint must hold its whole delta, {record.folder} says nothing of {absent[0]} "
            f"in {folder}; give the delta that it was merged from."
        )
    return delta


def _check_base(record: Merged, theirs: list[TensorFile], base: str) -> None:
    """Refuse a base in which a tuned tensor is not what the checkpoint was merged from."""
    where = {name: file for file in theirs for name in file.tensors}
    for name, declared in record.tensors.items():
        if name not in where or tensor_digest(where[name].read(name)) != declared.base:
            raise UserError(
                f"--base must be the checkpoint that was merged, {name} of {base} is not that of "
                f"{record.facts.get('base')}, from which {record.folder} was made; name that one."
            )


def _check_layout(ours: list[TensorFile], theirs: list[TensorFile], base: str) -> None:
    """Refuse tensors that are missing, surplus, in another shard, or of another shape or type."""
    mine = {name: (file, span) for file in ours for name, span in file.tensors.items()}
    other = {name: (file, span) for file in theirs for name, span in file.tensors.items()}
    folder = ours[0].path.parent
    for name in sorted(other.keys() ^ mine.keys()):
        fault = "is missing" if name in other else "is surplus"
        raise _differs(folder, name, fault, base)
    for name, (file, span) in other.items():
        found, has = mine[name]
        if found.path.name != file.path.name:
            raise _differs(folder, name, f"lies in {found.path.name}", base)
        if has.shape != span.shape:
            raise _differs(folder, name, f"has the shape {has.shape}, not {span.shape}", base)
        if has.dtype != span.dtype and (has.dtype != "F32" or span.dtype not in WIDENED):
            raise _differs(folder, name, f"is of type {has.dtype}, not {span.dtype}", base)
    names = [[file.path.name for file in files] for files in (ours, theirs)]
    if names[0] != names[1]:
        raise UserError(
            f"A merged checkpoint must have the shards of its base, {folder} has {len(names[0])}, "
            f"{base} has {len(names[1])}; export it again."
        )


def _differs(folder: Path, name: str, fault: str, base: str) -> UserError:
    return UserError(
        f"A merged checkpoint must have the tensors of its base, {name} of {folder} {fault} "
        f"compared with {base}; do not use it, or export it again."
    )


def _check_untouched(mine: TensorFile, other: TensorFile, name: str) -> None:
    index = first_difference(mine, other, name)
    if index is not None:
        raise _changed(mine, name, index)


def _changed(file: TensorFile, name: str, index: tuple[int, ...]) -> UserError:
    return UserError(
        f"Every byte outside the declared places must be the base's, {name} in {file.path} differs "
        f"first at {list(index)}; do not use this checkpoint, or export it again."
    )


def _check_touched(
    mine: TensorFile, other: TensorFile, name: str, declared: Declaration, delta: Delta | None
) -> None:
    """Compare a tuned tensor with the base outside its places, and with what is due inside."""
    found = mine.read(name)
    base = other.read(name).to(found.dtype)
    _check_places(mine, name, declared, base)
    index = first_outside(found, base, declared.slices)
    if index is not None:
        raise _changed(mine, name, index)
    if delta is not None:
        index = first_outside(found, delta.added(declared.name, base))
    elif tensor_digest(found) != declared.merged:
        index = ()
    if index is not None:
        where = f"differs first at {list(index)}" if index else "has other bytes"
        due = "base + delta" if delta is not None else "as it was written"
        raise UserError(
            f"Every tuned place must be {due}, {name} in {mine.path} {where}; do not use this "
            "checkpoint, or export it again."
        )


def _check_places(file: TensorFile, name: str, declared: Declaration, base: Tensor) -> None:
    """Refuse places that the tensor does not have, which slices would pass in silence."""
    for place, words in zip(declared.slices, declared.places, strict=True):
        fits = len(place) <= base.ndim and all(
            part == slice(None) or 0 <= part.start < part.stop <= size
            for part, size in zip(place, base.shape, strict=False)
        )
        if not fits:
            raise UserError(
                f"Every declared place must lie in its tensor, {name} in {file.path} has no "
                f"{words}; restore {COMPONENTS} or export it again."
            )


def _count(shape: tuple[int, ...], places: list[tuple[slice, ...]]) -> int:
    """How many numbers lie in some places of a tensor, each once."""
    touched = np.zeros(shape, bool)
    for place in places:
        touched[place] = True
    return int(touched.sum())


def _inside(files: list[TensorFile], name: str, declared: Declaration) -> int:
    """Bytes of the declared places of a tensor."""
    span = next(file.tensors[name] for file in files if name in file.tensors)
    return _count(span.shape, declared.slices) * TYPES[span.dtype].itemsize


def _changed_files(tuned: Path, base: Path) -> tuple[str, ...]:
    """Names of the files without weights whose content is not the base's."""
    return tuple(
        file.name
        for file in other_files(tuned)
        if not (base / file.name).is_file() or file.read_bytes() != (base / file.name).read_bytes()
    )
