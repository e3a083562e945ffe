"""What the frozen layers give, computed once: hidden states that enter the lowest tuned layer.

Below that layer nothing trains, so every epoch, every method with the same lowest layer and every
control starts from the same hidden states. They are kept in one file on disk and mapped into
memory, never read whole. The cache is exact: examples run with padding on the right, which under
a causal mask reaches nothing, and a sliding window looks to the left only.

Also here: plain text on which a tuned model is held to the base, and what the base makes of it.

A cache is a folder with two files: ``states.bin``, the rows of all examples one after another in
the model's dtype, and ``index.json`` with the key (`prefix_key`), shape, dtype and sha256.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from circuitune import ranks
from circuitune.errors import UserError
from circuitune.examples import Example
from circuitune.memory import most_tokens, shown
from circuitune.models import Model
from circuitune.prompts import continued, pad_left, similar_lengths
from circuitune.runs import digest, versions, write_json
from circuitune.sites import resume, states_entering
from circuitune.writing import encode_text, pad, shipped_paragraphs

STATES, INDEX = "states.bin", "index.json"
# Bounds on the examples that run together.
EXAMPLES_PER_BATCH, TOKENS_PER_BATCH = 64, 8192
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLED = 4096  # numbers of a weight that go into the key as they are, beside the sum of all
KEY_LENGTH = 16  # characters of the key in the name of a folder
# What a config says about where it came from, not about what the model computes.
PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "use_cache")
TEXT_TOKENS = 40  # length of a row of plain text
OWN_TEXTS = 4  # texts that the base writes after each opening


@dataclass(frozen=True)
class PrefixCache:
    """The hidden states that enter ``layer`` for each example, mapped from a file.

    Attributes:
        folder: where the files are.
        key: what they were computed from, see `prefix_key`.
        layer: the layer that the states enter.
        states: all examples one after another.
        offsets: where each example starts, and at last where the last one ends.
    """

    folder: Path
    key: str
    layer: int
    states: Float[Tensor, "token d_model"]
    offsets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> Float[Tensor, "token d_model"]:
        """The states of one example, one per token but the last; a view of the file."""
        return self.states[self.offsets[place] : self.offsets[place + 1]]


def prefix_key(model: Model, examples: Sequence[Example], layer: int) -> str:
    """Sha256 of all that the states depend on, the same for a copy of the model.

    That is the architecture, every weight below ``layer`` (each by the sum of its bits and by a
    sample), the layer, dtype, device type, attention implementation, token ids and versions.
    """
    config = model.hf.config.to_dict()
    facts = {
        "config": {name: value for name, value in config.items() if name not in PROVENANCE},
        "weights": _weights_below(model, layer),
        "layer": layer,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": getattr(model.hf.config, "_attn_implementation", None),
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
        "tokens": hashlib.sha256(repr([item.tokens for item in examples]).encode()).hexdigest(),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def _weights_below(model: Model, layer: int) -> dict[str, str]:
    """A digest of each parameter outside the layers from ``layer`` on; offloaded ones by shape."""
    above = {id(p) for index in range(layer, model.layers) for p in model.layer(index).parameters()}
    found = {}
    for name, weight in model.trunk.named_parameters():
        if id(weight) not in above:
            facts = hashlib.sha256(repr((tuple(weight.shape), str(weight.dtype))).encode())
            if not weight.is_meta:
                flat = weight.contiguous().reshape(-1)
                bits = flat.view(INTEGERS[flat.element_size()])
                facts.update(str(int(bits.sum(dtype=torch.int64))).encode())
                facts.update(bits[:: max(1, len(bits) // SAMPLED)].cpu().numpy().tobytes())
            found[name] = facts.hexdigest()
    return found


@torch.no_grad()
def build(model: Model, examples: Sequence[Example], layer: int, folder: Path) -> PrefixCache:
    """Run the layers below ``layer`` over all examples, similar lengths together, and keep the end.

    Args:
        model: the model with the base's weights below ``layer``.
        examples: training texts; the last token of each is only a label and does not run.
        layer: the layer that the states enter.
        folder: where the cache goes; made whole beside it, then renamed into place.

    Raises:
        UserError: the disk has no room, or the folder holds something else.
    """
    key = prefix_key(model, examples, layer)
    _write(model, examples, layer, folder, key)
    return open_cache(folder, key)


def _write(model: Model, examples: Sequence[Example], layer: int, folder: Path, key: str) -> None:
    """`build` with the key known."""
    lengths = [len(item.tokens) - 1 for item in examples]
    offsets = (0, *accumulate(lengths))
    width = model.d_model
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    work = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        with (work / STATES).open("wb") as file:
            for place, states in _entering(model, examples, layer):
                file.seek(offsets[place] * width * itemsize)
                file.write(states.contiguous().view(torch.uint8).numpy().data)
            file.truncate(offsets[-1] * width * itemsize)
        index = {
            "key": key,
            "model": model.source,
            "layer": layer,
            "dtype": str(model.dtype).removeprefix("torch."),
            "width": width,
            "offsets": offsets,
            "sha256": digest(work / STATES),
        }
        write_json(work / INDEX, index | {"seal": _seal(index)})
        _into_place(work, folder)
    except OSError as error:
        size = shown(offsets[-1] * width * itemsize)
        raise UserError(
            f"The hidden states of the training texts, {size}, must be kept on disk, {folder} "
            f"cannot take them ({error.strerror}); free some room, or train without the cache."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _entering(
    model: Model, examples: Sequence[Example], layer: int
) -> Iterator[tuple[int, Float[Tensor, "token d_model"]]]:
    """Place and states of each example, on the CPU, as they get ready."""
    lengths = [len(item.tokens) - 1 for item in examples]
    tokens = most_tokens(model, TOKENS_PER_BATCH)
    groups = similar_lengths(lengths, EXAMPLES_PER_BATCH, tokens=tokens)
    with tqdm(total=len(examples), desc="prefix", unit="text", disable=None, leave=False) as bar:
        for places in groups:
            rows = pad([examples[place].tokens[:-1] for place in places], 0)
            states = states_entering(model, layer, rows.to(model.device)).cpu()
            for row, place in enumerate(places):
                yield place, states[row, : lengths[place]]
            bar.update(len(places))


def _seal(index: dict[str, Any]) -> str:
    """Sha256 of the index, by which a damaged one is known."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _into_place(work: Path, folder: Path) -> None:
    """Rename a finished cache; an older one goes, but nothing else that the folder may hold."""
    if folder.is_dir():
        for name in (STATES, INDEX):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    os.rename(work, folder)


def open_cache(folder: Path, key: str) -> PrefixCache:
    """Map a cache into memory; its bytes are checked, which reads the file once.

    Args:
        folder: as given to `build`.
        key: what the states must have been computed from, see `prefix_key`.

    Raises:
        UserError: there is no cache, it is damaged, or it was computed from something else.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["key"] != key:
            raise UserError(
                "Cached hidden states must come from the same weights, layer and training texts, "
                f"those in {folder} were computed for layer {index['layer']} of {index['model']} "
                "from others; delete the folder, and they are computed anew."
            )
        if index.pop("seal") != _seal(index) or digest(folder / STATES) != index["sha256"]:
            raise ValueError("it has changed since it was written")
        offsets, width = tuple(index["offsets"]), index["width"]
        dtype = getattr(torch, index["dtype"])
        size = offsets[-1] * width
        flat = torch.from_file(str(folder / STATES), shared=False, size=size, dtype=dtype)
        return PrefixCache(folder, key, index["layer"], flat.view(-1, width), offsets)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cached hidden states must be as they were written, {folder} is not "
            f"({type(error).__name__}: {str(error)[:100]}); delete the folder, and they are "
            "computed anew."
        ) from error


def cached_or_built(
    model: Model, examples: Sequence[Example], layer: int, top: Path
) -> PrefixCache:
    """The cache for these texts and this layer, made if it is absent or cannot be used.

    Several caches lie side by side in ``top``, for other layers, models and texts. Of several
    processes the first one makes it, and all map the same file.
    """
    key = prefix_key(model, examples, layer)
    folder = top / key[:KEY_LENGTH]
    found: list[PrefixCache] = []

    def make() -> None:
        with suppress(UserError):
            found.append(open_cache(folder, key))
            return
        _write(model, examples, layer, folder, key)

    ranks.first(make)
    return found[0] if found else open_cache(folder, key)


# Openings for text that the base writes itself: numbers that are no sums, which tuning on sums
# would otherwise pull towards answers, and which the shipped paragraphs do not hold.
OPENINGS = (
    "In 19",
    "The population was ",
    "Born on 3 ",
    "The album sold ",
    "Chapter 2",
    "The final score was 3",
    "It was built in 18",
    "The road is ",
    "Add 2 cups of ",
    "Version 1.",
    "The first of 12 ",
    "At 7:",
    "Price: $",
    "The team won ",
    "On page 4",
    "Between 20",
)


@dataclass(frozen=True)
class PlainText:
    """Plain text on which the tuned model is held to the base (never the text of evaluation).

    Attributes:
        tokens: token ids, all rows of one length.
        hidden: hidden states that enter the lowest tuned layer; None if the embeddings train.
        final: final hidden states of the base.
        head: the base's unembedding, a copy, where it may train; else None.
    """

    tokens: Int[Tensor, "text text_token"]
    hidden: Float[Tensor, "text text_token d_model"] | None
    final: Float[Tensor, "text text_token width"]
    head: nn.Module | None


def training_text() -> list[str]:
    """The half of the shipped paragraphs that training may see; evaluation uses the other."""
    return shipped_paragraphs()[0::2]


@torch.no_grad()
def own_text(model: Model, *, seed: int) -> list[list[int]]:
    """Rows of `TEXT_TOKENS` tokens that the model writes after each of `OPENINGS`, sampled."""
    settings = GenerationConfig(
        max_new_tokens=TEXT_TOKENS,
        min_new_tokens=TEXT_TOKENS,
        do_sample=True,
        top_k=0,
        num_return_sequences=OWN_TEXTS,
        pad_token_id=model.tokenizer.eos_token_id or 0,
        eos_token_id=model.tokenizer.eos_token_id,
    )
    rows: list[list[int]] = []
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        tokens, mask = pad_left([encode_text(model.tokenizer, text) for text in OPENINGS])
        written = continued(model, tokens, mask, settings)
    padding = (mask == 0).sum(dim=1).repeat_interleave(OWN_TEXTS).tolist()
    for row, skip in zip(written.tolist(), padding, strict=True):
        rows.append(row[skip : skip + TEXT_TOKENS])
    return rows


def text_rows(
    model: Model, paragraphs: Sequence[str], own: Sequence[list[int]] = ()
) -> list[list[int]]:
    """Rows of `TEXT_TOKENS` tokens: starts of paragraphs that are long enough, and own text."""
    rows = [encode_text(model.tokenizer, text)[:TEXT_TOKENS] for text in paragraphs]
    both = [row for pair in zip_longest(rows, own) for row in pair if row]
    return [row for row in both if len(row) == TEXT_TOKENS]


@torch.no_grad()
def plain_text(model: Model, rows: Sequence[list[int]], layer: int, *, prefix: bool) -> PlainText:
    """Run the base over rows of one length.

    Args:
        model: the base, nothing attached.
        rows: token ids.
        layer: the lowest tuned layer.
        prefix: whether everything below that layer stays the base's, and the unembedding too.

    Raises:
        UserError: there is no row.
    """
    if not rows:
        raise UserError(
            f"Holding a model to its base needs text of at least {TEXT_TOKENS} tokens, found "
            "none; give longer text, or set keep to 0."
        )
    hidden, final = [], []
    for some in torch.tensor(rows, device=model.device).split(EXAMPLES_PER_BATCH):
        entering = states_entering(model, layer, some)
        with resume(model, layer, entering):
            final.append(model.trunk(input_ids=some, use_cache=False).last_hidden_state)
        hidden.append(entering)
    head = None if prefix else copy.deepcopy(model.hf.get_output_embeddings())
    return PlainText(
        torch.tensor(rows), torch.cat(hidden) if prefix else None, torch.cat(final), head
    )
