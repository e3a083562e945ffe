"""Attention weights by hand, from the queries and keys of one plain forward pass.

For models whose code rotates queries and keys with a function ``apply_rotary_pos_emb`` of its own.
"""

import sys
from unittest.mock import patch

import torch
from torch import Tensor

from circuitune.models import Model


def slow_attention(model: Model, tokens: list[int]) -> Tensor:
    """Weights from END, (layer, head, token)."""
    code = sys.modules[type(model.hf).__module__]
    rotate, rotated = code.apply_rotary_pos_emb, []

    def keep(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        rotated.append(rotate(*args, **kwargs))
        return rotated[-1]

    with patch.object(code, "apply_rotary_pos_emb", keep), torch.no_grad():
        model.hf(torch.tensor([tokens]), use_cache=False)
    weights = []
    for layer, (queries, keys) in zip(model.hf.model.layers, rotated, strict=True):
        own = layer.self_attn
        for head in range(queries.shape[1]):
            shared = head * keys.shape[1] // queries.shape[1]
            scores = keys[0, shared] @ queries[0, head, -1] * own.scaling
            if cap := getattr(own, "attn_logit_softcapping", None):
                scores = cap * torch.tanh(scores / cap)
            if window := getattr(own, "sliding_window", None):
                scores[: max(0, len(scores) - window)] = float("-inf")
            weights.append(scores.softmax(dim=0))
    return torch.stack(weights).reshape(len(rotated), -1, len(tokens))
