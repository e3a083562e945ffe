"""How much memory a sweep takes, and how to stay within a bound.

The bound (``--max-memory``) is on the whole process on a CPU, and on torch's own memory on a GPU.
What is in use when a step begins is measured; what the step will add follows from the sizes of
the model. Rows and tokens then run in pieces that fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from circuitune.errors import UserError
from circuitune.models import Model, projection_shape

# Numbers are float32 while END is computed, whatever the weights are.
WIDE = 4
# The allocator and temporary copies take this share of the bound for themselves.
RESERVE = 0.1


def shown(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def used(device: torch.device) -> int:
    """Bytes in use now: of the process, or of torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Estimate:
    """What a sweep over all components takes, in bytes.

    Attributes:
        now: in use before it starts, the weights that are in memory included.
        layer: one layer in float32, where weights are offloaded or of lower precision.
        states: keys and values of clean and corrupt prompts, and what passes END.
        rows: residual streams of all (sender, example) rows at once; fewer run at once if need be.
        least: what one layer call needs for its own results.
    """

    now: int
    layer: int
    states: int
    rows: int
    least: int

    @property
    def smallest(self) -> int:
        """Bytes without which nothing runs, rows in the smallest pieces."""
        return int((self.now + self.layer + self.states + self.least) * (1 + RESERVE))

    @property
    def whole(self) -> int:
        """Bytes with all rows at once."""
        return self.smallest + self.rows

    def __str__(self) -> str:
        return (
            f"about {shown(self.whole)} ({shown(self.now)} in use, one layer {shown(self.layer)}, "
            f"states {shown(self.states)}, rows {shown(self.rows)}, work {shown(self.least)})"
        )


def estimate(model: Model, pairs: int, tokens: int) -> Estimate:
    """What a sweep over so many pairs of so many tokens takes."""
    kept = 2 * (3 * model.d_model + model.heads * model.d_head) * WIDE
    item = torch.empty(0, dtype=model.dtype).element_size()
    cached = 2 * 2 * model.kv_heads * model.d_head * tokens * item
    senders = model.layers * (model.heads + 1)
    return Estimate(
        now=used(model.device),
        layer=_layer_bytes(model),
        # While states are put in order there are two copies of them.
        states=pairs * model.layers * (2 * kept + cached),
        rows=pairs * senders * model.d_model * WIDE,
        least=LEAST_TOKENS * _row_bytes(model),
    )


# Tokens, or rows of the replay, that a layer call takes at least; fewer would waste the weights.
LEAST_TOKENS = 1024


def _row_bytes(model: Model) -> int:
    """What one token needs inside a layer: the MLP's hidden numbers, a few residual streams."""
    return WIDE * (3 * _widest(model) + 8 * model.d_model)


def _widest(model: Model) -> int:
    """The most outputs that a projection of a layer has; a fused one counts whole."""
    shapes = (
        projection_shape(part)[0]
        for part in model.layer(0).modules()
        if getattr(getattr(part, "weight", None), "ndim", 0) == 2
    )
    return max(shapes, default=4 * model.d_model)


def _layer_bytes(model: Model) -> int:
    """Bytes of the largest layer while it runs, if these come on top of what is in memory."""
    offloaded = model.offloaded
    sizes = [
        sum(
            weight.numel() * WIDE
            for weight in model.layer(index).parameters()
            if offloaded or weight.dtype in (torch.bfloat16, torch.float16)
        )
        for index in range(model.layers)
    ]
    return max(sizes)


def most_rows(model: Model) -> int | None:
    """How many residual streams of the replay may be held at once; None without a bound."""
    if model.max_memory is None:
        return None
    least = LEAST_TOKENS * _row_bytes(model)
    left = model.max_memory * (1 - RESERVE) - used(model.device) - _layer_bytes(model) - least
    # Final hidden states and the logits of candidates come beside the rows.
    return max(LEAST_TOKENS, int(left / (3 * model.d_model * WIDE)))


def most_tokens(model: Model, usual: int) -> int:
    """How many tokens may run through a layer together, at most ``usual``."""
    if model.max_memory is None:
        return usual
    left = model.max_memory * (1 - RESERVE) - used(model.device) - _layer_bytes(model)
    return int(min(usual, max(LEAST_TOKENS, left / 2 / _row_bytes(model))))


def check_room(model: Model, positions: int) -> None:
    """Refuse to keep what passes so many positions of all layers, if the bound has no room for it.

    Raises:
        UserError: it has not.
    """
    kept = positions * model.layers * (3 * model.d_model + model.heads * model.d_head) * WIDE
    wanted = int((used(model.device) + kept) * (1 + RESERVE))
    if model.max_memory is not None and wanted > model.max_memory:
        raise UserError(
            f"--max-memory must hold the runs at every position, {shown(wanted)}, found "
            f"{shown(model.max_memory)}; give more, or take fewer or shorter prompts."
        )


def check_fits(model: Model, lengths: Sequence[int]) -> Estimate:
    """The estimate for prompts of these lengths, one per pair, if it stays within the bound.

    Raises:
        UserError: even in the smallest pieces it would not.
    """
    found = estimate(model, len(lengths), max(lengths))
    if model.max_memory is not None and found.smallest > model.max_memory:
        raise UserError(
            f"--max-memory must hold a sweep in its smallest pieces, {shown(found.smallest)} for "
            f"{len(lengths)} pairs of up to {max(lengths)} tokens, found "
            f"{shown(model.max_memory)}; give more, or fewer pairs (--per-split)."
        )
    return found
