"""Where paths go in: what a receiver is in a given model, and what arrives there.

A receiver of a head is a part of what one module gives: the projection that makes the queries
(keys, values) of all heads, or a norm over all heads that follows it. A fused projection gives
all three, as a row of slots, each as wide as a head; the family record says in which order.

What arrives is read in a run of the model's own layer that ends as soon as the module has run.
So norms before, after or shared with the MLP, biases and expert routing need no line here.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitune.components import Head, Kind, Mlp, Receiver, check_components
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import EndStates, run_layer, wide
from circuitune.sites import Call, attend, first, record, substitute
from circuitune.weights import widened

Sharing = Literal["head", "group"]
# What the projections of queries, keys and values are called, by the name of that of the keys.
NAMES = {
    "k_proj": ("q_proj", "k_proj", "v_proj"),
    "wk": ("wq", "wk", "wv"),
    "key": ("query", "key", "value"),
}


@dataclass(frozen=True)
class Port:
    """Where a receiver lies.

    Attributes:
        layer: its layer.
        path: from the layer to the module that gives it.
        columns: its part of the module's output.
        z: the heads that read it, as a part of the layer's z; None for an MLP.
        at_end: whether it is read at END alone.
    """

    layer: int
    path: str
    columns: slice
    z: slice | None
    at_end: bool


def find_port(model: Model, receiver: Receiver, kv: Sharing) -> Port:
    """Find a receiver in the model.

    Args:
        model: the model.
        receiver: the query, key or value of a head, or the input of an MLP.
        kv: whether a changed key or value is read by this ``head`` alone, or by the ``group`` of
            heads that share it.

    Raises:
        UserError: there is no such receiver, the names do not fit each other, or the model keeps
            the queries, keys and values of its heads in an unknown way.
    """
    part, kind = receiver.part, receiver.kind
    check_components([part], model.layers, model.heads)
    fits = kind in ("q", "k", "v") if isinstance(part, Head) else kind == "in"
    if not fits or kv not in get_args(Sharing):
        raise UserError(
            "A receiver is q, k or v of a head or in of an MLP, and kv is head or group, found "
            f"{kind!r} of {part} and kv={kv!r}; correct the name."
        )
    if isinstance(part, Mlp):
        return Port(part.layer, model.family.mlp, slice(None), None, at_end=True)
    share = 1 if kind == "q" else model.heads // model.kv_heads
    readers = _slots(part.index // share, share, model.d_head)
    port = Port(
        layer=part.layer,
        path=projections(model)[kind],
        columns=_slots(_slot(model, part, kind), 1, model.d_head),
        z=readers if kv == "group" else _slots(part.index, 1, model.d_head),
        at_end=kind == "q",
    )
    if not model.family.proven and not _is_apart(model, port, readers):
        raise _unknown(model)
    return port


def projections(model: Model) -> dict[Kind, str]:
    """Paths from a layer to the modules that give queries, keys and values; the same if fused.

    Raises:
        UserError: they are not known, or are not as wide as the heads.
    """
    family = model.family
    paths = family.qkv or _siblings(family.key)
    if family.fused:
        paths = (family.key,) * 3 if family.layout else ()
    queries, keys = model.heads, model.kv_heads
    slots = (queries + 2 * keys,) * 3 if family.fused else (queries, keys, keys)
    try:
        widths = [_width(model.part(0, path)) for path in paths]
    except AttributeError:
        widths = []
    if widths != [count * model.d_head for count in slots]:
        raise _unknown(model)
    return dict(zip(("q", "k", "v"), paths, strict=True))


def head_rows(model: Model, head: Head, kind: Literal["q", "k", "v"]) -> tuple[str, slice]:
    """Where the weights of a head's query, key or value lie.

    Returns:
        the path from a layer to the projection that has them, also where a norm over all heads
        follows it (OLMo-2), and their part of the projection's outputs.

    Raises:
        UserError: there is no such head, or the model keeps them in an unknown way.
    """
    port = find_port(model, Receiver(head, kind), "group")
    if model.part(head.layer, port.path).weight.ndim > 1:
        return port.path, port.columns
    siblings = dict(zip(("q", "k", "v"), _siblings(model.family.key), strict=False))
    if kind not in siblings:
        raise _unknown(model)
    return siblings[kind], port.columns


def _siblings(key: str) -> tuple[str, ...]:
    """Paths of the projections of queries, keys and values, from that of the keys, if known."""
    stem, _, name = key.rpartition(".")
    return tuple(f"{stem}.{other}" for other in NAMES.get(name, ()))


def _unknown(model: Model) -> UserError:
    return UserError(
        "Paths into a head and its tuning need its query, key and value as parts of a projection "
        f"that no other head reads, {model.source} (type {model.family.name}) keeps them in an "
        "unknown way; measure direct effects or paths into MLPs, or say where they lie (qkv, "
        "layout) in circuitune/families.py."
    )


def _width(module: nn.Module) -> int:
    """Outputs of a linear projection (also transposed, Conv1D) or of a norm."""
    return getattr(module, "out_features", None) or module.weight.shape[-1]


def _slot(model: Model, head: Head, kind: Kind) -> int:
    """Which of the head-wide slots of the module's output is a head's query, key or value."""
    share = model.heads // model.kv_heads
    group, place = divmod(head.index, share)
    if not model.family.fused:
        return head.index if kind == "q" else group
    if model.family.layout == "stacked":
        keys = model.heads + group
        return {"q": head.index, "k": keys, "v": keys + model.kv_heads}[kind]
    return group * (share + 2) + {"q": place, "k": share, "v": share + 1}[kind]


def _slots(start: int, count: int, width: int) -> slice:
    """Columns of ``count`` heads from block number ``start``, each block ``count`` heads wide."""
    return slice(start * count * width, (start + 1) * count * width)


@torch.no_grad()
def _is_apart(model: Model, port: Port, readers: slice) -> bool:
    """Whether the readers see a change of the port, and no other head does; on a few tokens."""
    tokens = torch.arange(1, 5, device=model.device)[None]
    with record(model, where="all") as trace:
        model.trunk(input_ids=tokens, use_cache=False)
    hidden = trace.entry[port.layer]
    given = project(model, trace.calls[port.layer], port.layer, port.path, hidden)
    changed = given.clone()
    changed[..., port.columns] = given[..., port.columns].flip(1) + given.std()
    with widened(model.layer(port.layer)):
        plain, other = (
            attend(model, port.layer, wide(hidden), {port.path: out}) for out in (given, changed)
        )
    moved = (other - plain).abs()
    seen = bool(moved[..., readers].any())
    moved[..., readers] = 0
    return seen and bool((moved <= 1e-3 * plain.abs().max()).all())


# -------------------------------------------------------------------------- what arrives


class _Caught(Exception):
    """What was wanted is there; the rest of the layer is not needed."""


def _given(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a module gives in a run, which ends there."""
    caught: list[Tensor] = []
    own = module.forward

    def catch(*args: Any, **kwargs: Any) -> Any:
        caught.append(first(own(*args, **kwargs)))
        raise _Caught

    with suppress(_Caught), substitute(module, catch):
        run()
    if not caught:
        raise RuntimeError(f"The layer must run its {type(module).__name__}, it never did.")
    return caught[0]


