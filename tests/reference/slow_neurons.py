"""Direct effects of neurons with plain hooks: one whole forward pass per neuron and prompt."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from circuitune.models import Model


def passed(
    model: Model,
    tokens: list[int],
    layer: int,
    down: nn.Module,
    z: list[Tensor] | None = None,
    edit: tuple[int, float] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits at END, z of every layer at END, and what entered ``down`` at END.

    Args:
        model: the model.
        tokens: one prompt.
        layer: where ``down`` is; heads above it are held at ``z``.
        down: a down projection.
        z: head outputs at END to hold.
        edit: neuron, and its new activation at END.
    """
    heads: list[Tensor] = []
    inside: list[Tensor] = []

    def on_z(number: int) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            value = args[0].clone()
            if z is not None and number > layer:
                value[0, -1] = z[number]
            heads.append(value[0, -1].clone())
            return (value,)

        return hook

    def on_down(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        if edit is not None:
            value[0, -1, edit[0]] = edit[1]
        inside.append(value[0, -1].clone())
        return (value,)

    with ExitStack() as stack, torch.no_grad():
        for number in range(model.layers):
            out = model.part(number, model.family.out)
            stack.callback(out.register_forward_pre_hook(on_z(number)).remove)
        stack.callback(down.register_forward_pre_hook(on_down).remove)
        logits = model.hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits, heads, inside[0]
