"""What tuning gained and what it cost: exact match on held-out problems, and drift on plain text.

Every number has an interval, every comparison is paired: the same problems, the same text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm
from transformers import GenerationConfig

from circuitune.config import EvaluateConfig
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import PairSet, Writing, encode_text, pad, shipped_paragraphs
from circuitune.patching import unembed
from circuitune.problems import Problem, completion
from circuitune.prompts import pad_left, similar_lengths
from circuitune.runs import write_json
from circuitune.sites import resume, states_entering
from circuitune.slices import Delta, load_delta, merged
from circuitune.stats import (
    Interval,
    clustered_proportion,
    paired_difference,
    resample_counts,
)
from circuitune.tune import TEST_RESERVE, held_out_problems

PROMPTS_PER_BATCH = 64
TEXTS_PER_BATCH = 8
NEW_TOKENS = 5  # at most three digits, after a space perhaps, and what ends the number
# The number that an answer starts with, unless it goes on as a decimal fraction.
ANSWER = re.compile(r"\s*(-?\d+)(?!\d|[.,]\d)")


def read_answer(text: str) -> int | None:
    """The whole number at the start of a generated answer, if there is one."""
    found = ANSWER.match(text)
    return int(found[1]) if found else None


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Greedy continuations by Hugging Face's ``generate``, prompts of similar length together."""
    texts = [""] * len(prompts)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.eos_token_id or 0,
    )
    for places in similar_lengths([len(tokens) for tokens in prompts], PROMPTS_PER_BATCH):
        tokens, mask = pad_left([prompts[place] for place in places])
        output = model.hf.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
        decoded = model.tokenizer.batch_decode(output[:, tokens.shape[1] :])
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text
    return texts


def exact_match(
    model: Model, problems: Sequence[Problem], writing: Writing
) -> Bool[np.ndarray, " example"]:
    """Whether the whole generated answer is right, per problem."""
    asked = [writing.write(*completion(problem))[0] for problem in problems]
    texts = generate(model, [encode_text(model.tokenizer, prompt) for prompt in asked])
    pairs = zip(problems, texts, strict=True)
    return np.array([read_answer(text) == problem.answer for problem, text in pairs])


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


@torch.no_grad()
def drift(
    model: Model, deltas: Mapping[str, Delta], paragraphs: Sequence[str], *, width: int = 64
) -> dict[str, Float[np.ndarray, "paragraph quantity"]]:
    """Loss and KL of every variant on plain text, per paragraph.

    Args:
        model: the base model.
        deltas: variants by name.
        paragraphs: the text.
        width: most tokens of a paragraph.

    Returns:
        for ``base`` and each variant, per paragraph the columns: number of predicted tokens,
        sum of negative log likelihoods in nats, sum over positions of KL(base || variant).
    """
    rows = [encode_text(model.tokenizer, text)[:width] for text in paragraphs]
    result = {name: np.zeros((len(rows), 3)) for name in ("base", *deltas)}
    shared = min((delta.lowest_layer for delta in deltas.values()), default=0)
    groups = similar_lengths([len(row) for row in rows], TEXTS_PER_BATCH)
    for places in tqdm(groups, desc="retention", disable=None, leave=False):
        # Padding on the right reaches nothing under a causal mask.
        tokens = pad([rows[place] for place in places], 0).to(model.device)
        real = pad([[1] * (len(rows[place]) - 1) for place in places], 0).to(model.device)
        entering = states_entering(model, shared, tokens)
        base = _log_probs(model, tokens, shared, entering)
        for name in result:
            own = base
            if name != "base":
                with merged(model, deltas[name]):
                    own = _log_probs(model, tokens, shared, entering)
            loss = -own.gather(-1, tokens[:, 1:, None])[..., 0]
            kl = (base.exp() * (base - own)).sum(dim=-1)
            sums = [(values * real).sum(dim=1) for values in (torch.ones_like(loss), loss, kl)]
            result[name][places] = torch.stack(sums, dim=1).cpu().double().numpy()
    return result


def _log_probs(
    model: Model, tokens: torch.Tensor, layer: int, entering: torch.Tensor
) -> Float[torch.Tensor, "batch token vocab"]:
    """Next-token log probabilities from the states that enter a layer."""
    with resume(model, layer, entering):
        final = model.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return unembed(model, final[:, :-1]).log_softmax(dim=-1)