def project(
    model: Model, call: Call, layer: int, path: str, rows: Float[Tensor, "batch cell d_model"]
) -> Float[Tensor, "batch cell width"]:
    """What the module at ``path`` makes, for all heads, of residual streams entering its layer.

    The positions need not be whole prompts: nothing in the layer before it looks across them.
    """
    module = model.layer(layer)
    with widened(module):
        return _given(
            model.part(layer, path), lambda: module(wide(rows), *call.args, **call.kwargs)
        )


def through_mlp(
    model: Model,
    states: EndStates,
    layer: int,
    rows: Float[Tensor, "sender cell d_model"],
    attention: Float[Tensor, "#sender cell d_model"],
) -> Float[Tensor, "sender cell d_model"]:
    """What an MLP makes of residual streams that enter its layer, the attention's output given."""
    module = model.part(layer, model.family.mlp)
    made = _given(module, lambda: run_layer(model, states, layer, rows, attention))
    return wide(made.reshape(rows.shape))  # OPT's MLP sees rows and cells as one axis


def attention_feeds_mlp(model: Model, states: EndStates, layer: int) -> bool:
    """Whether the MLP of a layer reads what its attention writes: not so in parallel blocks."""
    rows, attention = states.entry[layer][None], states.attention[layer][None]
    held, without = (
        through_mlp(model, states, layer, rows, value) for value in (attention, 0 * attention)
    )
    return not torch.equal(held, without)
