"""Learning rates of methods, in proportion to a model's weights.

AdamW moves a weight by up to its learning rate each step, however large the weight is. Rates that
were found on one model therefore suit another only as shares of its weights, whose sizes differ
by a factor of five between small models (``docs/log.md``, 2026-11-24). LoRA's product starts at
zero; what it adds is measured against the same weights.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from circuitune.models import Model

# Root mean square of the weights of SmolLM2-135M-Instruct, on which the rates below were found.
USUAL_SIZE = 0.1934
# Peak learning rates of AdamW for weights of that size: from docs/findings-tuning.md, the best on
# the seed that decides about options that does not move plain English much; that of layers is a
# guess.
LEARNING_RATES = {
    "precise": 3e-3,
    "random": 3e-3,
    "layers": 1e-3,
    "lora": 1e-3,
    "lora_heads": 1e-2,
    "full": 5e-5,
}


@torch.no_grad()
def weight_size(model: Model) -> float:
    """Root mean square of the weights of all linear projections of the decoder layers."""
    squares, count = 0.0, 0
    for index in range(model.layers):
        for part in model.layer(index).modules():
            if isinstance(part, nn.Linear | Conv1D):
                dtype = torch.promote_types(part.weight.dtype, torch.float32)
                squares += float(torch.linalg.vector_norm(part.weight, dtype=dtype)) ** 2
                count += part.weight.numel()
    return float((squares / count) ** 0.5) if count else USUAL_SIZE


def own_rate(model: Model, method: str) -> float:
    """Peak learning rate of a method on a model, to two digits.

    Args:
        model: the base, with all weights in memory.
        method: one of `circuitune.methods.METHODS`.
    """
    return float(f"{LEARNING_RATES[method] * weight_size(model) / USUAL_SIZE:.1e}")
