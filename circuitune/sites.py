"""The only file with hooks: read and change what flows through a model, and put it back.

Context managers, all restored on leaving, also after an exception:

- `record` keeps what passes END (or every position): head outputs z, attention and MLP
  contributions, layer inputs.
- `intervene` overwrites the output of components; it counts its firings and raises on leaving
  if an edit never happened, since "no effect" must never mean "the hook did not run".
- `substitute` lets a module return a given value instead of computing, so that a decoder layer
  can be run with its attention replaced.
- `resume` starts the model at a layer, from hidden states that were computed before.
- `march` takes several forward passes through the layers together, so that each layer's weights
  are needed once.

`attend` runs the attention of one layer alone, with some of its projections' outputs given.

Batches are padded on the left, hence END is position -1 everywhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from circuitune.components import Component, Head
from circuitune.models import Model
from circuitune.weights import resident, widened

Where = Literal["end", "all"]
# What the layers of a model return never changes, and asking takes a forward pass.
_ITEMS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Call:
    """How a layer was called and what its blocks returned, so that it can be called again.

    Attributes:
        args, kwargs: what the layer got after its hidden states, caches left out.
        attention, mlp: how many items the block returned in a tuple, 0 for a plain tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attention: int
    mlp: int


@dataclass
class Trace:
    """What passed END in each forward pass, in lists of one tensor per layer.

    Shapes are for END; when every position is kept, the second axis of all is the position.

    Attributes:
        z: input of the output projection, the head outputs side by side, (batch, heads*d_head).
        attention: output of the attention block, (batch, d_model).
        mlp: output of the MLP, (batch, d_model).
        entry: the residual stream that enters the layer, (batch, d_model).
        calls: how each layer was called.
    """

    z: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    entry: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@contextmanager
def record(model: Model, *, where: Where = "end", passes: int = 1) -> Iterator[Trace]:
    """Keep what passes END, or every position; the trace is filled on leaving.

    Args:
        model: the model to watch.
        where: END alone, or every position.
        passes: how many batches go through the model, one after another or by `march`; their
            rows stand one below the other in the trace, and ``calls`` are those of the last.

    Raises:
        RuntimeError: on leaving, if some layer was not passed exactly so often.
    """
    trace = Trace()
    names = ("entry", "z", "attention", "mlp", "calls")
    kept = [{name: [] for name in names} for _ in range(model.layers)]
    with ExitStack() as stack:
        for index, seen in enumerate(kept):
            for handle in _watch(model, index, seen, where):
                stack.callback(handle.remove)
        yield trace
    counts = {len(items) for seen in kept for items in seen.values()}
    if counts != {passes}:
        raise RuntimeError(
            f"record must see each of {model.layers} layers exactly {passes} times, saw "
            f"{sorted(counts)}; the family record of {model.family.name!r} does not fit this model."
        )
    for name in names[:-1]:
        getattr(trace, name).extend(torch.cat(seen[name]) for seen in kept)
    trace.calls.extend(seen["calls"][-1] for seen in kept)


