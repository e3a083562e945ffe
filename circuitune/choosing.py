"""Accuracy on multiple-choice questions, with heads ablated: what else a circuit is needed for.

A choice scores the log probability of its tokens after the prompt, as in lm-evaluation-harness:
prompt and choice are tokenised together and split at the prompt's length. Its ``acc`` takes the
choice with the highest sum, its ``acc_norm`` the highest sum per byte of the choice.

Ablated heads give their means at END, the last token of the prompt, and at all later positions:
wherever a token of a choice is predicted. Earlier positions stay as they are, so each prompt runs
once, and every ablation runs on the same keys and values: first END of every question, then, on
its keys and values too, the choices that go on for more than one token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from circuitune.components import Head, check_components
from circuitune.errors import UserError
from circuitune.memory import most_tokens, used
from circuitune.models import Model
from circuitune.patching import UNEMBED_ROWS, finish, unembed
from circuitune.prompts import TOKENS_PER_BATCH, Batch, Prompts, prefill, similar_lengths
from circuitune.readers import MultipleChoice
from circuitune.sites import Trace, Where, begin, intervene, march, record
from circuitune.stats import (
    Groups,
    Interval,
    bootstrap_mean,
    clustered_proportion,
    mcnemar,
    non_inferior,
    paired_difference,
)
from circuitune.writing import encode_text

# Keys and values of prompts that are kept between ablations; what is beyond is computed anew.
KEPT_BYTES = 2 * 2**30
# "Spared" means shown to lose less than this much accuracy.
MARGIN = 0.02


@dataclass(frozen=True)
class Tokenised:
    """Questions as token ids: each prompt, and the tokens that each of its choices adds."""

    prompts: list[list[int]]
    choices: list[list[list[int]]]

    @property
    def longest(self) -> int:
        """The most tokens of a prompt with one of its choices."""
        both = zip(self.prompts, self.choices, strict=True)
        return max(len(prompt) + max(map(len, choices)) for prompt, choices in both)


@dataclass(frozen=True)
class Prepared:
    """Questions ready to be scored, see `prepare`.

    Attributes:
        questions: the questions.
        tokens: the same as token ids.
        portions: places of questions that are handled together, with their keys and values
            before END, or None where these are computed when they are needed.
    """

    questions: tuple[MultipleChoice, ...]
    tokens: Tokenised
    portions: tuple[tuple[list[int], Prompts | None], ...]


@dataclass(frozen=True)
class Means:
    """Mean outputs of heads over the questions of one data set, each of width d_head.

    Attributes:
        end: over END, the last token of each prompt.
        later: over all tokens of choices that have a successor; the same as ``end`` where no
            choice has two tokens.
    """

    end: dict[Head, Tensor]
    later: dict[Head, Tensor]


@dataclass(frozen=True)
class Scores:
    """What a model chooses.

    Attributes:
        log_probs: per question the log probability of each choice after the prompt, in nats.
        chosen: place of the choice with the highest log probability.
        chosen_by_length: the same per byte of the choice, its leading space left out.
        answers: place of the right choice.
    """

    log_probs: tuple[Float[np.ndarray, " _"], ...]
    chosen: Int[np.ndarray, " example"]
    chosen_by_length: Int[np.ndarray, " example"]
    answers: Int[np.ndarray, " example"]

    def of(self, places: Sequence[int]) -> "Scores":
        """The scores of some of the questions."""
        own = tuple(self.log_probs[place] for place in places)
        parts = (self.chosen, self.chosen_by_length, self.answers)
        return Scores(own, *(part[list(places)] for part in parts))

    @property
    def correct(self) -> Bool[np.ndarray, " example"]:
        """Whether the right choice has the highest log probability (``acc``)."""
        return self.chosen == self.answers

    @property
    def correct_by_length(self) -> Bool[np.ndarray, " example"]:
        """Whether the right choice has the highest log probability per byte (``acc_norm``)."""
        return self.chosen_by_length == self.answers

    @property
    def log_prob(self) -> Float[np.ndarray, " example"]:
        """Log probability of the right choice, in nats."""
        both = zip(self.log_probs, self.answers, strict=True)
        return np.array([values[answer] for values, answer in both])


def tokenised(model: Model, questions: Sequence[MultipleChoice]) -> Tokenised:
    """Questions as token ids, split as `_encode_pair` of lm-evaluation-harness splits them.

    Raises:
        UserError: there is no question, one has fewer than two choices, no right one, an empty
            prompt or a choice that adds no token, or one is too long for the model.
    """
    if not questions:
        raise UserError("There must be questions to score, found none; give at least one.")
    tokens = Tokenised([], [])
    for question in questions:
        prompt = encode_text(model.tokenizer, question.prompt)
        whole = [encode_text(model.tokenizer, question.prompt + text) for text in question.choices]
        choices = [ids[len(prompt) :] for ids in whole]
        fault = _fault(question, prompt, choices)
        if fault:
            raise UserError(f"{fault} ({question.id}); correct this question or leave it out.")
        tokens.prompts.append(prompt)
        tokens.choices.append(choices)
    limit = model.context
    if limit and tokens.longest - 1 > limit:
        raise UserError(
            f"A prompt with its choice must fit into the {limit} positions of {model.source}, the "
            f"longest takes {tokens.longest - 1}; leave out long questions or examples."
        )
    return tokens


def _fault(
    question: MultipleChoice, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> str | None:
    """What is wrong with a question."""
    if len(choices) < 2 or not 0 <= question.answer < len(choices):
        return (
            f"A question must have two choices or more and a right one among them, found "
            f"{len(choices)} with number {question.answer} right"
        )
    if not prompt:
        return "A prompt must have at least one token, found an empty text"
    for text, tokens in zip(question.choices, choices, strict=True):
        if not tokens or not text.strip():
            return f"A choice must add text and tokens to its prompt, {text!r} adds none"
    return None


def prepare(model: Model, questions: Sequence[MultipleChoice]) -> Prepared:
    """Tokenise questions and compute keys and values of their prompts before END.

    They are kept up to `KEPT_BYTES` (and to half of what ``--max-memory`` leaves); those of
    further prompts are computed anew in each `score`.

    Raises:
        UserError: see `tokenised`.
    """
    tokens = tokenised(model, questions)
    room = float(KEPT_BYTES)
    if model.max_memory is not None:
        room = min(room, (model.max_memory - used(model.device)) / 2)
    item = torch.empty(0, dtype=model.dtype).element_size()
    per_token = 2 * model.layers * model.kv_heads * model.d_head * item
    portions: list[tuple[list[int], Prompts | None]] = []
    for places in _portions(model, tokens):
        prompts = [tokens.prompts[place] for place in places]
        room -= per_token * len(prompts) * max(map(len, prompts))
        portions.append((places, prefill(model, prompts) if room >= 0 else None))
    return Prepared(tuple(questions), tokens, tuple(portions))


def _portions(model: Model, tokens: Tokenised) -> list[list[int]]:
    """Places of questions with prompts of similar length, a bounded number of tokens each.

    A sliding window counts columns, padding included, so where it can be exceeded only prompts
    of equal length go together, which need no padding.
    """
    window = getattr(model.hf.config.get_text_config(), "sliding_window", None)
    exact = bool(window) and tokens.longest > window
    classes: dict[int, list[int]] = {}
    for place, prompt in enumerate(tokens.prompts):
        classes.setdefault(len(prompt) if exact else 0, []).append(place)
    most = most_tokens(model, TOKENS_PER_BATCH)
    portions = []
    for places in classes.values():
        lengths = [len(tokens.prompts[place]) for place in places]
        groups = similar_lengths(lengths, len(places), tokens=most)
        portions += [[places[row] for row in group] for group in groups]
    return portions


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch that run together.

    Attributes:
        batch: the batch.
        rows: its rows, some of them several times.
        which: per row the place of the question, and of the choice whose tokens but the last run,
            or None where END runs.
        width: how many tokens of each row run.
    """

    batch: Batch
    rows: list[int]
    which: list[tuple[int, int | None]]
    width: int

    def inputs(self, tokens: Tokenised) -> dict[str, Any]:
        """Arguments of the trunk; for choices, the keys and values must hold END already."""
        if self.which[0][1] is None:
            return self.batch.at_end
        cache = DynamicCache()
        for index, layer in enumerate(self.batch.cache.layers):
            cache.update(layer.keys[self.rows], layer.values[self.rows], index)
        choices = [tokens.choices[place][number][:-1] for place, number in self.which]
        last = self.batch.last
        inputs = {"input_ids": torch.tensor(choices, device=last.device), "past_key_values": cache}
        if self.batch.inputs:
            mask = self.batch.inputs["attention_mask"][self.rows]
            steps = torch.arange(1, self.width + 1, device=last.device)
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self.width)], 1)
            inputs["position_ids"] = self.batch.inputs["position_ids"][self.rows] + steps
        return inputs


