"""What tuning gained and what it cost: exact match on held-out problems, and drift on plain text.

Every number has an interval, every comparison is paired: the same problems, the same text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from circuitune.answering import exact_match
from circuitune.config import EvaluateConfig
from circuitune.deltas import Delta, merged, tuned_variants
from circuitune.errors import UserError
from circuitune.exercises import TEST_RESERVE, held_out_problems
from circuitune.models import Model
from circuitune.pairs import PairSet, Writing
from circuitune.problems import Problem
from circuitune.retention import drift, retention_text
from circuitune.runs import write_json
from circuitune.stats import (
    Interval,
    clustered_proportion,
    paired_difference,
    resample_counts,
)

# Every other variant is compared with this one.
CHIEF = "precise"


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
    """Exact match per operator and over all, gains over the base, precise against the others."""
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
        for name in rivals(values):
            gap = compare(CHIEF, name)
            records.append(_record(task, f"{CHIEF} - {name}", "exact_match", gap, len(places)))
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
    for name in rivals(measured):
        gap = per_token(measured[CHIEF], 2) - per_token(measured[name], 2)
        records.append(_record("retention", f"{CHIEF} - {name}", "kl", triple(gap), paragraphs))
    return records


def rivals(variants: Iterable[str]) -> list[str]:
    """The variants that precise tuning is compared with; none where it was not trained."""
    names = list(variants)
    return [name for name in names if name not in ("base", CHIEF)] if CHIEF in names else []


def evaluate(model: Model, config: EvaluateConfig, run: Path, work: Path) -> None:
    """The stage: base and variants on the same problems and text; writes ``eval.json``."""
    pair_set = PairSet.load(run)
    selection = pair_set.selection
    writing = Writing(selection["prefix"], selection["spaced_answer"])
    deltas = tuned_variants(run)
    options = next(iter(deltas.values())).facts["options"]
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