def _watch(
    model: Model, index: int, seen: dict[str, list[Any]], where: Where
) -> list[RemovableHandle]:
    """The hooks of `record` on one layer."""
    items = {"attention": 0, "mlp": 0}

    def copied(value: Tensor, batch: int) -> Tensor:
        # OPT's MLP sees batch and token as one axis; clone, since some layers add in place later.
        value = value.reshape(batch, -1, value.shape[-1])
        return (value if where == "all" else value[:, -1]).detach().clone()

    def on_layer(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["entry"].append(copied(args[0], len(args[0])))

    def on_z(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["z"].append(copied(args[0], len(seen["entry"][-1])))

    def on_block(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            items[name] = item_count(output)
            seen[name].append(copied(first(output), len(seen["entry"][-1])))

        return hook

    def on_return(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        rest = tuple(None if isinstance(value, Cache) else value for value in args[1:])
        without = {key: value for key, value in kwargs.items() if not isinstance(value, Cache)}
        seen["calls"].append(Call(rest, without, **items))

    layer, family = model.layer(index), model.family
    return [
        layer.register_forward_pre_hook(on_layer),
        model.part(index, family.out).register_forward_pre_hook(on_z),
        model.part(index, family.attention).register_forward_hook(on_block("attention")),
        model.part(index, family.mlp).register_forward_hook(on_block("mlp")),
        layer.register_forward_hook(on_return, with_kwargs=True),
    ]


@contextmanager
def intervene(
    model: Model,
    edits: Mapping[Component, Float[Tensor, "*batch width"]],
    *,
    where: Where = "end",
) -> Iterator[None]:
    """Overwrite the outputs of components while the model runs.

    Args:
        model: the model to edit.
        edits: the new output of each component, of width d_head for a head (its slice of z) or
            d_model for an MLP; one row per prompt of the batch, or one row for all.
        where: at END only, or at every position.

    Raises:
        RuntimeError: on leaving without an exception, if an edit never fired.
    """
    writer = _Writer(model, edits, where, dict.fromkeys(edits, 0))
    with ExitStack() as stack:
        for layer in sorted({part.layer for part in edits}):
            here = [part for part in edits if part.layer == layer]
            heads = [part for part in here if isinstance(part, Head)]
            if heads:
                stack.callback(writer.hook_heads(layer, heads).remove)
            for part in here:
                if not isinstance(part, Head):
                    for handle in writer.hook_mlp(part):
                        stack.callback(handle.remove)
        yield
    silent = [str(part) for part, count in writer.fired.items() if count == 0]
    if silent:
        raise RuntimeError(f"Every edit must fire, these never did: {', '.join(silent)}.")


@dataclass(frozen=True)
class _Writer:
    """The hooks of one `intervene`: they overwrite outputs and count how often they did."""

    model: Model
    edits: Mapping[Component, Tensor]
    where: Where
    fired: dict[Component, int]

    def write(self, target: Tensor, part: Component) -> None:
        """Put the edit of one component into its place of ``target``."""
        value = self.edits[part].to(target)
        if self.where == "all" and value.ndim == 2:
            value = value[:, None]
        target[:, -1 if self.where == "end" else slice(None)] = value
        self.fired[part] += 1

    def hook_heads(self, layer: int, heads: Sequence[Head]) -> RemovableHandle:
        """Overwrite slices of z, the input of the output projection."""
        d_head = self.model.d_head

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            for head in heads:
                self.write(z[..., head.index * d_head : (head.index + 1) * d_head], head)
            return (z, *args[1:])

        return self.model.part(layer, self.model.family.out).register_forward_pre_hook(hook)

    def hook_mlp(self, part: Component) -> list[RemovableHandle]:
        """Overwrite the output of an MLP."""
        shape: list[int] = []  # of the layer's input: OPT's MLP sees batch and token as one axis

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            shape[:] = args[0].shape[:2]

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            changed = first(output).clone(memory_format=torch.contiguous_format)
            self.write(changed.view(*shape, -1), part)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return [
            self.model.layer(part.layer).register_forward_pre_hook(before),
            self.model.part(part.layer, self.model.family.mlp).register_forward_hook(after),
        ]


@contextmanager
def blend(
    model: Model,
    shares: Float[Tensor, "layer head"],
    values: Float[Tensor, "layer example z"],
) -> Iterator[None]:
    """Move every head's output at END towards a value while the model runs; keeps gradients.

    Args:
        model: the model to edit.
        shares: how far each head moves, 0 (its own output) to 1 (the value).
        values: where the heads of a layer move to, one row per prompt of the batch.
    """

    def hook_of(layer: int) -> Callable[..., Any]:
        share = shares[layer].repeat_interleave(model.d_head)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0]
            own = z[:, -1:]
            last = own + share.to(z.dtype) * (values[layer][:, None].to(z.dtype) - own)
            return (torch.cat([z[:, :-1], last], dim=1), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer in range(model.layers):
            out = model.part(layer, model.family.out)
            stack.callback(out.register_forward_pre_hook(hook_of(layer)).remove)
        yield


@contextmanager
def substitute(module: nn.Module, output: Any) -> Iterator[None]:
    """Let ``module`` return ``output`` (or ``output(*args)`` if callable) without computing."""
    # __call__: a module as an attribute would become a child, and the class's forward would stay.
    forward = output.__call__ if callable(output) else (lambda *_args, **_kwargs: output)
    own = module.__dict__.get("forward")  # an offloading wrapper may live on the instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def resume(
    model: Model, layer: int, hidden: Float[Tensor, "batch token d_model"]
) -> Iterator[None]:
    """Let the model's forward start at ``layer`` with ``hidden`` as that layer's input.

    The layers below do not run; masks and positions are the model's own, computed from the
    tokens that the caller passes. Nothing is substituted for layer 0; the number of layers as
    ``layer`` leaves only what follows the last layer (the final norm).
    """
    with ExitStack() as stack:
        if layer:
            output = packed(hidden, _layer_items(model))
            for index in range(layer):
                stack.enter_context(substitute(model.layer(index), output))
        yield


def states_entering(
    model: Model, layer: int, tokens: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token d_model"]:
    """Hidden states that enter a layer; the layers from there on do not run."""
    caught: list[Tensor] = []
    items = _layer_items(model)

    def catch(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        caught.append(hidden)
        return packed(hidden, items)

    with ExitStack() as stack:
        for index in range(layer, model.layers):
            stack.enter_context(substitute(model.layer(index), catch))
        model.trunk(input_ids=tokens, use_cache=False)
    return caught[0]


@dataclass(frozen=True)
class Pass:
    """A forward pass up to its first layer.

    Attributes:
        entering: the hidden states that enter the first layer.
        calls: what the trunk gives each layer beside hidden states.
    """

    entering: Float[Tensor, "batch token d_model"]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def begin(model: Model, **inputs: Any) -> Pass:
    """Start a forward pass of the trunk; no layer runs (their hooks do), see `march`.

    What the trunk makes of its inputs for the layers (masks, positions) must not depend on hidden
    states; in decoders it does not.
    """
    entering: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    items = _layer_items(model)

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        entering.append(hidden)
        calls.append((args, kwargs))
        return packed(hidden, items)

    with ExitStack() as stack:
        for index in range(model.layers):
            stack.enter_context(substitute(model.layer(index), note))
        model.trunk(**inputs)
    return Pass(entering[0], calls)


@torch.no_grad()
def march(
    model: Model, passes: Sequence[Pass], *, wide: bool = False
) -> list[Float[Tensor, "batch token d_model"]]:
    """Take forward passes through the layers together: all through one layer, then the next.

    Args:
        model: the model.
        passes: from `begin`.
        wide: compute in float32 where the weights are of lower precision.

    Returns:
        the hidden states after the last layer, before the final norm, per pass.
    """
    states = [item.entering for item in passes]
    for index in range(model.layers):
        layer = model.layer(index)
        weights: AbstractContextManager[None] = widened(layer) if wide else resident(layer)
        with weights:
            for number, item in enumerate(passes):
                args, kwargs = item.calls[index]
                state = states[number]
                state = state.to(torch.promote_types(state.dtype, torch.float32)) if wide else state
                states[number] = first(layer(state, *args, **kwargs))
    return states


@torch.no_grad()
def _layer_items(model: Model) -> int:
    """How many items a layer returns in a tuple, 0 for a plain tensor.

    It differs between architectures and between versions of transformers, so the first layer is
    asked, with one token.
    """
    if model.hf not in _ITEMS:
        outputs: list[Any] = []
        handle = model.layer(0).register_forward_hook(lambda *seen: outputs.append(seen[-1]))
        with ExitStack() as stack:
            stack.callback(handle.remove)
            for index in range(1, model.layers):
                stack.enter_context(substitute(model.layer(index), lambda *_a, **_k: outputs[0]))
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model.trunk(input_ids=token, use_cache=False)
        _ITEMS[model.hf] = item_count(outputs[0])
    return _ITEMS[model.hf]


def first(output: Any) -> Tensor:
    """The tensor that a block computed: its output, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def item_count(output: Any) -> int:
    """Number of items of a tuple, 0 for a plain tensor."""
    return len(output) if isinstance(output, tuple) else 0


def packed(value: Tensor, items: int) -> Any:
    """A tensor in the form in which a block returns it: plain, or first in a tuple of ``items``."""
    return (value, *[None] * (items - 1)) if items else value


class _Caught(Exception):
    """What was wanted is there; the rest of the forward pass is not needed."""


def attend(
    model: Model,
    layer: int,
    hidden: Float[Tensor, "batch token d_model"],
    given: Mapping[str, Float[Tensor, "batch token _"]],
) -> Float[Tensor, "batch token z"]:
    """Head outputs z of one layer's own attention; no other layer runs.

    Args:
        model: the model; its trunk makes masks and positions, for prompts without padding.
        layer: the layer.
        hidden: the residual streams that enter it.
        given: what some modules return instead of computing, by their path from the layer: the
            output of a projection, whole.

    Raises:
        RuntimeError: one of these modules never ran.
    """
    caught: list[Tensor] = []
    silent = set(given)
    module, items = model.layer(layer), _layer_items(model)
    own = module.forward

    def enter(_: Any, *args: Any, **kwargs: Any) -> Any:
        return own(hidden, *args, **kwargs)

    def give(path: str) -> Any:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            silent.discard(path)
            return given[path]

        return forward

    def catch(z: Any) -> Any:
        caught.append(z)
        raise _Caught

    with ExitStack() as stack:
        for below in range(layer):
            stack.enter_context(substitute(model.layer(below), packed(hidden, items)))
        stack.enter_context(substitute(module, enter))
        for path in given:
            stack.enter_context(substitute(model.part(layer, path), give(path)))
        stack.enter_context(substitute(model.part(layer, model.family.out), catch))
        stack.enter_context(suppress(_Caught))
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        model.trunk(input_ids=tokens, use_cache=False)
    if silent:
        raise RuntimeError(f"Every given output must be used, these were not: {sorted(silent)}.")
    return caught[0]
