"""Texts as a tree of tokens that runs in packs: what they share once, nothing padded.

A token that several texts begin with is a node that they share. A pack is one row of tokens of
many texts, each of which sees the tokens on its own way to the root, by an attention mask and
position ids. What is above several packs (solved examples in front of questions, say) runs first,
and they reuse its keys and values. Hidden states equal those of each text alone up to float
rounding; windows of local attention count positions of the text, not places of the pack.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from circuitune.models import Model
from circuitune.patching import unembed

# Rotary positions of these kinds change for all texts once one is long.
STRETCHING = {"dynamic", "longrope"}
# A long text shares at least this part of itself, or runs alone: behind a cache attention takes a
# mask, where a whole text has a causal kernel that is twice as fast.
SHARED_PART = 1 / 16
# The owner of columns that every text sees.
STEM = -1


@dataclass(frozen=True)
class Texts:
    """Texts as token ids in lexical order, so that neighbours share what they begin with.

    Attributes:
        rows: the texts.
        common: how many tokens each begins with that the one before it begins with too.
        own: how many tokens the texts before each place have of their own, summed.
    """

    rows: list[tuple[int, ...]]
    common: list[int]
    own: list[int]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]]) -> "Texts":
        """Texts in any order."""
        ordered = sorted(rows)
        common, own = [], [0]
        for place, row in enumerate(ordered):
            common.append(_shared(ordered[place - 1], row) if place else 0)
            own.append(own[-1] + len(row) - common[-1])
        return cls(ordered, common, own)

    def shared(self, first: int, stop: int) -> int:
        """How many tokens all texts of a stretch begin with."""
        return min([len(self.rows[first]), *self.common[first + 1 : stop]])

    def alone(self, length: int) -> list[tuple[int, ...]]:
        """Texts longer than this that share too little with any other to run with it."""
        shared = [*self.common, 0]  # of a text and the one before it, and of it and the next
        return [
            row
            for place, row in enumerate(self.rows)
            if len(row) > length and max(shared[place : place + 2]) < SHARED_PART * len(row)
        ]

    def size(self, first: int, stop: int, start: int) -> int:
        """How many tokens of a stretch's tree stand after the first ``start``."""
        return len(self.rows[first]) - start + self.own[stop] - self.own[first + 1]

    def branches(self, first: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
        """Stretches that go different ways after ``depth`` shared tokens; ended texts left out."""
        begin = first
        for place in range(first + 1, stop + 1):
            if place == stop or self.common[place] <= depth:
                if len(self.rows[begin]) > depth:
                    yield begin, place
                begin = place

    def stems(self, first: int, stop: int, least: int) -> Iterator[tuple[int, list[int]]]:
        """Texts in groups, and how many tokens each group begins with, its texts' ends left out.

        A part of a group stands alone if that saves at least so many tokens.
        """
        if first == stop:
            return
        shared = self.shared(first, stop)
        length = min(shared, min(map(len, self.rows[first:stop])) - 1)
        together = [place for place in range(first, stop) if len(self.rows[place]) == shared]
        for begin, end in self.branches(first, stop, shared):
            if (end - begin - 1) * (self.shared(begin, end) - length) >= least:
                yield from self.stems(begin, end, least)
            else:
                together += range(begin, end)
        if together:
            yield length, together


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differ[0]) if len(differ) else most


@dataclass(frozen=True)
class Pack:
    """Tokens that run together, in one row.

    Attributes:
        tokens: token ids.
        places: the position of each in its text.
        owners: the text that each belongs to, `STEM` if that does not matter.
        visible: the columns, cached and new, that each sees; None for a plain text, whose tokens
            see everything before them.
    """

    tokens: list[int]
    places: list[int]
    owners: list[int]
    visible: Bool[np.ndarray, "token _"] | None = None

    @classmethod
    def plain(cls, tokens: Sequence[int], start: int) -> "Pack":
        """Part of one text, from a position on."""
        places = list(range(start, start + len(tokens)))
        return cls(list(tokens), places, [STEM] * len(tokens))

    @classmethod
    def tree(
        cls, texts: Texts, which: Sequence[int], start: int
    ) -> tuple["Pack", dict[int, list[int]]]:
        """What texts have behind ``start`` shared tokens, and for each where its tokens stand."""
        size, path = 0, list[int]()
        tokens, places, paths = list[int](), list[int](), dict[int, list[int]]()
        for place in which:
            row = texts.rows[place]
            path = path[: max(0, texts.common[place] - start)]
            known = len(path)
            tokens += row[start + known :]
            places += range(start + known, len(row))
            path = path + list(range(size, len(tokens)))
            size = len(tokens)
            paths[place] = path
        if len(which) == 1:
            return cls.plain(tokens, start), paths
        visible = np.zeros((size, start + size), dtype=bool)
        visible[:, :start] = True
        for path in paths.values():
            visible[np.ix_(path, np.add(path, start))] |= np.tri(len(path), dtype=bool)
        return cls(tokens, places, [STEM] * size, visible), paths


@dataclass
class Columns:
    """The columns of a cache, one row, and what they are.

    Attributes:
        cache: keys and values.
        places: position of each column's token in its text.
        owners: the text that a column belongs to, `STEM` for those that all share.
    """

    cache: DynamicCache = field(default_factory=DynamicCache)
    places: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def copy(self) -> "Columns":
        """The same columns; what is added to the copy does not reach the original."""
        cache = DynamicCache()
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return Columns(cache, list(self.places), list(self.owners))

    def keep(self, owners: set[int]) -> None:
        """Drop the columns of all other texts, once they are many enough to be worth a copy."""
        kept = [i for i, owner in enumerate(self.owners) if owner == STEM or owner in owners]
        if len(kept) > 0.9 * len(self.owners):
            return
        for layer in self.cache.layers:
            index = torch.tensor(kept, dtype=torch.long, device=layer.keys.device)
            layer.keys = layer.keys.index_select(2, index)
            layer.values = layer.values.index_select(2, index)
        self.places = [self.places[i] for i in kept]
        self.owners = [self.owners[i] for i in kept]


@torch.no_grad()
def run(model: Model, columns: Columns, pack: Pack) -> Float[Tensor, "token width"]:
    """Hidden states after the final norm of a pack behind cached columns, which it is added to."""
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([pack.tokens], device=model.device),
        "position_ids": torch.tensor([pack.places], device=model.device),
        "past_key_values": columns.cache,
    }
    columns.places += pack.places
    columns.owners += pack.owners
    if pack.visible is not None:
        inputs["attention_mask"] = _masks(model, pack, columns.places)
    return model.trunk(use_cache=True, **inputs).last_hidden_state[0]


def _masks(model: Model, pack: Pack, places: Sequence[int]) -> Tensor | dict[str, Tensor]:
    """What is added to attention scores: one mask or, if layers differ in kind, one per kind.

    The kinds are told apart as `transformers.masking_utils.create_masks_for_generate` does.
    """
    config = model.hf.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention" if window else "full_attention"}
    masks = {}
    for kind in kinds:
        seen = pack.visible
        if kind == "sliding_attention":
            seen = seen & (np.subtract.outer(pack.places, places) < window)
        hidden = torch.from_numpy(~seen).to(model.device)
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
        masks[kind] = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)[None, None]
    return masks if len(masks) > 1 else masks.popitem()[1]


def longest_packed(model: Model) -> int:
    """How many tokens a text may have to run in a pack; 0 if the model is not made for packs."""
    config = model.hf.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return 0
    try:
        fits = _packs_equal_texts(model)
    except Exception:  # a model that does not expect such masks may raise anything
        return 0
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [
        part.get("original_max_position_embeddings", config.max_position_embeddings)
        for part in parts
        if part.get("rope_type") in STRETCHING
    ]
    return min(limits, default=sys.maxsize) if fits else 0


def _packs_equal_texts(model: Model) -> bool:
    """Whether a model follows masks and positions: a few tokens run in packs and as texts.

    One that counts positions otherwise (by ALiBi, say) differs far more than by rounding.
    """
    ids = torch.randint(model.hf.config.get_text_config().vocab_size, (13,), generator=_seeded())
    stem, one, other = (part.tolist() for part in ids.split([5, 5, 3]))
    texts = Texts.of([tuple(stem + one), tuple(stem + one[:2] + other)])
    columns = Columns()
    run(model, columns, Pack.plain(stem, 0))
    pack, paths = Pack.tree(texts, range(len(texts.rows)), len(stem))
    hidden = run(model, columns, pack)
    worst, largest = 0.0, 0.0
    for place, row in enumerate(texts.rows):
        with torch.no_grad():
            whole = model.hf(torch.tensor([row], device=model.device)).logits[0, len(stem) :]
        packed = unembed(model, hidden[paths[place]])
        worst = max(worst, float((packed - whole).abs().max()))
        largest = max(largest, float(whole.abs().max()))
    return worst <= (1e-3 if fine(model) else 0.05) * largest


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fine(model: Model) -> bool:
    """Whether the model computes in float32 or better."""
    return torch.finfo(model.dtype).bits >= 32
