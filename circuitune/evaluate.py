"""What tuning gained and what it cost: held-out problems, drift on plain text, and benchmarks.

Every number has an interval, every comparison is paired: the same problems, the same text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from circuitune.answering import answers, are_right
from circuitune.config import EvaluateConfig, PairsConfig, TuneConfig
from circuitune.deltas import Delta, merged, tuned_variants
from circuitune.errors import UserError
from circuitune.exercises import TEST_RESERVE, held_out_problems
from circuitune.models import Model
from circuitune.pairs import PairSet, make_pairs
from circuitune.problems import Problem
from circuitune.retention import drift, retention_text
from circuitune.runs import STAGES, lasting, write_json
from circuitune.stats import (
    Interval,
    clustered_proportion,
    paired_difference,
    resample_counts,
)
from circuitune.suites import (
    COLUMNS,
    Questions,
    ask_suite,
    missing_record,
    named_tasks,
    suite_records,
)
from circuitune.writing import Writing

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


@dataclass(frozen=True)
class Measured:
    """Records for ``eval.json``, and the outcomes that they rest on."""

    records: list[dict[str, Any]]
    samples: pd.DataFrame


def evaluate(model: Model, config: EvaluateConfig, run: Path, work: Path) -> None:
    """The stage: base and variants on the same problems and text; ``eval.json``, all outcomes.

    Outcomes of single problems, paragraphs and questions are in ``samples.parquet``.

    Raises:
        UserError: an option is unusable, or a delta does not fit the model.
    """
    _check(model, config)
    pair_set, deltas = PairSet.load(run), tuned_variants(run)
    options = next(iter(deltas.values())).facts["options"]
    kept = lasting(run, STAGES["evaluate"], config)
    parts = [_arithmetic(model, deltas, pair_set, options, config)]
    _write([*parts, *_beside(model, deltas, config, kept)], work)


def benchmark(model: Model, config: EvaluateConfig, run: Path, work: Path) -> None:
    """The stage of a model that is not tuned: generated arithmetic, perplexity, and a suite.

    Raises:
        UserError: an option is unusable.
    """
    _check(model, config)
    kept = lasting(run, STAGES["benchmark"], config)
    options = asdict(TuneConfig(seed=config.seed))
    try:
        pair_set = make_pairs(model, PairsConfig(seed=config.seed))
    except UserError as error:  # numbers are not written in digits that it knows
        parts = [Measured([missing_record("arithmetic", str(error))], pd.DataFrame())]
    else:
        parts = [_arithmetic(model, {}, pair_set, options, config)]
    _write([*parts, *_beside(model, {}, config, kept)], work)


def _check(model: Model, config: EvaluateConfig) -> None:
    """Refuse before anything is measured what the suite would refuse after it."""
    if config.suite and config.chat and not model.tokenizer.chat_template:
        raise UserError(
            f"--chat needs a tokenizer with a chat template, that of {model.source} has none; "
            "leave the option out."
        )


def _write(parts: Sequence[Measured], work: Path) -> None:
    """Both files of the stage."""
    samples = pd.concat([part.samples for part in parts], ignore_index=True)
    samples.to_parquet(work / "samples.parquet", index=False)
    write_json(work / "eval.json", [record for part in parts for record in part.records])


def _arithmetic(
    model: Model,
    deltas: Mapping[str, Delta],
    pair_set: PairSet,
    options: Mapping[str, Any],
    config: EvaluateConfig,
) -> Measured:
    """Generated problems that no variant was trained on."""
    if config.problems > TEST_RESERVE:
        raise UserError(
            f"--problems must be at most {TEST_RESERVE}, the number kept out of training, found "
            f"{config.problems}; choose fewer."
        )
    writing = Writing(pair_set.selection["prefix"], pair_set.selection["spaced_answer"])
    problems = held_out_problems(
        pair_set,
        options["tune_operators"],
        digits=options["digits"],
        n=config.problems,
        seed=options["seed"],
    )
    hits, frames = {}, []
    for name in ("base", *deltas):
        with variant(model, deltas.get(name)):
            written = answers(model, problems, writing)
        hits[name] = are_right(problems, written)
        facts = {"variant": name, "metric": "exact_match", "value": hits[name].astype(float)}
        texts = {"task": [p.operator.id for p in problems], "id": [str(p) for p in problems]}
        frames.append(pd.DataFrame(texts | facts | {"weight": 1.0, "output": written}))
    records = accuracy_records(hits, problems, seed=config.seed)
    return Measured(records, pd.concat(frames)[COLUMNS])


def _beside(
    model: Model, deltas: Mapping[str, Delta], config: EvaluateConfig, kept: Path
) -> Iterator[Measured]:
    """Plain text, and the suite if there is one."""
    measured = drift(model, deltas, retention_text(config.retention))
    frames = []
    for name, sums in measured.items():
        for column, metric in ((1, "loss"), (2, "kl")):
            places = [str(place) for place in range(len(sums))]
            per_token = {"value": sums[:, column] / sums[:, 0], "weight": sums[:, 0]}
            facts = {"task": "retention", "variant": name, "metric": metric, "output": ""}
            frames.append(pd.DataFrame({"id": places} | per_token).assign(**facts))
    yield Measured(drift_records(measured, seed=config.seed), pd.concat(frames)[COLUMNS])
    if config.suite:
        questions = Questions(
            named_tasks(config.suite),
            None if config.data_dir in (None, "hub") else Path(config.data_dir),
            limit=config.limit,
            shots=None if config.shots < 0 else config.shots,
            chat=config.chat,
            seed=config.seed,
        )
        contexts = {name: partial(variant, model, deltas.get(name)) for name in ("base", *deltas)}
        answered = ask_suite(model, contexts, questions, kept)
        yield Measured(suite_records(answered, seed=config.seed), answered.samples)
