"""Ablate sets of heads and measure what is left, by three ablations, at END or everywhere.

An ablation gives a head another output than its own:

- ``mean``: its mean output over the corrupt prompts of the same task and half. At END that is the
  mean over END of these prompts; everywhere it is the mean over all their positions, one vector
  for every position, since templates differ and their positions do not correspond.
- ``zero``: nothing.
- ``resample``: its own output in another corrupt prompt of the same task and half (Chan et al.
  2022, causal scrubbing), drawn with a seed; all heads of a set take theirs from the same prompt.
  Everywhere it goes position by position, so only prompts with a donor of their length count.

At END, nothing below the lowest ablated layer changes, so END starts there from the residual
stream of the clean run, on the keys and values that were computed before. Everywhere, keys and
values change too: whole prompts run anew, those of equal length together, without padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from circuitune.components import Head
from circuitune.effects import measure
from circuitune.models import Model
from circuitune.patching import UNEMBED_ROWS, end_states, finish, unembed, wide
from circuitune.prompts import PROMPTS_PER_BATCH, Batch, Prompts
from circuitune.sites import Where, begin, intervene, march, record, resume
from circuitune.tasks import Task

Ablation = Literal["mean", "zero", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
PLACES: tuple[Where, ...] = get_args(Where)
# Prompts whose every position is recorded at once; all layers of a batch are held.
RECORDED_AT_ONCE = 8


@dataclass(frozen=True)
class Outcome:
    """What a model says after each prompt.

    Attributes:
        correct: whether the answer is the first choice among all tokens.
        logit_diff: logit of the answer against the other admissible answers, in logits.
        kl: divergence of the next-token distribution (all tokens) from the intact model's,
            KL(intact || ablated), in nats.
        intact: whether the answer is the intact model's first choice.
    """

    correct: Bool[np.ndarray, " example"]
    logit_diff: Float[np.ndarray, " example"]
    kl: Float[np.ndarray, " example"]
    intact: Bool[np.ndarray, " example"]


@dataclass(frozen=True)
class Spare:
    """What heads can be given in place of their own outputs, beside means and zeros.

    Attributes:
        donors: per example the place of the corrupt prompt that it takes outputs from, -1 where
            there is none; see `draw_donors`.
        outputs: per head, its outputs at all positions of each corrupt prompt, (token, d_head);
            of those heads that are ablated everywhere.
    """

    donors: Int[np.ndarray, " example"]
    outputs: Mapping[Head, Sequence[Tensor]]


def draw_donors(
    prompts: Sequence[Sequence[int]], rng: np.random.Generator
) -> Int[np.ndarray, " example"]:
    """For each prompt the place of another one, drawn at random; -1 where all are the same.

    A donor never has the same tokens. It has as many of them where there is such a prompt.
    """
    numbers: dict[tuple[int, ...], int] = {}
    text = np.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
    length = np.array([len(prompt) for prompt in prompts])
    donors = np.full(len(prompts), -1)
    for place in range(len(prompts)):
        others = text != text[place]
        alike = others & (length == length[place])
        places = np.flatnonzero(alike if alike.any() else others)
        if places.size:
            donors[place] = rng.choice(places)
    return donors


def prepare_spare(
    model: Model, task: Task, heads: Sequence[Head], rng: np.random.Generator
) -> Spare:
    """Draw donors and record heads everywhere in the corrupt prompts.

    Args:
        model: the model.
        task: the task, all of its pairs on this process.
        heads: the heads that are to be ablated everywhere by mean or resampling; none to record
            nothing.
        rng: draws the donors.
    """
    donors = draw_donors(task.pairs.corrupt, rng)
    return Spare(donors, outputs_everywhere(model, task.pairs.corrupt, heads))


@torch.no_grad()
def outputs_everywhere(
    model: Model, prompts: Sequence[Sequence[int]], heads: Sequence[Head]
) -> dict[Head, list[Tensor]]:
    """Outputs of heads at all positions of each prompt, (token, d_head)."""
    found: dict[Head, list[Tensor]] = {head: [torch.empty(0)] * len(prompts) for head in heads}
    for places in _equal_lengths(prompts, RECORDED_AT_ONCE) if heads else ():
        tokens = torch.tensor([prompts[place] for place in places], device=model.device)
        started = begin(model, input_ids=tokens, use_cache=False)
        with record(model, where="all") as trace:
            march(model, [started])
        for head in heads:
            width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
            for row, place in enumerate(places):
                # A copy: a view would keep all heads of all positions in memory.
                found[head][place] = wide(trace.z[head.layer][row, :, width].clone())
    return found


def _equal_lengths(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Places of at most ``most`` prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for places in by_length.values():
        yield from (places[start : start + most] for start in range(0, len(places), most))


def measurable(task: Task, spare: Spare, ablation: Ablation, where: Where) -> list[int]:
    """Places of the examples that an ablation can be measured on; all, but for resampling."""
    length = [len(prompt) for prompt in task.pairs.clean]
    if ablation != "resample":
        return list(range(len(length)))
    found = []
    for place, donor in enumerate(spare.donors):
        fits = where == "end" or len(task.pairs.corrupt[donor]) == length[place]
        if donor >= 0 and fits:
            found.append(place)
    return found


def knock_out(
    model: Model,
    task: Task,
    heads: Sequence[Head],
    *,
    ablation: Ablation = "mean",
    where: Where = "end",
    spare: Spare | None = None,
) -> Outcome:
    """Ablate heads in the clean prompts of a task.

    Args:
        model: the model.
        task: the task, all of its pairs on this process.
        heads: what to ablate; none for the intact model.
        ablation: what the heads get.
        where: at END, or at every position.
        spare: from `prepare_spare`; needed unless heads get a mean at END or zeros.

    Returns:
        the outcome of the examples that `measurable` gives, in their order.

    Raises:
        ValueError: ``spare`` is needed and missing.
    """
    if not heads:
        return outcome(model, task, task.clean.final)
    if spare is None and (ablation == "resample" or (ablation, where) == ("mean", "all")):
        raise ValueError(f"{ablation} at {where} needs a spare, found none; see prepare_spare")
    spare = spare or Spare(np.full(len(task.pairs.answers), -1), {})
    examples = measurable(task, spare, ablation, where)
    if where == "end":
        edits = _at_end(model, task, heads, ablation, spare.donors)
        final = final_at_end(model, task, edits)[examples]
    else:
        edits = _everywhere(model, task, heads, ablation, spare)
        final = final_everywhere(model, [task.pairs.clean[place] for place in examples], edits)
    return outcome(model, task, final, examples)


def _at_end(
    model: Model,
    task: Task,
    heads: Sequence[Head],
    ablation: Ablation,
    donors: Int[np.ndarray, " example"],
) -> dict[Head, Tensor]:
    """What each head gets at END: one row for all examples, or one for each."""
    if ablation == "mean":
        return {head: task.average.output(head, model.d_head)[0] for head in heads}
    if ablation == "zero":
        return _zeros(model, task, heads)
    return {head: task.corrupt.output(head, model.d_head)[donors.tolist()] for head in heads}


def _everywhere(
    model: Model, task: Task, heads: Sequence[Head], ablation: Ablation, spare: Spare
) -> dict[Head, Tensor | list[Tensor]]:
    """What each head gets at all positions: one row for all, or rows for each example measured."""
    if ablation == "mean":
        return {head: torch.cat(list(spare.outputs[head])).mean(dim=0) for head in heads}
    if ablation == "zero":
        return dict(_zeros(model, task, heads))
    donors = spare.donors[measurable(task, spare, ablation, "all")]
    return {head: [spare.outputs[head][donor] for donor in donors] for head in heads}


def _zeros(model: Model, task: Task, heads: Sequence[Head]) -> dict[Head, Tensor]:
    return {head: task.clean.final.new_zeros(model.d_head) for head in heads}


@torch.no_grad()
def final_at_end(
    model: Model, task: Task, edits: Mapping[Head, Float[Tensor, "*batch d_head"]]
) -> Float[Tensor, "example width"]:
    """Hidden states after the final norm at END, heads overwritten there.

    Args:
        model: the model.
        task: the task.
        edits: at least one head; one row for all examples, or one for each.
    """
    if model.offloaded and all(value.ndim == 1 for value in edits.values()):
        # Each layer is read once for all batches.
        return end_states(model, task.prompts, edits=edits).final
    lowest = min(head.layer for head in edits)
    final = torch.empty_like(task.clean.final)
    for batch in task.prompts.batches:
        own = {h: value if value.ndim == 1 else value[batch.places] for h, value in edits.items()}
        entering = task.clean.entry[lowest, batch.places][:, None]
        with batch.unchanged(), resume(model, lowest, entering), intervene(model, own):
            (state,) = march(model, [begin(model, use_cache=True, **batch.at_end)], wide=True)
        final[batch.places] = finish(model, state[:, -1])
    return final


@torch.no_grad()
def final_everywhere(
    model: Model,
    prompts: Sequence[Sequence[int]],
    edits: Mapping[Head, Tensor | Sequence[Tensor]],
) -> Float[Tensor, "example width"]:
    """Hidden states after the final norm at END, heads overwritten at every position.

    Args:
        model: the model.
        prompts: token ids, not padded.
        edits: one row (d_head) for all positions of all prompts, or for each prompt one row for
            each of its positions, (token, d_head).
    """
    final: list[Tensor] = [torch.empty(0)] * len(prompts)
    for places in _equal_lengths(prompts, PROMPTS_PER_BATCH):
        tokens = torch.tensor([prompts[place] for place in places], device=model.device)
        own = {
            head: value if isinstance(value, Tensor) else torch.stack([value[p] for p in places])
            for head, value in edits.items()
        }
        before = {h: value if value.ndim == 1 else value[:, :-1] for h, value in own.items()}
        last = {h: value if value.ndim == 1 else value[:, -1] for h, value in own.items()}
        cache = DynamicCache()
        if tokens.shape[1] > 1:
            inputs = {"input_ids": tokens[:, :-1], "past_key_values": cache, "use_cache": True}
            with intervene(model, before, where="all"):
                march(model, [begin(model, **inputs)])
        batch = Batch(list(range(len(places))), cache, tokens[:, -1:], {})
        states = end_states(model, Prompts((batch,), len(places)), edits=last)
        for row, place in enumerate(places):
            final[place] = states.final[row]
    return torch.stack(final)


@torch.no_grad()
def outcome(
    model: Model,
    task: Task,
    final: Float[Tensor, "example width"],
    examples: Sequence[int] | None = None,
) -> Outcome:
    """Measure hidden states against the answers and against the intact model.

    Args:
        model: the model.
        task: the task.
        final: hidden states after the final norm at END.
        examples: which examples of the task they belong to; all by default.
    """
    places = list(range(len(task.clean.final))) if examples is None else list(examples)
    first, start, divergence = [], [], []
    rows = torch.tensor(places, device=final.device).split(UNEMBED_ROWS)
    for own, after in zip(rows, final.split(UNEMBED_ROWS), strict=True):
        plain, ablated = task.intact(model, own), unembed(model, after).log_softmax(-1)
        first.append(ablated.argmax(-1).cpu().numpy())
        start.append(plain.argmax(-1).cpu().numpy())
        divergence.append((plain.exp() * (plain - ablated)).sum(-1).cpu().numpy())
    candidates = unembed(model, final, task.pairs.candidates).cpu().numpy()
    return Outcome(
        np.concatenate(first) == task.tokens[places],
        measure(candidates, task.pairs.answers[places])["logit_diff"],
        np.concatenate(divergence).astype(float),
        np.concatenate(start) == task.tokens[places],
    )
