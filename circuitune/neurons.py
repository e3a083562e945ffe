"""Which neurons of an MLP carry its direct effect at END.

A neuron is one input of the down projection. Its direct effect is that of `circuitune.patching`:
its activation at END is that of the corrupt run, everything else of the MLP is clean, other heads
are held, later MLPs and norms recompute. All neurons are too many for that, so a gradient screens:
change of the activation, times output row, times slope of the logit difference in the MLP's output.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.models import Model, projection_shape
from circuitune.patching import EndStates, finish, replay, run_layer, unembed, wide
from circuitune.sites import substitute
from circuitune.tasks import Task
from circuitune.weights import widened


def down_projection(model: Model, layer: int) -> nn.Module:
    """The one projection of an MLP that writes into the residual stream.

    Raises:
        UserError: the MLP has none, or several (a mixture of experts).
    """
    block = model.part(layer, model.family.mlp)
    projections = [
        part
        for part in block.modules()
        if isinstance(part, nn.Linear | Conv1D) and projection_shape(part)[0] == model.d_model
    ]
    narrow = [part for part in projections if projection_shape(part)[1] != model.d_model]
    found = narrow or projections
    if len(found) != 1:
        raise UserError(
            f"Neurons need an MLP with one down projection, mlp.{layer} of {model.source} has "
            f"{len(found) or 'none'}; read the effects of whole MLPs instead."
        )
    return found[0]


@torch.no_grad()
def activations(model: Model, states: EndStates, layer: int) -> Float[Tensor, "example _"]:
    """What enters the down projection at END, one column per neuron.

    Raises:
        UserError: the MLP has no single down projection, or does more behind it.
    """
    down = down_projection(model, layer)
    own, caught = down.forward, []

    def catch(values: Tensor, *args: Any) -> Tensor:
        caught.append(wide(values))
        return own(values, *args)

    with widened(model.layer(layer)), substitute(down, catch):
        run_layer(model, states, layer, states.entry[layer][None], states.attention[layer][None])
    values = caught[0].reshape(len(states.final), -1)
    with widened(model.layer(layer)):
        again = wide(down(values.to(down.weight.dtype)))
    if len(caught) != 1 or not torch.allclose(again, states.mlp[layer], rtol=1e-2, atol=1e-3):
        raise UserError(
            f"Neurons need an MLP that ends with its down projection, mlp.{layer} of "
            f"{model.source} does not; read the effects of whole MLPs instead."
        )
    return values


def output_rows(
    model: Model, layer: int, neurons: Sequence[int]
) -> Float[Tensor, "sender d_model"]:
    """What each neuron writes per unit of its activation."""
    down = down_projection(model, layer)
    with widened(model.layer(layer)):
        weight = down.weight.T if isinstance(down, nn.Linear) else down.weight
        return wide(weight[list(neurons)]).clone()


@torch.enable_grad()
def slope(
    model: Model, states: EndStates, layer: int, pairs: "Asked"
) -> Float[Tensor, "example d_model"]:
    """Slope of each example's logit difference in the output of an MLP at END."""
    output = states.mlp[layer].clone().requires_grad_()
    entry, attention = states.entry[layer][None], states.attention[layer][None]
    state = run_layer(model, states, layer, entry, attention, mlp=output[None])
    for later in range(layer + 1, model.layers):
        state = run_layer(model, states, later, state, states.attention[later][None])
    logits = unembed(model, finish(model, state[0]), pairs.candidates)
    right = torch.as_tensor(pairs.answers, device=logits.device)[:, None]
    others = logits.scatter(1, right, float("-inf")).logsumexp(dim=1)
    (found,) = torch.autograd.grad((logits.gather(1, right)[:, 0] - others).sum(), output)
    return found


@dataclass(frozen=True)
class Asked:
    """Admissible answers, and the place of each example's answer among them."""

    candidates: tuple[int, ...]
    answers: Int[np.ndarray, " example"]

    @classmethod
    def of(cls, task: Task) -> "Asked":
        """What a task asks."""
        return cls(task.pairs.candidates, task.answers)


def screen(model: Model, task: Task, layer: int) -> Float[np.ndarray, " sender"]:
    """Estimated direct effect of every neuron of an MLP, a mean over the examples, in logits.

    Raises:
        UserError: weights are offloaded, or the MLP has no single down projection.
    """
    if model.offloaded:
        raise UserError(
            f"Screening neurons needs all weights in memory, layers of {model.source} are "
            "offloaded; give more --max-memory."
        )
    clean, corrupt = (activations(model, run, layer) for run in (task.clean, task.corrupt))
    rows = output_rows(model, layer, range(clean.shape[1]))
    slopes = slope(model, task.clean, layer, Asked.of(task))
    return ((corrupt - clean) * (slopes @ rows.T)).mean(dim=0).double().cpu().numpy()


@torch.no_grad()
def neuron_effects(
    model: Model, task: Task, layer: int, neurons: Sequence[int]
) -> Float[np.ndarray, "sender example"]:
    """Exact direct effect of single neurons on the logit difference, patched minus clean.

    Args:
        model: the model.
        task: the task.
        layer: layer of the MLP.
        neurons: columns of the down projection's input.
    """
    states, asked = task.clean, Asked.of(task)
    clean, corrupt = (activations(model, run, layer) for run in (states, task.corrupt))
    change = (corrupt - clean)[:, list(neurons)].T[..., None]
    outputs = states.mlp[layer] + change * output_rows(model, layer, neurons)[:, None]
    entry = states.entry[layer].expand_as(outputs)
    with ExitStack() as stack:
        stack.enter_context(widened(model.layer(layer)))
        attention = states.attention[layer][None]
        state = run_layer(model, states, layer, entry, attention, mlp=outputs)
    for later in range(layer + 1, model.layers):
        with widened(model.layer(later)):
            replay(model, states, later, state)
    patched = unembed(model, finish(model, state), asked.candidates).cpu().numpy()
    plain = unembed(model, states.final, asked.candidates).cpu().numpy()
    before, after = (measure(logits, asked.answers)["logit_diff"] for logits in (plain, patched))
    return after - before
