"""What tuning gained and what it cost: exact match on held-out problems, and drift on plain text.

Every number has an interval, every comparison is paired: the same problems, the same text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm
from transformers import DynamicCache

from circuitune.config import EvaluateConfig
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import PairSet, Writing, encode_text
from circuitune.problems import Problem, completion
from circuitune.runs import write_json
from circuitune.slices import Delta, load_delta, merged
from circuitune.stats import (
    Interval,
    clustered_proportion,
    paired_difference,
    resample_counts,
)
from circuitune.tune import TEST_RESERVE, held_out_problems

PROMPTS_PER_BATCH = 64
NEW_TOKENS = 6  # answers have at most three digits here, and a line break follows
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
    """Greedy continuations, batched by prompt length with a key-value cache."""
    texts = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for place, tokens in enumerate(prompts):
        by_length.setdefault(len(tokens), []).append(place)
    for places in by_length.values():
        for first in range(0, len(places), PROMPTS_PER_BATCH):
            chosen = places[first : first + PROMPTS_PER_BATCH]
            current = torch.tensor([list(prompts[p]) for p in chosen], device=model.device)
            cache = DynamicCache(config=model.hf.config)
            steps = []
            for _ in range(new_tokens):
                output = model.hf(current, past_key_values=cache, use_cache=True, logits_to_keep=1)
                current = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                steps.append(current)
            decoded = model.tokenizer.batch_decode(torch.cat(steps, dim=1))
            for place, text in zip(chosen, decoded, strict=True):
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
    """Paragraphs of a text file, one a line; by default 200 that ship with circuitune.

    Raises:
        UserError: the file is absent or holds fewer than ten paragraphs.
    """
    if path is None:
        text = resources.files("circuitune").joinpath("data/retention.txt").read_text("utf-8")
    else:
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


def _log_probs(model: Model, tokens: torch.Tensor) -> Float[torch.Tensor, "batch token vocab"]:
    return model.hf(tokens, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)


@torch.no_grad()
def drift(
    model: Model, deltas: Mapping[str, Delta], paragraphs: Sequence[str], *, width: int = 128
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
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    groups = [places[i : i + 8] for places in by_length.values() for i in range(0, len(places), 8)]
    for places in tqdm(groups, desc="retention", disable=None, leave=False):
        tokens = torch.tensor([rows[place] for place in places], device=model.device)
        base = _log_probs(model, tokens)
        for name in result:
            with variant(model, deltas.get(name)):
                own = base if name == "base" else _log_probs(model, tokens)
            loss = -own.gather(-1, tokens[:, 1:, None])[..., 0].sum(dim=1)
            kl = (base.exp() * (base - own)).sum(dim=(1, 2))
            count = torch.full_like(loss, tokens.shape[1] - 1)
            result[name][places] = torch.stack([count, loss, kl], dim=1).cpu().double().numpy()
    return result


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
    hits = {}
    for name in ("base", *deltas):
        with variant(model, deltas.get(name)):
            hits[name] = exact_match(model, problems, writing)
    records = accuracy_records(hits, problems, seed=config.seed)
    measured = drift(model, deltas, retention_text(config.retention))
    records += drift_records(measured, seed=config.seed)
    write_json(work / "eval.json", records)
