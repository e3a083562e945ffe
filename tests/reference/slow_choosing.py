"""Choices the slow way: one whole forward pass per question and choice, plain hooks, no cache."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuitune.components import Head
from circuitune.models import Model


def run(model: Model, tokens: list[int], given: Mapping[Head, Tensor], first: int):
    """Log probabilities at every position, heads overwritten from a position on, and what was z.

    Args:
        model: the model.
        tokens: the whole text.
        given: per head one row for each position from ``first`` on.
        first: the first position that is overwritten.
    """
    seen: dict[int, Tensor] = {}
    handles = []
    for layer in range(model.layers):

        def hook(_, args, layer=layer):
            z = args[0].clone()
            for head, rows in given.items():
                if head.layer == layer:
                    z[0, first:, head.index * model.d_head : (head.index + 1) * model.d_head] = rows
            seen[layer] = z[0].clone()
            return (z,)

        handles.append(model.part(layer, model.family.out).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model.hf(torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits.log_softmax(dim=-1), seen


def slow_log_prob(
    model: Model,
    prompt: list[int],
    choice: list[int],
    end: Mapping[Head, Tensor],
    later: Mapping[Head, Tensor],
) -> float:
    """Log probability of a choice, heads at their means at the prompt's last token and after it."""
    tokens, first = prompt + choice[:-1], len(prompt) - 1
    given = {h: torch.stack([end[h]] + [later[h]] * (len(choice) - 1)) for h in end}
    values, _ = run(model, tokens, given, first)
    return sum(float(values[first + step, token]) for step, token in enumerate(choice))


def slow_means(
    model: Model,
    prompts: Sequence[list[int]],
    choices: Sequence[Sequence[list[int]]],
    heads: Sequence[Head],
) -> dict[Head, tuple[Tensor, Tensor]]:
    """Mean outputs at the prompts' last tokens, and at tokens of choices that are not last."""
    ends, others = [], []
    for prompt, texts in zip(prompts, choices, strict=True):
        for choice in texts:
            _, z = run(model, prompt + choice[:-1], {}, 0)
            others.append({layer: rows[len(prompt) :] for layer, rows in z.items()})
        ends.append({layer: rows[len(prompt) - 1 :][:1] for layer, rows in z.items()})
    means = {}
    for head in heads:
        width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
        parts = ([seen[head.layer][:, width] for seen in some] for some in (ends, others))
        means[head] = tuple(torch.cat(rows).mean(dim=0) for rows in parts)
    return means
