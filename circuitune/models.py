"""Load a decoder language model and refuse what is not understood.

A model is named by a Hugging Face id, a local checkpoint folder, a ``.gguf`` file, or
``package:NAME`` for weights inside an installed Python package (`circuitune.checkpoints`). No
remote code runs. A model that does not fit into a bound on memory keeps its layers on disk, and
each is read when it runs (`circuitune.weights`).
"""

import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    cache_utils,
    masking_utils,
    modeling_rope_utils,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging as hf_logging

from circuitune.checkpoints import folder_of, resolve
from circuitune.config import parse_size
from circuitune.errors import UserError
from circuitune.families import FAMILIES, LAYER_TYPES, REQUIRED, UNDERSTOOD, USUAL, Family
from circuitune.weights import Shards, Unallocated, keep_freed_memory, offload

# Weights stay in memory if they leave at least this share of the bound to everything else.
SHARE_FOR_WEIGHTS = 0.6


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
        max_memory: bytes that the process (on a GPU: torch) may take; None for no bound.
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
    max_memory: int | None = None

    @property
    def device(self) -> torch.device:
        """The device on which tokens enter the model."""
        embedding = self.hf.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        place = getattr(hook, "execution_device", None)  # of weights that are offloaded
        return embedding.weight.device if place is None else torch.device(place)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the model computes."""
        return self.hf.dtype

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in fewer bits than they are computed with."""
        return bool(getattr(self.hf.config, "quantization_config", None))

    @property
    def offloaded(self) -> bool:
        """Whether some layer's weights are loaded only when it runs."""
        return any(
            weight.device.type == "meta"
            for layer in attrgetter(self.family.layers)(self.hf)
            for weight in layer.parameters()
        )

    @property
    def parameters(self) -> int:
        """Number of parameters, tied weights counted once."""
        return sum(parameter.numel() for parameter in self.hf.parameters())

    @property
    def context(self) -> int | None:
        """The most tokens that the model was made for, if its configuration says so."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    @property
    def counts_positions(self) -> bool:
        """Whether each position has a learned embedding, so that none beyond `context` can run."""
        entry = self.hf.get_input_embeddings()
        parts = (part for part in self.trunk.modules() if part is not entry)
        return any(isinstance(part, nn.Embedding) for part in parts)

    def layer(self, index: int) -> nn.Module:
        """One decoder layer."""
        return attrgetter(self.family.layers)(self.hf)[index]

    def part(self, index: int, path: str) -> nn.Module:
        """A module inside one decoder layer, by a path of the family record."""
        return attrgetter(path)(self.layer(index))

    @property
    def trunk(self) -> nn.Module:
        """The module that turns tokens into final hidden states."""
        return attrgetter(self.family.trunk)(self.hf)

    @property
    def after_layers(self) -> list[nn.Module]:
        """Modules of the trunk that are neither layers nor embeddings: the final norm."""
        layers = set(attrgetter(self.family.layers)(self.hf))
        parts = [part for part in self.trunk.modules() if not isinstance(part, nn.Embedding)]
        own = [part for part in parts if any(True for _ in part.parameters(recurse=False))]
        inside = {part for layer in layers for part in layer.modules()}
        return [part for part in own if part not in inside]

    def describe(self) -> dict[str, Any]:
        """The model's line in ``manifest.json``."""
        sizes = ("source", "layers", "heads", "kv_heads", "d_head", "d_model", "parameters")
        facts = {("id" if name == "source" else name): getattr(self, name) for name in sizes}
        dtype = str(self.dtype).removeprefix("torch.")
        return facts | {"family": self.family.name, "dtype": dtype}


