"""A delta as a stock PEFT adapter, without loss.

A slice of rows is a product of two factors: a selector of these rows (ones and zeros) and the
slice itself; a slice of columns is the slice times a selector. So the slices of a projection are
one LoRA whose rank is the number of tuned rows and columns, its scale is 1, and PEFT computes what
the tuned model computes. LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from circuitune.bases import (
    Base,
    fits,
    live_model,
    logits,
    new_folder,
    open_base,
    tuned_folder,
)
from circuitune.deltas import Delta, load_delta
from circuitune.errors import UserError
from circuitune.models import load
from circuitune.slices import is_transposed

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# PEFT's name of a module: its wrapper, the wrapper's model, then the model's own name.
PREFIX = "base_model.model."

Factors = tuple[Float[Tensor, "slice inputs"], Float[Tensor, "outputs slice"]]


@dataclass(frozen=True)
class LoraReport:
    """What `export_lora` did.

    Attributes:
        folder: the adapter.
        base: the base model's name.
        modules: how many projections the adapter changes.
        rank: the largest rank; servers must allow it.
        size: bytes of the adapter's weights.
        difference: largest difference of a logit between base + adapter in PEFT and base + delta,
            both run in float64, on plain text; None if the model does not fit into memory.
        seconds: how long it took.
    """

    folder: Path
    base: str
    modules: int
    rank: int
    size: int
    difference: float | None
    seconds: float


def export_lora(delta_folder: Path, out: Path, *, base: str | None = None) -> LoraReport:
    """Write a delta as a LoRA adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        delta_folder: a folder with a delta, or a run directory whose ``tuned`` holds one.
        out: the folder to make.
        base: the base model, if it is not at the place that the delta names.

    Raises:
        UserError: the delta has a part that no LoRA can hold, does not fit the base, or ``out``
            cannot be written.
    """
    started = time.monotonic()
    delta = load_delta(tuned_folder(delta_folder))
    _check_holds(delta)
    source = open_base(base or delta.facts["base"])
    source.tuned(delta)
    factors = {
        name.removesuffix(".weight"): _factors(source, delta, name)
        for name in sorted(delta.names)
        if name.endswith(".weight")
    }
    tensors = {
        f"{PREFIX}{module}.lora_{factor}.weight": value.contiguous()
        for module, pair in factors.items()
        for factor, value in zip("AB", pair, strict=True)
    }
    with new_folder(out, sum(value.nbytes for value in tensors.values())) as work:
        _write_config(work, source, {module: pair[0].shape[0] for module, pair in factors.items()})
        save_file(tensors, work / ADAPTER, metadata={"format": "pt"})
        shutil.copymode(work / CONFIG, work / ADAPTER)  # else it is the owner's alone
        difference = _difference(source, delta, work) if fits(source, width=8) else None
    return LoraReport(
        folder=out,
        base=source.name,
        modules=len(factors),
        rank=max(pair[0].shape[0] for pair in factors.values()),
        size=(out / ADAPTER).stat().st_size,
        difference=difference,
        seconds=time.monotonic() - started,
    )


def _check_holds(delta: Delta) -> None:
    """Refuse what is no low-rank change of a projection's weight."""
    for key, value in delta.tensors.items():
        name, _, part = key.partition("#")
        if part == "all":
            raise UserError(
                f"A LoRA adapter must be of low rank, the delta changes the whole of {name}; use "
                "`circuitune export --as merged`."
            )
        if not name.endswith(".weight") and bool(value.any()):
            raise UserError(
                f"A LoRA adapter has no place for biases, the delta changes {name}; use "
                "`circuitune export --as merged`, or tune with --methods lora_heads."
            )
    if not any(name.endswith(".weight") for name in delta.names):
        raise UserError(
            "A LoRA adapter must change some projection, the delta has none; tune some heads first."
        )


def _factors(base: Base, delta: Delta, name: str) -> Factors:
    """The factors A and B of one projection: all its slices one after the other."""
    module = base.hf.get_submodule(name.removesuffix(".weight"))
    transposed = is_transposed(module)
    outputs, inputs = base.hf.get_parameter(name).shape[:: -1 if transposed else 1]
    downs, ups = [], []
    for key, value in sorted(delta.tensors.items()):
        own, _, part = key.partition("#")
        if own != name:
            continue
        if part == "lora_A":
            downs.append(value)
            continue
        if part == "lora_B":
            ups.append(value)
            continue
        axis, _, span = part.partition("=")
        place = slice(*map(int, span.split(":")))
        if transposed:
            axis, value = ("cols" if axis == "rows" else "rows"), value.T
        if axis == "rows":
            downs.append(value)
            ups.append(torch.eye(outputs)[:, place])
        else:
            downs.append(torch.eye(inputs)[place])
            ups.append(value)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _write_config(folder: Path, base: Base, ranks: Mapping[str, int]) -> None:
    """PEFT's configuration; alpha is the rank everywhere, so that every scale is 1."""
    from peft import LoraConfig  # heavy, needed here alone

    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    transposed = any(is_transposed(base.hf.get_submodule(module)) for module in ranks)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.address,
        target_modules=[],
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    config.target_modules = sorted(ranks)  # LoraConfig makes a set of it, of random order on disk
    config.save_pretrained(folder)


def _difference(base: Base, delta: Delta, folder: Path) -> float:
    """Largest difference of a logit between the tuned model and the base with the adapter.

    In float64: in float32 the order of the sums alone moves logits of 20 by 6e-5.
    """
    from peft import PeftModel

    exact = live_model(base, delta)
    expected = logits(exact.hf.double(), exact)
    del exact  # two models need not fit
    model = load(str(base.folder), device="cpu", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an old way
        adapted = PeftModel.from_pretrained(model.hf, str(folder))
    return float((logits(adapted.double(), model) - expected).abs().max())
