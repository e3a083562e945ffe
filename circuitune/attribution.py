"""Gradient estimates of direct effects: one backward pass for all components.

The exact sweep (`circuitune.patching.direct_effects`) patches one component at a time. Here the
same replay of END runs once with every component in place, and the slope of the metric in each
component's output says how a patch would move the answer, to first order:

1. The residual stream at END passes all layers; each layer's attention is W_O of its recorded z.
   MLPs and norms recompute, so the slope runs through exactly the paths that the sweep counts.
2. One backward pass gives the slope of the metric in every head's z and every MLP's output.
3. estimate = (corrupt output - clean output) . slope.

This is attribution patching (Nanda 2023; Syed et al. 2023) with the attention held, so that the
estimand is the direct effect and not the total one. The estimate meets the exact effect as the
corrupt output nears the clean one; how far apart they are on a real model, `agreement` tells.
It screens, the exact sweep decides. Checked in ``tests/test_attribution.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitune.components import Component, Head, all_components
from circuitune.effects import EffectTable, Metric, measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import EndStates, finish, run_layer, unembed, wide
from circuitune.sites import first, substitute

# Examples per backward pass: the activations of all layers are kept for it.
EXAMPLES_PER_PASS = 256


def attribute(
    model: Model,
    clean: EndStates,
    corrupt: EndStates,
    *,
    candidates: Sequence[int],
    answers: Int[np.ndarray, " example"],
    steps: int = 1,
    metric: Metric = "logit_diff",
) -> EffectTable:
    """Estimate the direct effect of every head and MLP on the answer at END, per example.

    Args:
        model: the model; its parameters get no gradients and keep their flags.
        clean: states of the clean run (the run that would be patched).
        corrupt: states whose outputs would be patched in, same examples.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.
        steps: number of backward passes. 1 takes the slope in the clean run (attribution
            patching). More average it over the middles of ``steps`` equal pieces of the straight
            line on which *all* heads and the embedding of END move from clean to corrupt
            together, as in EAP-IG (Hanna et al. 2024); a line for each sender alone would take a
            pass for each. Along the joint line the estimates of the heads and the embedding sum
            to the whole change, interactions included, which effects one at a time do not.
        metric: what to differentiate. The table holds this metric only; for ``relative_logit``
            the values are raw answer logits, as `EffectTable` wants them.

    Returns:
        the table of `direct_effects` with ``patched`` = clean + estimate; negative supports.

    Raises:
        UserError: ``steps`` is not positive, or weights are offloaded.
    """
    _check(model, steps)
    shares = [0.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)]

    def score(right: Tensor, states: Tensor) -> Tensor:
        return _measure(unembed(model, finish(model, states), candidates), right, metric).sum()

    z_slope, mlp_slope = torch.zeros_like(clean.z), torch.zeros_like(clean.mlp)
    for start in range(0, len(clean.final), EXAMPLES_PER_PASS):
        chunk = slice(start, start + EXAMPLES_PER_PASS)
        right = torch.as_tensor(answers[chunk], device=clean.z.device)
        for share in shares:
            z = torch.lerp(clean.z[:, chunk], corrupt.z[:, chunk], share)
            entry = torch.lerp(clean.entry[0, chunk], corrupt.entry[0, chunk], share)
            slopes = _slopes(model, clean, z, entry, partial(score, right))
            z_slope[:, chunk] += slopes[0] / steps
            mlp_slope[:, chunk] += slopes[1] / steps
    with torch.no_grad():
        logits = unembed(model, clean.final, candidates).cpu().numpy()
    base = measure(logits, answers)[metric]
    parts = all_components(model.layers, model.heads)
    change = _by_component(
        model, parts, (corrupt.z - clean.z) * z_slope, (corrupt.mlp - clean.mlp) * mlp_slope
    )
    return EffectTable(parts, {metric: base}, {metric: base + change})


def _check(model: Model, steps: int) -> None:
    if model.offloaded:
        raise UserError(
            f"Attribution needs all weights in memory for its backward pass, layers of "
            f"{model.source} are offloaded; measure exact effects, or give more --max-memory."
        )
    if steps < 1:
        raise UserError(
            f"Attribution needs at least one step, found {steps}; 1 is plain attribution patching."
        )


def _by_component(
    model: Model,
    parts: Sequence[Component],
    z: Float[Tensor, "layer example z"],
    mlp: Float[Tensor, "layer example d_model"],
) -> Float[np.ndarray, "sender example"]:
    """Sums over the width of each component."""
    of_heads, of_mlps = z.unflatten(-1, (model.heads, model.d_head)).sum(-1), mlp.sum(-1)
    rows = [
        of_heads[part.layer, :, part.index] if isinstance(part, Head) else of_mlps[part.layer]
        for part in parts
    ]
    return torch.stack(rows).double().cpu().numpy()


@torch.enable_grad()
def _slopes(
    model: Model,
    clean: EndStates,
    z: Float[Tensor, "layer example z"],
    entry: Float[Tensor, "example d_model"],
    score: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "layer example z"], Float[Tensor, "layer example d_model"]]:
    """Slopes of ``score`` in every z and in every MLP's output, in the replay of END."""
    z = z.clone().requires_grad_()
    # Nothing is added to the MLPs' outputs, but the slope in the addend is the slope in the output.
    nothing = z.new_zeros(model.layers, *entry.shape).requires_grad_()
    states = entry[None]
    for layer in range(model.layers):
        out = model.part(layer, model.family.out)
        attention = wide(out(z[layer].to(out.weight.dtype)))[None]
        mlp = model.part(layer, model.family.mlp)
        with substitute(mlp, _adding(mlp.forward, nothing[layer])):
            states = run_layer(model, clean, layer, states, attention)
    return torch.autograd.grad(score(states[0]), (z, nothing))


def _adding(forward: Callable[..., Any], addend: Float[Tensor, "example d_model"]) -> Any:
    """A block's forward with something added to what it returns."""

    def add(*inputs: Any, **named: Any) -> Any:
        output = forward(*inputs, **named)
        value = first(output)
        value = value + addend.to(value.dtype).reshape(value.shape)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return add


def _measure(
    logits: Float[Tensor, "example candidate"], answers: Int[Tensor, " example"], metric: Metric
) -> Float[Tensor, " example"]:
    """`circuitune.effects.measure` of one metric, for torch to differentiate."""
    answer = logits.gather(1, answers[:, None])[:, 0]
    if metric == "relative_logit":
        return answer
    others = logits.scatter(1, answers[:, None], float("-inf"))
    difference = answer - others.logsumexp(dim=1)
    return difference.sigmoid() if metric == "prob" else difference


@dataclass(frozen=True)
class Agreement:
    """How near an estimate comes to the exact effects; all from means over the examples.

    Attributes:
        rank_correlation: Spearman's coefficient over the components, -1 to 1.
        overlap: share of the ``top`` exact components (most supporting) among the ``top``
            estimated ones, 0 to 1.
        largest_error: largest absolute difference, in the unit of the metric.
        top: how many components the overlap is about.
    """

    rank_correlation: float
    overlap: float
    largest_error: float
    top: int


def agreement(
    estimate: EffectTable, exact: EffectTable, metric: Metric = "logit_diff", *, top: int = 13
) -> Agreement:
    """Compare two tables of the same components, in whatever order.

    Raises:
        UserError: the tables are not about the same components.
    """
    if set(estimate.components) != set(exact.components):
        raise UserError(
            f"Both tables must have the same components, found {len(estimate.components)} and "
            f"{len(exact.components)} with {len({*estimate.components} & {*exact.components})} in "
            "common; compare with `EffectTable.select`."
        )
    estimate = estimate.select(exact.components)
    guessed, true = estimate.mean(metric), exact.mean(metric)
    ranks = [pd.Series(means).rank() for means in (guessed, true)]
    top = min(top, len(true))
    common = {*estimate.rank(metric)[:top]} & {*exact.rank(metric)[:top]}
    return Agreement(
        rank_correlation=float(np.corrcoef(*ranks)[0, 1]),
        overlap=len(common) / top,
        largest_error=float(np.abs(guessed - true).max()),
        top=top,
    )