def wrap(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str = "") -> Model:
    """Take a model and tokenizer that are already in memory.

    An architecture without a record is accepted if its parts have the usual names; its record
    then has ``proven = False``, and `circuitune.selftest.prove` decides.

    Raises:
        UserError: the model is not a plain decoder, its configuration says something that is not
            understood, or its weights do not have the shapes that the family record promises.
    """
    source = source or hf.name_or_path
    config = text_config(hf.config, source)
    if not hf.can_generate() or hf.get_output_embeddings() is None:
        raise UserError(
            f"The model must be a decoder that predicts the next token, {source} is a "
            f"{type(hf).__name__}; choose a causal language model."
        )
    family = FAMILIES.get(config.model_type) or by_structure(hf, source)
    if family.proven:
        check_explained(config, _code_of(hf), source)
    if getattr(hf.config, "quantization_config", None):
        # Some kinds quantise activations batch by batch, and then no row is measured alone.
        family = replace(family, proven=False)
    hf.eval().requires_grad_(False)
    keep_freed_memory()
    return Model(
        hf=hf, tokenizer=tokenizer, family=family, source=source, **_sizes(hf, family, source)
    )


def _sizes(hf: PreTrainedModel, family: Family, source: str) -> dict[str, int]:
    """Layers, heads and widths of a model; all but the number of heads from the weights.

    Raises:
        UserError: the weights do not have the shapes that the record promises.
    """
    layers = attrgetter(family.layers)(hf)
    shapes = {projection_shape(attrgetter(family.out)(layer)) for layer in layers}
    d_model, width = min(shapes)
    heads = getattr(hf.config.get_text_config(), "num_attention_heads", None) or 0
    d_head, rest = divmod(width, heads) if heads else (0, width)
    made = projection_shape(attrgetter(family.key)(layers[0]))[0]
    keys = (made - width) // 2 if family.fused else made
    kv_heads, kv_rest = divmod(keys, d_head or 1)
    if len(shapes) > 1 or rest or kv_rest or not kv_heads or heads % kv_heads:
        raise UserError(
            f"Every layer must have the same heads, all of one width, found projections from "
            f"{sorted({width for _, width in shapes})} inputs for {heads} heads and {keys} key "
            f"rows in {source}; this is not a plain {family.name} model."
        )
    return {
        "layers": len(layers),
        "heads": heads,
        "kv_heads": kv_heads,
        "d_head": d_head,
        "d_model": d_model,
    }


