"""What one step of training computes: its examples, and their loss.

What trains is a list of parameters that are attached to a frozen model. Backward stops at the
lowest trained layer; what enters it comes from the cache (`circuitune.prefix`), or the layers
below run without gradients. Logits exist at supervised positions only. A batch of unlike lengths
runs in groups of like ones, none beyond the last supervised token in it. Dropout is off: the base
stays in evaluation mode.

The loss of a step is a sum over supervised tokens divided by their number in the whole step,
whatever the lengths, the number of pieces (``accumulate``) and of processes. With ``keep``, the
tuned model is held to the base by KL(base, tuned) on plain text. The order of the examples is a
function of seed and step alone.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from circuitune import ranks
from circuitune.examples import IGNORED, Example
from circuitune.models import Model
from circuitune.patching import unembed
from circuitune.prefix import PlainText, PrefixCache, cached_or_built, plain_text
from circuitune.sites import resume, states_entering, substitute
from circuitune.writing import pad

TEXT_ROWS = 3  # rows of plain text per step
LOGIT_ROWS = 2048  # rows of logits over the whole vocabulary whose gradients are kept at once
# What a further forward and backward pass costs, in tokens; a GPU waits for its launch.
PASS_TOKENS = {"cpu": 32, "other": 2048}


@dataclass(frozen=True)
class LoopConfig:
    """Options of the loop.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step, of all pieces and processes together.
        learning_rate: peak of AdamW's.
        in_place: factor on it for parameters that do not start at zero, those that train in place.
        accumulate: pieces of a batch that run one after another, to save memory.
        weight_decay: pull towards the values at the start, per step and learning rate.
        warmup: share of the steps over which the learning rate rises.
        schedule: how it falls afterwards.
        max_grad_norm: gradients are scaled down to this norm; 0 for no bound.
        keep: weight of the KL to the base on plain text, 0 for none.
        seed: of the order of the examples.
        save_every: steps between checkpoints, 0 for none.
        checkpointing: keep only what enters each trained layer, and compute the rest twice.
        tensorboard: write the log for TensorBoard too.
    """

    steps: int
    batch_size: int
    learning_rate: float
    in_place: float = 1.0
    accumulate: int = 1
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = 1.0
    keep: float = 0.0
    seed: int = 0
    save_every: int = 0
    checkpointing: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainingSet:
    """What a run trains on; the same for all methods with the same lowest layer.

    Attributes:
        examples: the texts; each has a supervised token after its first.
        layer: the lowest trained layer.
        prefix: whether what enters that layer is the base's.
        states: hidden states that enter it; None to compute them anew each time.
        text: plain text on which the model is held to the base; None for none.
    """

    examples: Sequence[Example]
    layer: int
    prefix: bool
    states: PrefixCache | None = None
    text: PlainText | None = None

    def digest(self) -> str:
        """Sha256 of all tokens and labels, and of where training starts."""
        rows = [(item.tokens, item.labels) for item in self.examples]
        text = [] if self.text is None else self.text.tokens.tolist()
        facts = (rows, text, self.layer, self.prefix)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def training_set(
    model: Model,
    examples: Sequence[Example],
    layer: int,
    *,
    prefix: bool = True,
    cache: Path | None = None,
    rows: Sequence[list[int]] = (),
) -> TrainingSet:
    """Everything that a run trains on, computed with the base.

    Args:
        model: the base, nothing attached.
        examples: the texts.
        layer: the lowest trained layer.
        prefix: whether what enters that layer is the base's.
        cache: folder for hidden states that enter it; None to compute them anew each time.
        rows: plain text to hold the model to the base, see `circuitune.prefix.text_rows`.
    """
    cached = prefix and layer > 0 and cache is not None
    states = cached_or_built(model, examples, layer, cache) if cached else None
    text = plain_text(model, rows, layer, prefix=prefix) if rows else None
    return TrainingSet(examples, layer, prefix, states, text)


class Supervised(nn.Module):
    """The model from a layer upwards with its training loss, as the Trainer wants it."""

    accepts_loss_kwargs = True  # the Trainer then gives the number of supervised tokens of a step

    def __init__(
        self,
        model: Model,
        parameters: Sequence[nn.Parameter],
        data: TrainingSet,
        config: LoopConfig,
    ) -> None:
        """Hold the trained parameters; the frozen base is not part of this module's state."""
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self._frozen = (model, data)  # in a tuple, so that no module in it is registered
        self._config = config

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        labels: Int[Tensor, "batch token"],
        hidden: Float[Tensor, "batch token d_model"] | None = None,
        rows: Int[Tensor, " text"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross entropy of supervised tokens plus the weighted KL to the base.

        Args:
            input_ids: tokens, padded on the right.
            labels: the token that should follow each, or ``IGNORED``.
            hidden: hidden states that enter the lowest trained layer.
            rows: rows of plain text that belong to this piece of the batch.
            num_items_in_batch: supervised tokens of the whole step.

        Returns:
            ``loss``: this piece's share of the step's loss, nats per token.
        """
        model, _ = self._frozen
        home, tokens, labels = labels.device, *(x.to(model.device) for x in (input_ids, labels))
        chosen = labels != IGNORED
        count = chosen.sum() if num_items_in_batch is None else num_items_in_batch
        states, wanted = [], []
        for rows_alike, length in self._groups(chosen):
            entering = None if hidden is None else hidden[rows_alike, :length]
            found = self._final_states(tokens[rows_alike, :length], entering)
            here = chosen[rows_alike, :length]
            states.append(found[here])
            wanted.append(labels[rows_alike, :length][here])
        loss = self._surprise(torch.cat(states), torch.cat(wanted)).to(home) / count
        if self._config.keep and rows is not None:
            per_step = min(TEXT_ROWS, self._config.batch_size)
            loss = loss + self._config.keep * self._divergence(rows).to(home) / per_step
        return {"loss": loss}

    def _groups(self, chosen: Tensor) -> list[tuple[list[int], int]]:
        """Rows of a batch that run together, and how many of their tokens.

        Of several processes each runs its whole share at once: where weights are sharded, all must
        run equally many passes.
        """
        numbers = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
        lengths = (chosen * numbers).amax(dim=1).clamp(min=1).tolist()
        if ranks.world() > 1:
            return [(list(range(len(lengths))), max(lengths))]
        kind = "cpu" if chosen.device.type == "cpu" else "other"
        groups = alike(lengths, PASS_TOKENS[kind])
        return [(rows, max(lengths[row] for row in rows)) for rows in groups]

    def _surprise(self, states: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy; of many rows, logits are made again in the backward pass."""
        model, _ = self._frozen

        def part(some: Tensor, wanted: Tensor) -> Tensor:
            return nn.functional.cross_entropy(unembed(model, some), wanted, reduction="sum")

        if len(labels) <= LOGIT_ROWS:
            return part(states, labels)
        pieces = zip(states.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
        return torch.stack(
            [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
        ).sum()

    def _divergence(self, rows: Tensor) -> Tensor:
        """KL(base, tuned) on rows of plain text, mean over tokens, summed over rows."""
        model, data = self._frozen
        text, rows = data.text, rows.to(data.text.tokens.device)
        hidden = None if text.hidden is None else text.hidden[rows.to(text.hidden.device)]
        now = unembed(model, self._final_states(text.tokens[rows].to(model.device), hidden))
        with torch.no_grad(), ExitStack() as stack:
            if text.head is not None:
                embedding = model.hf.get_output_embeddings()
                stack.enter_context(substitute(embedding, text.head.forward))
            base = unembed(model, text.final[rows.to(text.final.device)].to(model.device))
            base = base.log_softmax(dim=-1)
        terms = (base.exp() * (base - now.log_softmax(dim=-1))).sum(dim=-1)
        return terms.sum() / text.tokens.shape[1]

    def _final_states(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Final hidden states; layers below the lowest trained one run without gradients."""
        model, data = self._frozen
        if hidden is None and data.prefix and data.layer:
            with torch.no_grad():
                hidden = states_entering(model, data.layer, tokens)
        start = 0 if hidden is None else data.layer
        with ExitStack() as stack:
            if hidden is not None:
                stack.enter_context(resume(model, start, hidden.to(model.device)))
            for index in range(start, model.layers) if self._config.checkpointing else ():
                layer = model.layer(index)
                twice = partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
                stack.enter_context(substitute(layer, twice))
            return model.trunk(input_ids=tokens, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Course:
    """Which example, and which row of plain text, is where in a run."""

    data: TrainingSet
    config: LoopConfig

    @cached_property
    def order(self) -> list[int]:
        """Places of the examples, step after step; each once before any comes again."""
        chance = torch.Generator().manual_seed(self.config.seed)
        wanted, count = self.config.steps * self.config.batch_size, len(self.data.examples)
        epochs = [torch.randperm(count, generator=chance) for _ in range(math.ceil(wanted / count))]
        return torch.cat(epochs)[:wanted].tolist()

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at a position, its hidden states, and a row of text for some positions."""
        place, text = self.order[position], self.data.text
        item: dict[str, Any] = {"example": self.data.examples[place]}
        if self.data.states is not None:
            item["hidden"] = self.data.states[place]
        if self.config.keep and text is not None:
            rows = min(TEXT_ROWS, self.config.batch_size)
            step, within = divmod(position, self.config.batch_size)
            number, rest = divmod(within, self.config.batch_size // rows)  # spread over the pieces
            if number < rows and not rest:
                item["row"] = (step * rows + number) % len(text.tokens)
        return item

    def tokens(self, steps: range) -> int:
        """Tokens that run in some steps (counted from 0), without padding and plain text."""
        size = self.config.batch_size
        places = self.order[steps.start * size : steps.stop * size]
        return sum(len(self.data.examples[place].tokens) - 1 for place in places)


def alike(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Places in groups of like length, so that all tokens, with padding, cost least.

    Args:
        lengths: of the texts, in tokens.
        cost: of one more group, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    # Of the shortest texts, for each number of them: their cost, and where the last group begins.
    least, begins = [0], [0]
    for stop, place in enumerate(order, start=1):
        costs = [least[start] + (stop - start) * lengths[place] for start in range(stop)]
        begins.append(min(range(stop), key=costs.__getitem__))
        least.append(costs[begins[-1]] + cost)
    groups, stop = [], len(order)
    while stop:
        groups.append(order[begins[stop] : stop])
        stop = begins[stop]
    return groups[::-1]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Inputs of `Supervised` from items of a `Course`, padded on the right."""
    examples: list[Example] = [item["example"] for item in items]
    batch = {
        "input_ids": pad([example.tokens[:-1] for example in examples], 0),
        "labels": pad([example.labels[1:] for example in examples], IGNORED),
    }
    if "hidden" in items[0]:
        hidden = [item["hidden"] for item in items]
        batch["hidden"] = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    if rows := [item["row"] for item in items if "row" in item]:
        batch["rows"] = torch.tensor(rows)
    return batch
