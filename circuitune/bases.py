"""The checkpoint under a delta: its files on disk, and new folders made from it.

A checkpoint may name its tensors otherwise than the model in memory, since transformers renames
those of old ones when it loads them, and tied tensors have one value under several names; `Base`
knows which stored tensors a delta changes.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from circuitune import models
from circuitune.checkpoints import resolve
from circuitune.deltas import COMPONENTS, DELTA, Delta, has_digest
from circuitune.errors import UserError
from circuitune.models import Model, renaming, skeleton
from circuitune.tensorfiles import INDEX, TensorFile, files_of
from circuitune.writing import encode_text, shipped_paragraphs

# Files that hold weights in some format; all others of a checkpoint are copied as they are.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt")
TEMPLATES = "additional_chat_templates"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
# Plain text on which models are compared: paragraphs, and tokens of each.
PARAGRAPHS, TOKENS = 3, 128
# A model is run if its float32 weights take at most this share of the memory that is free.
SHARE = 0.7


# ---------------------------------------------------------------------------------- the base


@dataclass(frozen=True)
class Base:
    """The checkpoint under a delta, on disk.

    Attributes:
        name: as the user names it.
        address: what other programs load it by: a hub id or a folder.
        folder: where its files are.
        files: its shards.
        hf: the model without weights.
        live: the model's own name of each stored tensor; tied tensors share one.
        first: the one name that each name of the model goes by, tied names together.
    """

    name: str
    address: str
    folder: Path
    files: tuple[TensorFile, ...]
    hf: PreTrainedModel
    live: dict[str, str]
    first: dict[str, str]

    @property
    def numbers(self) -> int:
        """How many bytes its tensors take in float32, whatever they are stored in."""
        spans = (span for file in self.files for span in file.tensors.values())
        return sum(span.size // span.item * 4 for span in spans)

    def tuned(self, delta: Delta) -> dict[str, str]:
        """Name in the delta of every stored tensor that it changes, checked against its digest.

        Raises:
            UserError: a tensor is absent, or differs from what the delta was trained on.
        """
        names = {self.first.get(name, name): name for name in delta.names}
        found: dict[str, str] = {}
        for file in self.files:
            for stored in file.tensors:
                name = names.get(self.live[stored])
                if name is None:
                    continue
                found[stored] = name
                if not has_digest(file.read(stored), delta.facts["touched"][name]):
                    raise UserError(
                        f"A delta fits only the weights it was trained on, {name} of {self.name} "
                        f"differs from {delta.facts['base']}; name the right model by --base."
                    )
        if absent := sorted(delta.names - set(found.values())):
            raise UserError(
                f"A delta fits only the model it was trained on, {self.name} stores no tensor "
                f"{absent[0]}; name the right model by --base."
            )
        return found


def open_base(name: str) -> Base:
    """The checkpoint of a model name: folder, hub id, ``.gguf`` file or package.

    A ``.gguf`` file stands for its converted checkpoint (`circuitune.checkpoints.converted`).

    Raises:
        UserError: there is none, or it cannot be read.
    """
    where = resolve(name)
    folder = _downloaded(where, name)
    files = tuple(files_of(folder))
    try:
        hf = skeleton(AutoConfig.from_pretrained(folder), torch.float32, str(folder))
    except Exception as error:  # the hub and configuration libraries raise many kinds
        raise _cannot_open(name, error) from error
    first: dict[str, str] = {}
    by_tensor: dict[int, str] = {}
    for own, weight in hf.named_parameters(remove_duplicate=False):
        first[own] = by_tensor.setdefault(id(weight), own)
    rename = renaming(hf)
    stored = (key for file in files for key in file.tensors)
    live = {key: first.get(rename(key), rename(key)) for key in stored}
    address = str(folder.absolute()) if Path(where).is_dir() else name
    return Base(name, address, folder, files, hf, live, first)


def checkpoint_folder(name: str) -> Path:
    """The folder with all files of a checkpoint, downloaded or converted if need be.

    Raises:
        UserError: there is none.
    """
    return _downloaded(resolve(name), name)


def _downloaded(where: str, name: str) -> Path:
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub library raises many kinds
        raise _cannot_open(name, error) from error


def _cannot_open(name: str, error: Exception) -> UserError:
    return UserError(
        f"The base must be a model that can be read, {name} cannot ({type(error).__name__}: "
        f"{str(error)[:120]}); name it by --base."
    )


def tuned_folder(path: Path) -> Path:
    """The folder with a delta: the given one, or ``tuned`` in a run directory."""
    inside = path / "tuned"
    return inside if not (path / DELTA).is_file() and (inside / DELTA).is_file() else path


# -------------------------------------------------------------------------------- new folders


@contextmanager
def new_folder(out: Path, size: int = 0) -> Iterator[Path]:
    """A hidden folder beside ``out``, renamed to it at the end; after an exception it is gone.

    Args:
        out: a folder that is absent or empty.
        size: bytes that will be written.

    Raises:
        UserError: there is something already, or the disk is full or cannot be written.
    """
    out = Path(os.path.abspath(out))
    absent = [folder for folder in out.parents if not os.path.exists(folder)]
    work = out.with_name(f".{out.name}-{os.getpid()}")
    done = False
    try:
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(
                f"--out must be a new or an empty folder, {out} holds something; choose another."
            )
        work.mkdir(parents=True)
        if shutil.disk_usage(work).free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e9:.2f} GB are needed")
        yield work
        if out.is_dir():
            out.rmdir()
        work.rename(out)
        done = True
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out must be a folder on a disk with room, {out} could not be written "
            f"({getattr(error, 'strerror', None) or str(error)[:80]}); choose another folder or "
            "make room."
        ) from error
    finally:
        if not done:
            shutil.rmtree(work, ignore_errors=True)
            for folder in absent:
                with suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()


def copy_other_files(source: Path, target: Path) -> list[str]:
    """Copy what is not weights byte for byte: configuration, tokenizer, chat templates, licence.

    Returns:
        the names of the files.
    """
    names = [file.name for file in other_files(source)]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
    return names


def other_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold no weights and belong to the base."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in WEIGHTS
        and file.name != COMPONENTS
        and (file.name == INDEX or not file.name.endswith(".index.json"))
    ]


# -------------------------------------------------------------------------- the model itself


def logits(hf: torch.nn.Module, model: Model) -> Float[Tensor, "token vocab"]:
    """Logits at every token of a few paragraphs of plain text, one after the other."""
    limit = model.context or TOKENS
    texts = [encode_text(model.tokenizer, text) for text in shipped_paragraphs()[:PARAGRAPHS]]
    with torch.inference_mode():
        rows = [torch.tensor([tokens[: min(limit, TOKENS)]]) for tokens in texts]
        return torch.cat([hf(input_ids=row).logits[0] for row in rows])


def live_model(base: Base, delta: Delta) -> Model:
    """The base with the delta added, all in float32, on the CPU.

    Raises:
        UserError: the base cannot be loaded.
    """
    model = models.load(str(base.folder), device="cpu", dtype="float32")
    parameters = dict(model.hf.named_parameters(remove_duplicate=False))
    for name in delta.names:
        weight = parameters[name]
        weight.data = delta.added(name, weight.detach())
    return model


def fits(base: Base, *, width: int = 4) -> bool:
    """Whether the base can be run here in numbers of so many bytes."""
    return base.numbers // 4 * width <= SHARE * psutil.virtual_memory().available
