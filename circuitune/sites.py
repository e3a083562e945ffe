"""The only file with hooks: read and change what flows through a model, and put it back.

Context managers, all restored on leaving, also after an exception:

- `record` keeps what passes END: head outputs z, attention and MLP contributions, layer inputs.
- `intervene` overwrites the output of components; it counts its firings and raises on leaving
  if an edit never happened, since "no effect" must never mean "the hook did not run".
- `substitute` lets a module return a given value instead of computing, so that a decoder layer
  can be run with its attention replaced.
- `resume` starts the model at a layer, from hidden states that were computed before.

Batches are padded on the left, hence END is position -1 everywhere.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from circuitune.components import Component, Head
from circuitune.models import Model

Where = Literal["end", "all"]


@dataclass
class Trace:
    """What passed END in each forward pass, in lists of one tensor per layer.

    Attributes:
        z: input of the output projection, the head outputs side by side, (batch, heads*d_head).
        attention: output of the attention block, (batch, d_model).
        mlp: output of the MLP, (batch, d_model).
        entry: the residual stream that enters the layer, (batch, d_model).
        calls: the other arguments of the layer, to call it again.
    """

    z: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    entry: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@contextmanager
def record(model: Model) -> Iterator[Trace]:
    """Keep what passes END in *one* forward pass of the model.

    Raises:
        RuntimeError: on leaving, if some layer did not pass exactly once.
    """
    trace = Trace()

    def end(value: Any) -> Tensor:
        tensor = value[0] if isinstance(value, tuple) else value
        return tensor[:, -1].detach().clone()  # clone: some layers add in place afterwards

    def on_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.entry.append(end(args[0]))
        without = {key: value for key, value in kwargs.items() if not isinstance(value, Cache)}
        trace.calls.append((args[1:], without))

    with ExitStack() as stack:
        for index in range(model.layers):
            out = model.part(index, model.family.out)
            attention = model.part(index, model.family.attention)
            mlp = model.part(index, model.family.mlp)
            handles = (
                model.layer(index).register_forward_pre_hook(on_layer, with_kwargs=True),
                out.register_forward_pre_hook(lambda _, args: trace.z.append(end(args[0]))),
                attention.register_forward_hook(lambda *a: trace.attention.append(end(a[-1]))),
                mlp.register_forward_hook(lambda *a: trace.mlp.append(end(a[-1]))),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield trace
    seen = {len(trace.z), len(trace.attention), len(trace.mlp), len(trace.entry)}
    if seen != {model.layers}:
        raise RuntimeError(
            f"record must see each of {model.layers} layers exactly once, saw {sorted(seen)}; "
            f"the family record of {model.family.name!r} does not fit this model."
        )


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
    fired = dict.fromkeys(edits, 0)
    place = (slice(None), -1) if where == "end" else (slice(None), slice(None))

    def write(target: Tensor, value: Tensor) -> None:
        value = value.to(target)
        if where == "all" and value.ndim == 2:
            value = value[:, None]
        target[place] = value

    def edit_heads(layer: int, heads: list[Head]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            for head in heads:
                width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
                write(z[..., width], edits[head])
                fired[head] += 1
            return (z, *args[1:])

        return model.part(layer, model.family.out).register_forward_pre_hook(hook)

    def edit_mlp(part: Component) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            write(output, edits[part])
            fired[part] += 1
            return output

        return model.part(part.layer, model.family.mlp).register_forward_hook(hook)

    with ExitStack() as stack:
        for layer in sorted({part.layer for part in edits}):
            here = [part for part in edits if part.layer == layer]
            heads = [part for part in here if isinstance(part, Head)]
            if heads:
                stack.callback(edit_heads(layer, heads).remove)
            for part in here:
                if not isinstance(part, Head):
                    stack.callback(edit_mlp(part).remove)
        yield
    silent = [str(part) for part, count in fired.items() if count == 0]
    if silent:
        raise RuntimeError(f"Every edit must fire, these never did: {', '.join(silent)}.")


@contextmanager
def substitute(module: nn.Module, output: Any) -> Iterator[None]:
    """Let ``module`` return ``output`` (or ``output(*args)`` if callable) without computing."""
    forward = output if callable(output) else (lambda *_args, **_kwargs: output)
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
    tokens that the caller passes. Nothing is substituted for layer 0.
    """
    with ExitStack() as stack:
        for index in range(layer):
            stack.enter_context(substitute(model.layer(index), _pass_on))
        if layer:
            stack.enter_context(substitute(model.layer(layer - 1), hidden))
        yield


def states_entering(
    model: Model, layer: int, tokens: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token d_model"]:
    """Hidden states that enter a layer; the layers from there on do not run."""
    caught: list[Tensor] = []

    def catch(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        caught.append(hidden)
        return hidden

    with ExitStack() as stack:
        stack.enter_context(substitute(model.layer(layer), catch))
        for index in range(layer + 1, model.layers):
            stack.enter_context(substitute(model.layer(index), _pass_on))
        model.hf.base_model(input_ids=tokens, use_cache=False)
    return caught[0]


def _pass_on(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden
