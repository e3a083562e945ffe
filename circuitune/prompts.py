"""Prompts, their keys and values before END computed once, whatever they share only once.

END is the last position; everything that is measured passes there, and every run of END (clean,
each knockout, each round of a selection) reuses the keys and values of the tokens before it. The
tokens that all prompts begin with (examples shown in front) run once for all, and the tokens that
a clean prompt shares with its corrupt one run once for both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from circuitune.errors import UserError
from circuitune.memory import most_tokens
from circuitune.models import Model
from circuitune.sites import begin, march

# Bounds on what runs together; the second keeps activations of long prompts small.
PROMPTS_PER_BATCH = 64
TOKENS_PER_BATCH = 8192
# Fewer shared tokens than this are not worth a forward pass of their own.
LEAST_SHARED = 8


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, padded on the left so that END is the last position of all.

    Attributes:
        places: where the prompts stand in the caller's list.
        cache: keys and values of all positions but END.
        last: the last token of each prompt.
        inputs: attention mask and position ids for END; empty when nothing is padded.
    """

    places: list[int]
    cache: DynamicCache
    last: Int[Tensor, "example 1"]
    inputs: dict[str, Tensor]

    @property
    def at_end(self) -> dict[str, Any]:
        """Arguments of the trunk that run END."""
        return {"input_ids": self.last, "past_key_values": self.cache, **self.inputs}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put the cache back on leaving, since a forward pass extends it."""
        kept = [(layer.keys, layer.values) for layer in self.cache.layers]
        try:
            yield
        finally:
            del self.cache.layers[len(kept) :]
            for layer, (keys, values) in zip(self.cache.layers, kept, strict=True):
                layer.keys, layer.values = keys, values


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts whose keys and values before END are computed (see `prefill`)."""

    batches: tuple[Batch, ...]
    count: int

    def first(self, count: int) -> "Prompts":
        """The prompts before a place of the list, without the others' keys and values."""
        batches = []
        for batch in self.batches:
            rows = [row for row, place in enumerate(batch.places) if place < count]
            if rows:
                cache = DynamicCache()
                for index, layer in enumerate(batch.cache.layers):
                    cache.update(layer.keys[rows], layer.values[rows], index)
                inputs = {name: values[rows] for name, values in batch.inputs.items()}
                places = [batch.places[row] for row in rows]
                batches.append(Batch(places, cache, batch.last[rows], inputs))
        return Prompts(tuple(batches), count)


def prefill(model: Model, prompts: Sequence[Sequence[int]]) -> Prompts:
    """Compute keys and values of all tokens but the last, prompts of similar length together.

    Results do not depend on the order or the batching of the prompts beyond float rounding.
    """
    return _prefill(model, [prompts])


def prefill_pairs(
    model: Model, clean: Sequence[Sequence[int]], corrupt: Sequence[Sequence[int]]
) -> Prompts:
    """`prefill` of clean and corrupt prompts; what a pair shares before they differ runs once.

    Args:
        model: the model.
        clean: token ids of the clean prompts.
        corrupt: token ids of their counterparts, in the same order.

    Returns:
        all of them, the clean prompts first.
    """
    return _prefill(model, [clean, corrupt])


@dataclass(frozen=True)
class _Block:
    """Prompts at the same places of one or two lists, as they run, one list below the other.

    Attributes:
        places: where they stand in their lists.
        lists: how many lists.
        start: how many tokens before the first column all prompts share.
        tokens, mask: columns after these tokens, padded on the left.
    """

    places: list[int]
    lists: int
    start: int
    tokens: Int[Tensor, "batch token"]
    mask: Int[Tensor, "batch token"]

    @property
    def last(self) -> int:
        """The column of END."""
        return self.tokens.shape[1] - 1

    @property
    def shared(self) -> int:
        """How many leading columns before END are the same in all lists; 0 if too few."""
        if self.lists == 1:
            return 0
        one, *others = zip(self.tokens.chunk(self.lists), self.mask.chunk(self.lists), strict=True)
        same = torch.ones(self.last, dtype=torch.bool, device=self.tokens.device)
        for values, other in ((v, o) for rest in others for v, o in zip(one, rest, strict=True)):
            same &= (values == other).all(dim=0)[: self.last]
        count = int(same.cumprod(dim=0).sum())
        return count if count >= LEAST_SHARED else 0

    def inputs(self, begin: int, end: int, rows: int | None = None) -> dict[str, Any]:
        """Arguments of the trunk for some columns of the first rows, but for the cache."""
        tokens, mask = self.tokens[:rows, begin:end], self.mask[:rows]
        if bool(self.mask.all()):
            return {"input_ids": tokens}
        whole = torch.cat([mask.new_ones(len(mask), self.start), mask], dim=1)
        positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": tokens,
            "attention_mask": whole[:, : self.start + end],
            "position_ids": positions[:, self.start + begin : self.start + end],
        }