@contextmanager
def variant(model: Model, delta: Delta | None) -> Iterator[None]:
    """The base model, or the model with a delta in its weights, while the context lasts."""
    with nullcontext() if delta is None else merged(model, delta):
        yield


def _record(
    task: str, name: str, metric: str, value: Interval | tuple[float, float, float], n: int
) -> dict[str, Any]:
    if isinstance(value, Interval):
        value = (value.estimate, value.low, value.high)
    estimate, low, high = (float(number) for number in value)
    head = {"task": task, "variant": name, "metric": metric}
    return head | {"value": estimate, "low": low, "high": high, "n": n}


def accuracy_records(
    hits: Mapping[str, Bool[np.ndarray, " example"]],
    problems: Sequence[Problem],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Exact match per operator and over all, gains over the base, precise against random."""
    records = []
    operators = list(dict.fromkeys(problem.operator.id for problem in problems))
    for task in ("arithmetic", *operators):
        places = [i for i, p in enumerate(problems) if task in ("arithmetic", p.operator.id)]
        groups = [problems[i].group for i in places]
        values = {name: array[places].astype(float) for name, array in hits.items()}

        def compare(a: str, b: str, values: dict = values, groups: list = groups) -> Interval:
            rng = np.random.default_rng(seed)
            return paired_difference(values[a], values[b], rng=rng, groups=groups)

        for name, array in values.items():
            share = clustered_proportion(array, rng=np.random.default_rng(seed), groups=groups)
            records.append(_record(task, name, "exact_match", share, len(places)))
            if name != "base":
                gain = compare(name, "base")
                records.append(_record(task, name, "exact_match_gain", gain, len(places)))
        if {"precise", "random"} <= set(values):
            gap = compare("precise", "random")
            name = "precise - random"
            records.append(_record(task, name, "exact_match", gap, len(places)))
    return records


def drift_records(
    measured: Mapping[str, Float[np.ndarray, "paragraph quantity"]], *, seed: int
) -> list[dict[str, Any]]:
    """Perplexity, its relative change and KL to the base, paragraphs resampled together."""
    paragraphs = len(measured["base"])
    counts = resample_counts(paragraphs, draws=2000, rng=np.random.default_rng(seed))
    weights = np.vstack([np.ones(paragraphs), counts])  # first row: the sample itself

    def per_token(values: np.ndarray, column: int) -> np.ndarray:
        return (weights @ values[:, column]) / (weights @ values[:, 0])

    def triple(draws: np.ndarray) -> tuple[float, float, float]:
        low, high = np.quantile(draws[1:], [0.025, 0.975])
        return draws[0], low, high

    records = []
    base = per_token(measured["base"], 1)
    for name, values in measured.items():
        loss = per_token(values, 1)
        kinds = {"perplexity": np.exp(loss)}
        if name != "base":
            kinds["perplexity_change"] = np.exp(loss - base) - 1
            kinds["kl"] = per_token(values, 2)
        for metric, draws in kinds.items():
            records.append(_record("retention", name, metric, triple(draws), paragraphs))
    if {"precise", "random"} <= set(measured):
        gap = per_token(measured["precise"], 2) - per_token(measured["random"], 2)
        records.append(_record("retention", "precise - random", "kl", triple(gap), paragraphs))
    return records


def evaluate(model: Model, config: EvaluateConfig, run: Path, work: Path) -> None:
    """The stage: base, precise and random on the same problems and text; writes ``eval.json``."""
    pair_set = PairSet.load(run)
    selection = pair_set.selection
    writing = Writing(selection["prefix"], selection["spaced_answer"])
    deltas = {"precise": load_delta(run / "tuned")}
    if (run / "tuned" / "random").is_dir():
        deltas["random"] = load_delta(run / "tuned" / "random")
    options = deltas["precise"].facts["options"]
    if config.problems > TEST_RESERVE:
        raise UserError(
            f"--problems must be at most {TEST_RESERVE}, the number kept out of training, found "
            f"{config.problems}; choose fewer."
        )
    problems = held_out_problems(
        pair_set,
        options["tune_operators"],
        digits=options["digits"],
        n=config.problems,
        seed=options["seed"],
    )
    paragraphs = retention_text(config.retention)
    hits = {}
    for name in ("base", *deltas):
        with variant(model, deltas.get(name)):
            hits[name] = exact_match(model, problems, writing)
    records = accuracy_records(hits, problems, seed=config.seed)
    measured = drift(model, deltas, paragraphs)
    records += drift_records(measured, seed=config.seed)
    write_json(work / "eval.json", records)