@dataclass(frozen=True)
class _Run:
    """What came of some pieces of one width.

    Attributes:
        which: see `_Piece`.
        final: hidden states after the final norm.
        z: per layer the head outputs side by side; empty unless they were asked for.
    """

    which: list[tuple[int, int | None]]
    final: Float[Tensor, "batch token width"]
    z: list[Tensor]


def _runs(
    model: Model, prepared: Prepared, edits: Mapping[Where, dict[Head, Tensor]], *, watch: bool
) -> Iterator[_Run]:
    """Run END of all questions and the choices of several tokens, heads overwritten.

    Args:
        model: the model.
        prepared: the questions.
        edits: new outputs of heads at ``end``, and at ``all`` tokens of the choices.
        watch: keep head outputs.
    """
    for places, kept in prepared.portions:
        prompts = kept or prefill(model, [prepared.tokens.prompts[place] for place in places])
        with ExitStack() as stack:
            for batch in prompts.batches:
                stack.enter_context(batch.unchanged())
            ends = [
                _Piece(
                    batch,
                    list(range(len(batch.places))),
                    [(places[row], None) for row in batch.places],
                    1,
                )
                for batch in prompts.batches
            ]
            yield from _each(model, prepared.tokens, ends, edits["end"], "end", watch)
            later: dict[int, list[_Piece]] = {}
            for end in ends:
                for piece in _choice_pieces(model, prepared.tokens, end):
                    later.setdefault(piece.width, []).append(piece)
            for pieces in later.values():
                yield from _each(model, prepared.tokens, pieces, edits["all"], "all", watch)


