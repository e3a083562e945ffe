"""Tuning of heads the slow way: train every parameter, then put back all but the chosen ones.

Nothing is shared with slices: plain modules, no deltas, and every output of every projection is
labelled one by one with the head that it belongs to.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from circuitune.components import Head, Mlp
from circuitune.models import Model

Label = tuple[str, int]
SEPARATE = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}


def labels(model: Model, name: str) -> list[Label]:
    """The query, key or value (``q``, ``k``, ``v``) that each output of a projection belongs to."""
    share = model.heads // model.kv_heads
    queries = [("q", head) for head in range(model.heads)]
    keys = [("k", group) for group in range(model.kv_heads)]
    values = [("v", group) for group in range(model.kv_heads)]
    if name in SEPARATE:
        wholes = {"q": queries, "k": keys, "v": values}[SEPARATE[name]]
    elif name in ("c_attn", "qkv_proj"):
        wholes = queries + keys + values
    elif name == "query_key_value":
        wholes = []
        for group in range(model.kv_heads):
            wholes += queries[group * share : (group + 1) * share]
            wholes += [keys[group], values[group]]
    else:
        return []
    return [label for label in wholes for _ in range(model.d_head)]


def inside(
    model: Model, heads: Sequence[Head], mlps: Sequence[Mlp] = (), form: str = "qo"
) -> dict[str, Tensor]:
    """Which numbers of which parameters belong to heads and MLPs; parameters without are left out.

    Args:
        model: the model.
        heads: the heads.
        mlps: the MLPs.
        form: ``qo`` or ``qkvo``.
    """
    share = model.heads // model.kv_heads
    found = {}
    for name, parameter in model.hf.named_parameters():
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        module = name.split(".")[-2]
        layer = name.removeprefix(f"{model.family.layers}.").split(".")[0]
        here = [head for head in heads if str(head.layer) == layer]
        wanted = {("q", head.index) for head in here}
        if form == "qkvo":
            wanted |= {(kind, head.index // share) for head in here for kind in "kv"}
        transposed = mask.T if module in ("c_attn", "c_proj") and mask.ndim == 2 else mask
        for output, label in enumerate(labels(model, module)):
            transposed[output] = label in wanted
        if name.endswith(f"{model.family.out}.weight"):
            for head in here:
                transposed[:, head.index * model.d_head : (head.index + 1) * model.d_head] = True
        if any(part in name.split(".") for part in ("mlp", "block_sparse_moe", "fc1", "fc2")):
            mask |= any(str(mlp.layer) == layer for mlp in mlps)
        if mask.any():
            found[name] = mask
    return found


def masked_training(
    model: Model, masks: dict[str, Tensor], batches: Sequence[Tensor], rate: float
) -> dict[str, Tensor]:
    """All parameters after a step of plain gradient descent per batch, masked after each."""
    hf = copy.deepcopy(model.hf).requires_grad_(True)
    base = {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}
    optimiser = torch.optim.SGD(hf.parameters(), lr=rate)
    for tokens in batches:
        optimiser.zero_grad()
        predicted = hf(tokens).logits[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten()).backward()
        optimiser.step()
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                kept = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
                parameter.copy_(torch.where(kept, parameter, base[name]))
    return {name: parameter.detach() for name, parameter in hf.named_parameters()}
