"""What is trainable: a method names it, and `attached` puts it on the live model.

==========  ======================================================================================
precise     slices of chosen heads and whole chosen MLPs, nothing else
random      as many other heads of the same layers, drawn at random: the control
layers      the whole projections of queries, keys, values and outputs of these layers
lora        LoRA (Hu et al. 2021) on every linear projection of every decoder layer
lora_heads  LoRA on the queries and outputs of the chosen heads alone
full        every parameter
==========  ======================================================================================

Slices train as `circuitune.slices` says. LoRA is PEFT's own layer: factors in fp32 over the base
as it is, no dropout, delta = alpha / rank * B A. The experts of a mixture are no linear modules
and get no LoRA. A method is data, made without touching the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from circuitune import slices
from circuitune.components import Component, Head, Mlp, check_components
from circuitune.errors import UserError
from circuitune.models import Model, projection_shape
from circuitune.slices import Form, Slice, head_slices, is_transposed, mlp_slices, tensor_name
from circuitune.validate import matched_heads

ADAPTER = "default"  # PEFT's name for the only adapter
RANK = 16


@dataclass(frozen=True)
class Lora:
    """A LoRA, ready to be put on a model.

    Attributes:
        rank: inner width of the two factors.
        alpha: the product is scaled by alpha / rank.
        targets: names of the adapted modules in the causal model.
        kept: the only parts of the targets' weights that may change; none given is all of them.
        seed: of the random factor A; B is zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    kept: tuple[Slice, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """What is trainable.

    Attributes:
        name: its name in `METHODS`.
        heads, mlps: the components that were asked for; none for methods that take the whole model.
        parts: slices that train.
        lora: LoRA factors that train instead.
        lowest: the lowest layer in which something trains.
        prefix: whether what enters that layer is the base's, that is, no embedding trains.
    """

    name: str
    heads: tuple[Head, ...]
    mlps: tuple[Mlp, ...]
    parts: tuple[Slice, ...]
    lora: Lora | None
    lowest: int
    prefix: bool


def precise(
    model: Model, heads: Sequence[Head], mlps: Sequence[Mlp] = (), form: Form = "qo"
) -> Method:
    """Slices of the given heads and all parameters of the given MLPs.

    Raises:
        UserError: nothing is given, the model has no such component, or its family keeps heads in
            an unknown way.
    """
    lowest = _lowest(model, [*heads, *mlps])
    parts = (*head_slices(model, heads, form), *mlp_slices(model, mlps))
    return Method("precise", tuple(heads), tuple(mlps), parts, None, lowest, prefix=True)


def random(
    model: Model,
    heads: Sequence[Head],
    rng: np.random.Generator,
    mlps: Sequence[Mlp] = (),
    form: Form = "qo",
) -> Method:
    """As `precise`, on random components that cost the same: none of the given ones.

    Heads are matched by layer; where a layer has too few others, the rest come from the nearest
    layers. A layer has one MLP, so others of layers not below the lowest given component are drawn.

    Raises:
        UserError: as `precise`, or there are too few other components.
    """
    lowest = _lowest(model, [*heads, *mlps])
    drawn = matched_heads(heads, model.layers, model.heads, rng)
    free = [Mlp(layer) for layer in range(lowest, model.layers) if Mlp(layer) not in mlps]
    if len(drawn) < len(heads) or len(free) < len(mlps):
        raise UserError(
            f"A random control needs {len(heads)} other heads and {len(mlps)} other MLPs from "
            f"layer {lowest} on, the model has {len(drawn)} and {len(free)}; choose fewer "
            "components, or leave the control out (--methods precise)."
        )
    picked = rng.choice(len(free), size=len(mlps), replace=False) if mlps else ()
    others = tuple(free[place] for place in sorted(picked))
    parts = (*head_slices(model, drawn, form), *mlp_slices(model, others))
    return Method("random", drawn, others, parts, None, _lowest(model, [*drawn, *others]), True)


def layers(model: Model, heads: Sequence[Head], mlps: Sequence[Mlp] = ()) -> Method:
    """The whole projections of queries, keys, values and outputs of the layers of given heads.

    Weights and biases, for all heads of these layers; of given MLPs all parameters.

    Raises:
        UserError: nothing is given, or the model has no such component.
    """
    lowest = _lowest(model, [*heads, *mlps])
    found = []
    for index in sorted({head.layer for head in heads}):
        for path in _projections(model.layer(index)):
            if path.startswith(f"{model.family.attention}."):
                leaves = model.part(index, path).named_parameters(recurse=False)
                found += [Slice(index, path, "all", leaf=leaf) for leaf, _ in leaves]
    parts = (*found, *mlp_slices(model, mlps))
    return Method("layers", tuple(heads), tuple(mlps), parts, None, lowest, prefix=True)


def full(model: Model) -> Method:
    """Every parameter of the model, tied ones once; buffers are no parameters."""
    inside = {
        f"{model.family.layers}.{index}.{name}": index
        for index in range(model.layers)
        for name, _ in model.layer(index).named_parameters()
    }
    parts = []
    for name, _ in model.hf.named_parameters():
        layer = inside.get(name, -1)
        within = name if layer < 0 else name.removeprefix(f"{model.family.layers}.{layer}.")
        path, _, leaf = within.rpartition(".")
        parts.append(Slice(layer, path, "all", leaf=leaf))
    return Method("full", (), (), tuple(parts), None, lowest=0, prefix=False)


def lora(model: Model, rank: int = RANK, alpha: float | None = None, seed: int = 0) -> Method:
    """LoRA on all linear projections of all decoder layers; ``alpha`` is the rank if not given.

    Raises:
        UserError: the rank is below 1, or the layers have no linear projections.
    """
    targets = tuple(
        f"{model.family.layers}.{index}.{path}"
        for index in range(model.layers)
        for path in _projections(model.layer(index))
    )
    if not targets:
        raise UserError(
            f"LoRA needs linear projections in the decoder layers, {model.source} has none; "
            "choose another method."
        )
    return Method("lora", (), (), (), _lora(rank, alpha, targets, (), seed), lowest=0, prefix=True)


def lora_heads(
    model: Model,
    heads: Sequence[Head],
    rank: int = RANK,
    alpha: float | None = None,
    seed: int = 0,
) -> Method:
    """LoRA on the queries and outputs of given heads; all other heads stay the base's.

    B of a query projection is zero outside the rows of the heads, and A of an output projection
    outside their columns. Biases stay the base's.

    Raises:
        UserError: as `precise`, or the rank is below 1.
    """
    lowest = _lowest(model, heads)
    kept = tuple(part for part in head_slices(model, heads, "qo") if part.leaf == "weight")
    targets = tuple(dict.fromkeys(_module_name(model, part) for part in kept))
    factors = _lora(rank, alpha, targets, kept, seed)
    return Method("lora_heads", tuple(heads), (), (), factors, lowest, prefix=True)


Builder = Callable[
    [Model, Sequence[Head], Sequence[Mlp], Form, np.random.Generator],
    Method,
]
METHODS: Mapping[str, Builder] = {
    "precise": lambda model, heads, mlps, form, rng: precise(model, heads, mlps, form),
    "random": lambda model, heads, mlps, form, rng: random(model, heads, rng, mlps, form),
    "layers": lambda model, heads, mlps, form, rng: layers(model, heads, mlps),
    "lora": lambda model, heads, mlps, form, rng: lora(model, seed=_seed(rng)),
    "lora_heads": lambda model, heads, mlps, form, rng: lora_heads(model, heads, seed=_seed(rng)),
    "full": lambda model, heads, mlps, form, rng: full(model),
}


def build(
    name: str,
    model: Model,
    heads: Sequence[Head],
    mlps: Sequence[Mlp],
    form: Form,
    rng: np.random.Generator,
) -> Method:
    """A method by name.

    Args:
        name: one of `METHODS`.
        model: the model; it stays as it is.
        heads: the chosen heads.
        mlps: the chosen MLPs; LoRA on heads leaves MLPs alone.
        form: which projections of a head train with ``precise`` and ``random``.
        rng: draws the random components, and the seed of LoRA's random factor.

    Raises:
        UserError: there is no such method, or it cannot be had on this model.
    """
    if name not in METHODS:
        raise UserError(
            f"A tuning method must be one of {', '.join(METHODS)}, found {name!r}; correct it."
        )
    return METHODS[name](model, heads, mlps, form, rng)


@dataclass(frozen=True)
class Attached:
    """What is trainable, on the model.

    Attributes:
        parameters: fp32, in a stable order; for whole parameters the masters.
        names: their names in the causal model as it now is.
    """

    parameters: list[nn.Parameter]
    names: list[str]
    _read: Callable[[], dict[str, Tensor]]

    def tensors(self) -> dict[str, Tensor]:
        """The deltas as they now are, by their keys in ``delta.safetensors``; fp32 copies."""
        return {key: value.detach().float().cpu().clone() for key, value in self._read().items()}


@contextmanager
def attached(
    model: Model, method: Method, gains: Mapping[Slice, float] | None = None
) -> Iterator[Attached]:
    """Make trainable what the method names, with no change of outputs yet.

    On leaving, also by an exception, the model is exactly as it was. ``gains`` are factors of the
    gradients of a head's slices, see `circuitune.slices.head_gains`; LoRA has none.
    """
    if method.lora is not None:
        with _with_lora(model, method.lora) as found:
            yield found
        return
    with slices.attached(model, method.parts, gains) as views:
        trained = slices.trainable(model)

        def read() -> dict[str, Tensor]:
            deltas = slices.deltas_of(model, views)
            return {part.key(model): value for part, value in deltas.items()}

        yield Attached(trained, _names(model, trained), read)


@contextmanager
def _with_lora(model: Model, factors: Lora) -> Iterator[Attached]:
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    modules = {name: model.hf.get_submodule(name) for name in factors.targets}
    masks = _masks(model, factors)
    flags = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    config = LoraConfig(
        r=factors.rank,
        lora_alpha=factors.alpha,
        target_modules=list(factors.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(map(is_transposed, modules.values())),
    )
    try:
        with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
            torch.manual_seed(factors.seed)
            inject_adapter_in_model(config, model.hf)
        layers = {name: model.hf.get_submodule(name) for name in factors.targets}
        for layer in layers.values():
            layer.eval()
            layer.lora_A[ADAPTER].float()
            layer.lora_B[ADAPTER].float()
        for name, pieces in masks.items():
            for factor, mask in pieces.items():
                module = getattr(layers[name], factor)[ADAPTER]
                kept = _Kept(mask.to(module.weight))
                parametrize.register_parametrization(module, "weight", kept)
        trained = [
            parameter
            for layer in layers.values()
            for factor in (layer.lora_A, layer.lora_B)
            for parameter in factor[ADAPTER].parameters()
        ]
        yield Attached(trained, _names(model, trained), lambda: _factors(layers))
    finally:
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.hf.get_submodule(parent), leaf, module)
        vars(model.hf).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Kept(nn.Module):
    """A factor of LoRA with zeros wherever ``mask`` has them."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
        """The weight that the layer computes with."""
        return weight * self.mask


def _masks(model: Model, factors: Lora) -> dict[str, dict[str, Tensor]]:
    """By target and factor, one for the outputs (rows of B) or inputs (columns of A) to keep."""
    found: dict[str, dict[str, Tensor]] = {}
    for part in factors.kept:
        name = _module_name(model, part)
        outputs, inputs = projection_shape(model.hf.get_submodule(name))
        of_outputs = part.axis == "rows"
        factor, shape = ("lora_B", (outputs, 1)) if of_outputs else ("lora_A", (1, inputs))
        mask = found.setdefault(name, {}).setdefault(factor, torch.zeros(shape))
        mask.view(-1)[part.start : part.stop] = 1
    return found


def _factors(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Both factors of each adapted module, the scale folded into B."""
    found = {}
    for name, layer in layers.items():
        found[f"{name}.weight#lora_A"] = layer.lora_A[ADAPTER].weight
        found[f"{name}.weight#lora_B"] = layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
    return found


def _names(model: Model, parameters: Sequence[nn.Parameter]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.hf.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def _projections(layer: nn.Module) -> list[str]:
    """Paths from a layer to its linear projections."""
    return [path for path, part in layer.named_modules() if isinstance(part, nn.Linear | Conv1D)]


def _module_name(model: Model, part: Slice) -> str:
    return tensor_name(model, part).removesuffix(f".{part.leaf}")


def _lora(
    rank: int, alpha: float | None, targets: tuple[str, ...], kept: tuple[Slice, ...], seed: int
) -> Lora:
    if rank < 1:
        raise UserError(f"The rank of a LoRA must be at least 1, found {rank}; choose more.")
    return Lora(rank, float(rank if alpha is None else alpha), targets, kept, seed)


def _lowest(model: Model, components: Sequence[Component]) -> int:
    """The lowest layer of components that the model must have.

    Raises:
        UserError: it does not, or there are none.
    """
    if not components:
        raise UserError("Tuning needs a head or an MLP, found none; choose some.")
    check_components(components, model.layers, model.heads)
    return min(part.layer for part in components)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