@torch.no_grad()
def _prefill(model: Model, lists: Sequence[Sequence[Sequence[int]]]) -> Prompts:
    """`prefill` of lists of as many prompts each, what is at one place of each side by side.

    Raises:
        UserError: a prompt is longer than the positions that the model has learned.
    """
    start = _common_start(model, [prompt for prompts in lists for prompt in prompts])
    longest = max(len(prompt) for prompts in lists for prompt in prompts)
    if model.context and model.counts_positions and longest > model.context:
        raise UserError(
            f"A prompt must fit into the {model.context} positions of {model.source}, the longest "
            f"has {longest} tokens; shorten it or leave it out."
        )
    count = len(lists[0])
    lengths = [max(len(prompts[i]) for prompts in lists) - start for i in range(count)]
    tokens = most_tokens(model, TOKENS_PER_BATCH) // len(lists)
    groups = similar_lengths(lengths, PROMPTS_PER_BATCH, tokens=tokens)
    blocks = [_block(model, lists, places, start) for places in groups]
    root = DynamicCache()
    if start:
        first = torch.tensor([list(lists[0][0][:start])], device=model.device)
        _run(model, [({"input_ids": first}, root)])
    heads = [_repeated(root, len(block.places)) for block in blocks]
    both = list(zip(blocks, heads, strict=True))
    _run(model, [(b.inputs(0, b.shared, len(b.places)), cache) for b, cache in both if b.shared])
    caches = [_repeated(cache, len(lists)) for cache in heads]
    both = list(zip(blocks, caches, strict=True))
    _run(model, [(b.inputs(b.shared, b.last), cache) for b, cache in both if b.last > b.shared])
    batches = []
    for block, cache in both:
        inputs = block.inputs(block.last, block.last + 1)
        places = [place + count * number for number in range(len(lists)) for place in block.places]
        batches.append(Batch(places, cache, inputs.pop("input_ids"), inputs))
    return Prompts(tuple(batches), count * len(lists))


def _run(model: Model, passes: Sequence[tuple[dict[str, Any], DynamicCache]]) -> None:
    """Fill caches: layer by layer over all passes if weights are offloaded, else one by one."""
    together = [passes] if model.offloaded else [[item] for item in passes]
    for some in together if passes else ():
        march(
            model,
            [begin(model, **inputs, past_key_values=c, use_cache=True) for inputs, c in some],
        )


def _block(
    model: Model, lists: Sequence[Sequence[Sequence[int]]], places: list[int], start: int
) -> _Block:
    rows = [prompts[place][start:] for prompts in lists for place in places]
    tokens, mask = (part.to(model.device) for part in pad_left(rows))
    return _Block(places, len(lists), start, tokens, mask)


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Token ids padded on the left with zeros, and the attention mask."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def _common_start(model: Model, prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, END left out; 0 if it is not worth it.

    Padding then stands behind these tokens and before the rest. A sliding window counts columns,
    padding included, so a prompt that is longer than its window shares nothing.
    """
    if len(prompts) < 2:
        return 0
    longest = max(map(len, prompts))
    window = getattr(model.hf.config.get_text_config(), "sliding_window", None)
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    count = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return count if count >= LEAST_SHARED and not (window and longest > window) else 0


def similar_lengths(
    lengths: Sequence[int], most: int, *, tokens: int | None = None
) -> list[list[int]]:
    """Places of at most ``most`` items, sorted by length, none over twice as long as another.

    With ``tokens``, a group of several has at most so many tokens, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    groups: list[list[int]] = []
    for place in order:
        length = lengths[place]
        room = most if tokens is None else min(most, tokens // max(1, length))
        if groups and len(groups[-1]) < room and length <= 2 * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache with every row ``rows`` times; sliding windows are in the masks alone."""
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (part.repeat(rows, 1, 1, 1) for part in (layer.keys, layer.values))
        copy.update(keys, values, index)
    return copy


def continued(
    model: Model,
    tokens: Int[Tensor, "example token"],
    mask: Int[Tensor, "example token"],
    settings: GenerationConfig,
) -> Int[Tensor, "_ _"]:
    """What Hugging Face's ``generate`` writes by these settings alone, prompts in front.

    A checkpoint's own settings would fill what they leave open, a penalty on the digits of the
    prompt among them.
    """
    own = model.hf.generation_config
    model.hf.generation_config = GenerationConfig()
    try:
        return model.hf.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    finally:
        model.hf.generation_config = own
