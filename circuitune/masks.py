"""Gradient masks: learn by how much each head must be ablated to destroy tasks and spare others.

A mask holds one number for every head, 0 (left alone) to 1 (mean-ablated at END). Gradient descent
on all numbers at once, with a price on their sum, finds heads that matter *together* without trying
any set (Louizos et al. 2018; Cao et al. 2021, De Cao et al. 2022 for circuits). A mask is an
estimate: fractions are no knockout. It only proposes; `circuitune.joint` decides by exact effects.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import unembed
from circuitune.prompts import Batch
from circuitune.sites import blend
from circuitune.tasks import Task

RATE = 0.2
# Every head starts nearly untouched, where the sigmoid still has a slope.
START = -2.0
# What ablating a whole head costs, in logits of the answer.
PRICE = 0.1
# A lost logit of a spared task weighs as much as this many gained on a target.
SPARED_WEIGHT = 2.0


def learn_mask(
    model: Model,
    task: Task,
    admissible: Bool[np.ndarray, "example candidate"],
    weights: Float[np.ndarray, " example"],
    *,
    steps: int = 40,
) -> Float[np.ndarray, "layer head"]:
    """How much of each head is ablated, between 0 and 1, after gradient descent (Adam).

    The loss is the weighted mean of softplus(logit difference) over the pairs to destroy, of what
    the logit difference of the spared ones lost, and a price on the sum of the mask. Nothing is
    drawn at random.

    Args:
        model: the model; its parameters get no gradients.
        task: the pairs, all on this process.
        admissible: which candidates compete with each answer.
        weights: share of each pair in the loss; negative where its answer should stay.
        steps: steps of descent, each one pass over all pairs.

    Raises:
        UserError: weights are offloaded.
    """
    check_in_memory(model)
    wanted = _Wanted(
        torch.as_tensor(task.pairs.answers, device=model.device),
        torch.as_tensor(admissible, device=model.device),
        torch.as_tensor(weights, device=model.device).float(),
    )
    with torch.no_grad():
        before = wanted.difference(unembed(model, task.clean.final, task.pairs.candidates))
    theta = torch.full((model.layers, model.heads), START, device=model.device, requires_grad=True)
    descent = torch.optim.Adam([theta], lr=RATE)
    for _ in range(steps):
        slope = torch.autograd.grad(PRICE * theta.sigmoid().sum(), theta)[0]
        for batch in task.prompts.batches:
            slope += _slope(model, task, batch, wanted.of(batch.places), before, theta)
        theta.grad = slope
        descent.step()
    return theta.detach().sigmoid().double().cpu().numpy()


def check_in_memory(model: Model) -> None:
    """Refuse a model whose layers are read from disk.

    Raises:
        UserError: weights are offloaded.
    """
    if model.offloaded:
        raise UserError(
            "A gradient mask needs all weights in memory for its backward pass, layers of "
            f"{model.source} are offloaded; give more --max-memory or choose --rule iterated."
        )


@dataclass(frozen=True)
class _Wanted:
    """What the loss asks of each pair, on the model's device."""

    answers: Int[Tensor, " example"]
    admissible: Bool[Tensor, "example candidate"]
    weights: Float[Tensor, " example"]

    def of(self, places: list[int]) -> "_Wanted":
        """Of some of the pairs."""
        return _Wanted(self.answers[places], self.admissible[places], self.weights[places])

    def difference(self, logits: Float[Tensor, "example candidate"]) -> Float[Tensor, " example"]:
        """Logit of the answer minus logsumexp of the other admissible ones."""
        logits = logits.float().masked_fill(~self.admissible, -torch.inf)
        rest = logits.scatter(1, self.answers[:, None], -torch.inf).logsumexp(1)
        return logits.gather(1, self.answers[:, None])[:, 0] - rest


@torch.enable_grad()
def _slope(
    model: Model,
    task: Task,
    batch: Batch,
    wanted: _Wanted,
    before: Float[Tensor, " example"],
    theta: Float[Tensor, "layer head"],
) -> Float[Tensor, "layer head"]:
    """Slope of one batch's share of the loss in theta."""
    means = task.average.z[:, batch.places]
    with batch.unchanged(), blend(model, theta.sigmoid(), means):
        out = model.trunk(**batch.at_end, use_cache=True)
    logits = unembed(model, out.last_hidden_state[:, -1], task.pairs.candidates)
    difference = wanted.difference(logits)
    lost = (before[batch.places] - difference).clamp(min=0)
    spare = wanted.weights < 0
    losses = torch.where(spare, SPARED_WEIGHT * lost, nn.functional.softplus(difference))
    return torch.autograd.grad((wanted.weights.abs() * losses).sum(), theta)[0]


def by_mask(mask: Float[np.ndarray, "layer head"]) -> list[Head]:
    """All heads, the most ablated first."""
    order = np.argsort(-mask, axis=None, kind="stable")
    return [Head(int(place // mask.shape[1]), int(place % mask.shape[1])) for place in order]