def projection_shape(projection: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a projection, whether stored (out, in) or transposed (Conv1D)."""
    if hasattr(projection, "in_features"):
        return projection.out_features, projection.in_features
    inputs, outputs = projection.weight.shape
    return outputs, inputs


def text_config(config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """The configuration of the language model, if there is nothing beside it.

    Raises:
        UserError: the model has other parts (images, sound), or something in the configuration
            would break the measurement.
    """
    language = config.get_text_config()
    others = [key for key in config.sub_configs if key != "text_config" and getattr(config, key)]
    if others and language is not config:
        raise UserError(
            f"The model must be a language model alone, {source} also has {', '.join(others)}; "
            "load and save its language part by itself (a class ...ForCausalLM) and name that."
        )
    for name, (values, why) in REQUIRED.items():
        for found in (getattr(config, name, None), getattr(language, name, None)):
            if found is not None and found not in values:
                allowed = " or ".join(repr(value) for value in values) or "absent"
                raise UserError(
                    f"{name} must be {allowed} for exact effects, it is {str(found)[:60]} in "
                    f"{source} and {why}; choose another model."
                )
    odd = sorted(set(getattr(language, "layer_types", None) or ()) - set(LAYER_TYPES))
    if odd:
        raise UserError(
            f"Every layer must mix tokens by softmax attention alone, {source} has layers of type "
            f"{', '.join(odd)}; choose a model without them."
        )
    return language


def check_explained(config: PreTrainedConfig, code: str, source: str) -> None:
    """Refuse a configuration with an attribute whose meaning is not known.

    An attribute counts if it differs from the default of its class, and no list in
    `circuitune.families` names it. One that the class does not declare is inert unless ``code``,
    the source text that runs the model, reads it.

    Raises:
        UserError: there is such an attribute.
    """
    known = {name for names in UNDERSTOOD.values() for name in names} | set(REQUIRED)
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name in known or (name in defaults and value == defaults[name]):
            continue
        read = rf"config\.{re.escape(name)}\b|[\"']{re.escape(name)}[\"']"
        if name in defaults or re.search(read, code):
            raise UserError(
                f"Every attribute of the configuration must be understood, {name} = "
                f"{str(value)[:60]} of {source} is not; if it cannot change how a head acts on "
                "the last position, add it to UNDERSTOOD in circuitune/families.py."
            )


def _code_of(hf: PreTrainedModel) -> str:
    """Source text of everything that reads the configuration while the model runs."""
    modules = (sys.modules[type(hf).__module__], cache_utils, masking_utils, modeling_rope_utils)
    return "\n".join(inspect.getsource(module) for module in modules)


def by_structure(hf: PreTrainedModel, source: str) -> Family:
    """A record for an architecture without one, from the usual names of its parts.

    Raises:
        UserError: a part is not found in every layer, or a layer has weight matrices elsewhere.
    """
    trunks = (path for path in USUAL["trunk"] if _part(hf, path) is not None)
    trunk = next(trunks, hf.base_model_prefix)
    layers = next((name for name in USUAL["layers"] if _part(hf, f"{trunk}.{name}")), "")
    found = {"layers": f"{trunk}.{layers}"} if layers else {}
    members = list(_part(hf, found["layers"])) if found else []

    def find(kind: str, inside: str = "") -> str:
        paths = (f"{inside}.{name}" if inside else name for name in USUAL[kind])
        return next((p for p in paths if members and all(_part(m, p) for m in members)), "")

    found["attention"] = find("attention")
    found["out"] = find("out", found["attention"])
    found["mlp"] = find("mlp")
    fused = find("fused", found["attention"])
    found["key"] = fused or find("key", found["attention"])
    missing = [kind for kind in ("layers", *found) if not found.get(kind)]
    inside = (f"{found['attention']}.", f"{found['mlp']}.")
    loose = [
        name
        for layer in members
        for name, weight in layer.named_parameters()
        if weight.ndim > 1 and not name.startswith(inside)
    ]
    if missing or loose:
        fault = f"no {missing[0]} at a usual place" if missing else f"weights at {loose[0]}"
        raise UserError(
            f"The model must be a decoder of a known family ({', '.join(sorted(FAMILIES))}) or "
            f"have the same parts, {source} is of type {hf.config.model_type!r} with {fault}; "
            "choose another model or add a record to circuitune/families.py."
        )
    return Family(
        name=hf.config.model_type,
        trunk=trunk,
        **found,
        fused=bool(fused),
        norm_before_attention=None,
        proven=False,
    )


def _part(module: nn.Module, path: str) -> nn.Module | None:
    try:
        part = attrgetter(path)(module)
    except AttributeError:
        return None
    return part if isinstance(part, nn.Module) else None


def load(
    name: str, *, device: str = "auto", dtype: str = "float32", max_memory: str | None = None
) -> Model:
    """Load a model by name (see the module's first lines for the forms a name can take).

    Args:
        name: hub id, folder, ``.gguf`` file or ``package:NAME``.
        device: a torch device, or ``auto`` for the first GPU and else the CPU.
        dtype: a torch dtype name; effects are differences of near-equal numbers, so the
            default is float32.
        max_memory: bound on memory such as ``1.5GiB``; a model that would take too much of it
            keeps its layers on disk.

    Raises:
        UserError: nothing is there, the checkpoint has no safetensors, the file is damaged, a
            weight is NaN or infinite, or the architecture is not known.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    bound = None if max_memory is None else parse_size(max_memory)
    where = resolve(name)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"--dtype must be float32, bfloat16, float16 or float64, found {dtype!r}.")
    place = _device(device)
    try:
        config = AutoConfig.from_pretrained(where)
    except Exception as error:  # the hub and configuration libraries raise many kinds
        raise _cannot_read(name, error) from error
    text_config(config, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        shards = Shards.of(folder_of(where)) if bound else None
        if shards and not _fits(shards, kind, place, bound):
            hf = skeleton(config, kind, where)
            return replace(_on_disk(hf, tokenizer, shards, place, name), max_memory=bound)
        hf, found = AutoModelForCausalLM.from_pretrained(
            where, dtype=kind, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:
        raise _cannot_read(name, error) from error
    model = wrap(hf.to(place), tokenizer, source=name)
    _check_complete(name, found)
    # This reads every weight: one mapped from a file counts as memory only from then on.
    for part, weight in hf.named_parameters():
        if weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite():
            raise UserError(
                f"Weights must be finite numbers, {part} of {name} are not all; mend the "
                f"checkpoint, or use a wider --dtype than {dtype}."
            )
    return replace(model, max_memory=bound)


def _fits(shards: Shards, dtype: torch.dtype, device: torch.device, bound: int) -> bool:
    """Whether all weights may be in memory at once."""
    now = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    weights = shards.numbers * torch.empty(0, dtype=dtype).element_size()
    return weights <= SHARE_FOR_WEIGHTS * (bound - now)


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, where: str) -> PreTrainedModel:
    """The model of a configuration without its weights; buffers are there."""
    with init_empty_weights(include_buffers=False), Unallocated():
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    hf.tie_weights()
    with suppress(OSError):  # there may be none; the default stays
        hf.generation_config = GenerationConfig.from_pretrained(where)
    return hf


def renaming(hf: PreTrainedModel) -> Callable[[str], str]:
    """How transformers names the tensors of old checkpoints today, where it only renames."""
    mapping = get_model_conversion_mapping(hf)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    names = hf.state_dict()
    return lambda key: rename_source_key(key, renamings, [], hf.base_model_prefix, names)[0]


def _on_disk(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    device: torch.device,
    name: str,
) -> Model:
    """A model whose layers are read from the shards when they run; the rest is loaded.

    Raises:
        UserError: the shards do not hold its tensors under the model's own names and shapes.
    """
    shards = shards.renamed(renaming(hf))
    wanted = {key: tuple(weight.shape) for key, weight in hf.named_parameters()}
    stored = {key: item.shape for key, item in shards.stored.items()}
    spare = {key for key, _ in hf.named_parameters(remove_duplicate=False)} | {
        key for key, _ in hf.named_buffers()
    }
    odd = sorted(set(wanted.items()) - set(stored.items())) or sorted(set(stored) - spare)
    if odd:
        raise UserError(
            f"A checkpoint that is read in parts must hold the model's tensors under their own "
            f"names and shapes, {name} differs in {len(odd)} ({str(odd[0])[:80]}); give more "
            "--max-memory, so that transformers can convert it."
        )
    model = wrap(hf, tokenizer, source=name)
    for index in range(model.layers):
        offload(model.layer(index), shards, f"{model.family.layers}.{index}.", device)
    shards.fill(hf, device, [key for key in wanted if not key.startswith(model.family.layers)])
    hf.tie_weights()
    return model


def _device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the first GPU and else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device must name a device of this machine, {name!r} cannot be used "
            f"({str(error).splitlines()[0][:80]}); leave the option out."
        ) from error


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """Refuse a checkpoint with tensors too few or too many: the rest would be random.

    Raises:
        UserError: a tensor is missing, left over, or of another shape.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            some = ", ".join(map(str, sorted(found[kind], key=str)[:3]))
            raise UserError(
                f"A checkpoint must hold exactly the tensors of its configuration, {name} has "
                f"{len(found[kind])} {kind.replace('_', ' ')} ({some}); download or save it again."
            )


def _cannot_read(name: str, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
    return UserError(
        f"{name} must be a Hugging Face id, a checkpoint folder with safetensors, a .gguf file or "
        f"package:NAME, and it could not be read ({type(error).__name__}: {reason}); check the "
        "name, the network, or the files."
    )