def _choice_pieces(model: Model, tokens: Tokenised, end: _Piece) -> Iterator[_Piece]:
    """The choices of a batch that have more than one token, those of equal length together."""
    rows: dict[int, list[tuple[int, tuple[int, int | None]]]] = {}
    for row, (place, _) in enumerate(end.which):
        for number, choice in enumerate(tokens.choices[place]):
            if len(choice) > 1:
                rows.setdefault(len(choice) - 1, []).append((row, (place, number)))
    columns = end.batch.cache.layers[0].keys.shape[-2]
    for width, members in rows.items():
        most = max(1, most_tokens(model, TOKENS_PER_BATCH) // (columns + width))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            yield _Piece(end.batch, [row for row, _ in part], [item for _, item in part], width)


def _each(
    model: Model,
    tokens: Tokenised,
    pieces: Sequence[_Piece],
    edits: dict[Head, Tensor],
    where: Where,
    watch: bool,
) -> Iterator[_Run]:
    """Run pieces of one width one by one, or layer by layer together if weights are offloaded."""
    for some in [pieces] if model.offloaded else [[piece] for piece in pieces]:
        passes = [begin(model, use_cache=True, **piece.inputs(tokens)) for piece in some]
        with ExitStack() as stack:
            stack.enter_context(intervene(model, edits, where=where))
            seen = record(model, where=where, passes=len(passes)) if watch else nullcontext(Trace())
            trace = stack.enter_context(seen)
            state = torch.cat(march(model, passes, wide=True))
        which = [item for piece in some for item in piece.which]
        yield _Run(which, finish(model, state), trace.z)


@torch.no_grad()
def mean_outputs(model: Model, prepared: Prepared, heads: Sequence[Head]) -> Means:
    """Mean output of heads over questions, at END and at the tokens of choices.

    Args:
        model: the model.
        prepared: the data set over which a mean ablation takes its means.
        heads: the heads.

    Returns:
        float64 means. Of ``later``, every token of every choice but its last counts once.

    Raises:
        UserError: the model does not have one of the heads.
    """
    check_components(heads, model.layers, model.heads)
    sums = {number: {head: torch.zeros(()).double() for head in heads} for number in (0, 1)}
    counts = [0, 0]
    for run in _runs(model, prepared, {"end": {}, "all": {}}, watch=True):
        place = int(run.which[0][1] is not None)
        counts[place] += run.final.shape[0] * run.final.shape[1]
        for head in heads:
            width = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
            z = run.z[head.layer][..., width].double().cpu()
            sums[place][head] = sums[place][head] + z.reshape(-1, model.d_head).sum(dim=0)
    end = {head: total / counts[0] for head, total in sums[0].items()}
    later = {head: total / counts[1] for head, total in sums[1].items()} if counts[1] else end
    return Means(end, later)


@torch.no_grad()
def score(
    model: Model, prepared: Prepared, heads: Sequence[Head] = (), means: Means | None = None
) -> Scores:
    """Score the choices of questions, with heads mean-ablated at END and at all later positions.

    Args:
        model: the model.
        prepared: the questions.
        heads: what to ablate; none for the intact model.
        means: from `mean_outputs`, what the heads get.

    Raises:
        ValueError: ``means`` lacks one of the heads.
    """
    missing = [str(head) for head in heads if means is None or head not in means.end]
    if missing:
        raise ValueError(f"means must hold every ablated head, lack {missing}; see mean_outputs")
    edits: dict[Where, dict[Head, Tensor]] = {"end": {}, "all": {}}
    if means is not None:
        edits = {
            "end": {head: means.end[head] for head in heads},
            "all": {head: means.later[head] for head in heads},
        }
    choices = prepared.tokens.choices
    sums = [np.zeros(len(texts)) for texts in choices]
    for run in _runs(model, prepared, edits, watch=False):
        wanted: list[tuple[int, int]] = []  # row of hidden states, token that comes next
        owners: list[tuple[int, int]] = []  # question, choice
        for row, (place, number) in enumerate(run.which):
            if number is None:
                wanted += [(row, tokens[0]) for tokens in choices[place]]
                owners += [(place, choice) for choice in range(len(choices[place]))]
            else:
                after = choices[place][number][1:]
                wanted += [(row * len(after) + step, token) for step, token in enumerate(after)]
                owners += [(place, number)] * len(after)
        for (place, number), value in zip(owners, _log_probs(model, run, wanted), strict=True):
            sums[place][number] += value
    return _scores(prepared.questions, sums)


def _log_probs(model: Model, run: _Run, wanted: Sequence[tuple[int, int]]) -> list[float]:
    """Log probabilities of tokens, each after one position of a run, ordered by position."""
    found: list[float] = []
    done = 0
    for start, some in enumerate(run.final.flatten(0, 1).split(UNEMBED_ROWS)):
        first = start * UNEMBED_ROWS
        here = [item for item in wanted[done:] if item[0] < first + len(some)]
        done += len(here)
        values = unembed(model, some).log_softmax(dim=-1)
        rows, tokens = [row - first for row, _ in here], [token for _, token in here]
        found += values[rows, tokens].double().tolist()
    return found


def _scores(questions: Sequence[MultipleChoice], sums: Sequence[np.ndarray]) -> Scores:
    """Choose by the sums of log probabilities, and by these per byte."""
    by_length = []
    for question, values in zip(questions, sums, strict=True):
        size = [len(text.removeprefix(" ").encode()) for text in question.choices]
        by_length.append(int((values / np.array(size)).argmax()))
    return Scores(
        tuple(sums),
        np.array([int(values.argmax()) for values in sums]),
        np.array(by_length),
        np.array([question.answer for question in questions]),
    )


def compare(
    before: Scores,
    after: Scores,
    *,
    groups: Groups | None = None,
    margin: float = MARGIN,
    seed: int = 0,
) -> dict[str, Any]:
    """The same questions before and after an ablation or tuning.

    Args:
        before: scores of the intact model.
        after: scores of the changed model.
        groups: a label per question, such as its task; questions of one label are resampled
            together. Each question by itself by default.
        margin: the largest loss of accuracy that does not count, 0-1.
        seed: seed of the resamples.

    Returns:
        ``n``, ``margin``; under ``acc`` and ``acc_norm`` (see `Scores`) the accuracies
        ``before`` and ``after`` and the ``change`` (after minus before), each as estimate and 95 %
        bounds, McNemar's ``p`` (which takes questions as independent) and whether the changed
        model is shown to be ``non_inferior``; under ``log_prob`` the mean change of the right
        choice's log probability, in nats.

    Raises:
        ValueError: the scores are not those of the same questions.
    """
    if not np.array_equal(before.answers, after.answers):
        raise ValueError("before and after must be scores of the same questions, found others")
    kinds = {
        "acc": (before.correct, after.correct),
        "acc_norm": (before.correct_by_length, after.correct_by_length),
    }
    found: dict[str, Any] = {"n": len(before.answers), "margin": margin}
    for name, (old, new) in kinds.items():
        rates = [
            clustered_proportion(hits, rng=np.random.default_rng(seed), groups=groups)
            for hits in (old, new)
        ]
        change = paired_difference(new, old, rng=np.random.default_rng(seed), groups=groups)
        found[name] = {
            "before": _bounds(rates[0]),
            "after": _bounds(rates[1]),
            "change": _bounds(change),
            "p": mcnemar(int((old & ~new).sum()), int((new & ~old).sum())),
            "non_inferior": non_inferior(change, margin),
        }
    difference = after.log_prob - before.log_prob
    mean = bootstrap_mean(difference, rng=np.random.default_rng(seed), groups=groups)
    return found | {"log_prob": _bounds(mean)}


def _bounds(interval: Interval) -> list[float]:
    return [float(value) for value in (interval.estimate, interval.low, interval.high)]
