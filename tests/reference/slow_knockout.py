"""Knockouts the slow way: one full forward pass per prompt, plain hooks, no cache, no batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from circuitune.components import Head
from circuitune.models import Model


def head_outputs(model: Model, tokens: list[int]) -> list[Tensor]:
    """Per layer what enters the output projection at every position, (token, heads * d_head)."""
    seen: list[Tensor] = []
    handles = [
        model.part(layer, model.family.out).register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0].clone())
        )
        for layer in range(model.layers)
    ]
    with torch.no_grad():
        model.hf(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def logits_without(
    model: Model, tokens: list[int], given: Mapping[Head, Tensor], positions: slice
) -> Tensor:
    """Logits of all tokens at END, heads overwritten at some positions, one row or one for each."""
    handles = []
    for head, value in given.items():
        width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)

        def overwrite(_, args, width=width, value=value):
            z = args[0].clone()
            z[0, positions, width] = value
            return (z,)

        out = model.part(head.layer, model.family.out)
        handles.append(out.register_forward_pre_hook(overwrite))
    with torch.no_grad():
        logits = model.hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits
