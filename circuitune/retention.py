"""What tuning does to plain text: loss and KL to the base, per paragraph."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from circuitune.deltas import Delta, merged
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import unembed
from circuitune.prompts import similar_lengths
from circuitune.sites import resume, states_entering, substitute
from circuitune.weights import widened
from circuitune.writing import encode_text, pad, shipped_paragraphs

TEXTS_PER_BATCH = 8
TEXT_TOKENS = 64  # most tokens of a paragraph


def retention_text(path: str | None) -> list[str]:
    """Paragraphs of a text file, one a line; by default shipped ones that training never sees.

    Raises:
        UserError: the file is absent or holds fewer than ten paragraphs.
    """
    if path is None:
        return shipped_paragraphs()[1::2]  # training may see the others
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--retention must be a readable text file, {path} is not ({error}); check it."
        ) from error
    paragraphs = [line.strip() for line in text.splitlines() if len(line.split()) >= 10]
    if len(paragraphs) < 10:
        raise UserError(
            f"--retention must hold at least ten lines of ten words, {path} has "
            f"{len(paragraphs)}; give a longer text."
        )
    return paragraphs


@dataclass(frozen=True)
class BaseText:
    """Plain text with what the base makes of it.

    Attributes:
        batches: texts of similar length, padded on the right, which reaches nothing under a causal
            mask.
        count: number of texts.
        layer: from which layer on texts are run again.
        head: the base's unembedding, a copy in float32 or wider, where the model's own may
            change; else None.
    """

    batches: tuple["TextBatch", ...]
    count: int
    layer: int
    head: nn.Module | None


@dataclass(frozen=True)
class TextBatch:
    """Some texts: their places, tokens, which positions predict a token, and the base's states.

    ``entering`` are hidden states that enter the layer of the `BaseText`, ``final`` those after
    the last norm.
    """

    places: list[int]
    tokens: Int[Tensor, "text token"]
    predicts: Int[Tensor, "text step"]
    entering: Float[Tensor, "text token d_model"]
    final: Float[Tensor, "text step width"]


@torch.no_grad()
def base_text(
    model: Model, paragraphs: Sequence[str], *, layer: int = 0, copy_head: bool = False
) -> BaseText:
    """Run the base over paragraphs, at most `TEXT_TOKENS` tokens of each.

    Args:
        model: the base.
        paragraphs: the text.
        layer: below this layer nothing is going to change; 0 if that is not known.
        copy_head: whether the embeddings may change, the unembedding with them.
    """
    longest = min(TEXT_TOKENS, model.context or TEXT_TOKENS)
    rows = [encode_text(model.tokenizer, text)[:longest] for text in paragraphs]
    batches = []
    for places in similar_lengths([len(row) for row in rows], TEXTS_PER_BATCH):
        tokens = pad([rows[place] for place in places], 0).to(model.device)
        real = pad([[1] * (len(rows[place]) - 1) for place in places], 0).to(model.device)
        entering = states_entering(model, layer, tokens)
        with resume(model, layer, entering):
            final = model.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        batches.append(TextBatch(places, tokens, real, entering, final[:, :-1]))
    head = None
    if copy_head:
        with widened(model.hf.get_output_embeddings()):
            head = copy.deepcopy(model.hf.get_output_embeddings())
    return BaseText(tuple(batches), len(rows), layer, head)


@torch.no_grad()
def drift_now(
    model: Model, text: BaseText, *, anew: bool = False
) -> Float[np.ndarray, "paragraph quantity"]:
    """Loss of a model as it is now, and its KL to the base, per paragraph.

    Args:
        model: the model whose base the text was run on, with whatever is attached or merged.
        text: the text.
        anew: run all of it, since what enters the layers may have changed too.

    Returns:
        per paragraph the columns: number of predicted tokens, sum of negative log likelihoods in
        nats, sum over positions of KL(base || model).
    """
    result = np.zeros((text.count, 3))
    embedding = model.hf.get_output_embeddings()
    for batch in text.batches:
        same = nullcontext() if anew else resume(model, text.layer, batch.entering)
        with same:
            final = model.trunk(input_ids=batch.tokens, use_cache=False).last_hidden_state
        with widened(embedding):  # logits rounded to bfloat16 are a KL of 0.001 apart
            own = unembed(model, final[:, :-1]).log_softmax(dim=-1)
            with nullcontext() if text.head is None else substitute(embedding, text.head):
                base = unembed(model, batch.final).log_softmax(dim=-1)
        loss = -own.gather(-1, batch.tokens[:, 1:, None])[..., 0]
        kl = (base.exp() * (base - own)).sum(dim=-1)
        parts = (torch.ones_like(loss), loss, kl)
        sums = [(values * batch.predicts).sum(dim=1) for values in parts]
        result[batch.places] = torch.stack(sums, dim=1).cpu().double().numpy()
    return result


def drift(
    model: Model, deltas: Mapping[str, Delta], paragraphs: Sequence[str]
) -> dict[str, Float[np.ndarray, "paragraph quantity"]]:
    """Loss and KL of the base and of every variant on plain text, see `drift_now`.

    Args:
        model: the base model.
        deltas: variants by name.
        paragraphs: the text.
    """
    lowest = [delta.lowest_layer for delta in deltas.values()]
    outside = min(lowest, default=0) < 0
    text = base_text(model, paragraphs, layer=max(0, min(lowest, default=0)), copy_head=outside)
    result = {"base": drift_now(model, text)}
    for name, delta in tqdm(deltas.items(), desc="retention", disable=None, leave=False):
        with merged(model, delta):
            result[name] = drift_now(model, text, anew=delta.lowest_layer < 0)
    return result
