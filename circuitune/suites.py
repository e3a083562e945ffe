"""Benchmarks of the base and its tuned variants: what tuning gains, and what must not suffer.

A suite is a list of tasks. Each is asked by lm-eval, whose definitions own prompts, filters and
metrics, and answered by `circuitune.scoring`; every outcome is kept, so that any two variants can
be compared question by question. A task that cannot be had or read is named with the reason, the
others are still asked. A suite that was interrupted goes on with the next task.
"""

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from circuitune.comparing import Scores, compare, family, mean_over_tasks, score
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.stats import Interval
from circuitune.taskfiles import TASKS, TaskFile, write_task

WORD_PROBLEMS = ("addsub", "singleeq", "svamp", "gsm8k")
RETENTION = ("commonsense_qa", "mmlu", "bbh", "wikitext")
SUITES: dict[str, tuple[str, ...]] = {
    "paper": WORD_PROBLEMS + RETENTION,
    "word-problems": WORD_PROBLEMS,
    "retention": RETENTION,
}
COLUMNS = ["task", "variant", "metric", "id", "value", "weight", "output"]
TASKS_FOLDER = "tasks"
# A retention task has not suffered if the variant is shown to lose less than this share.
MARGIN = 0.01
MEAN = "word_problems"  # the plain mean of the word problems, as in Zhang et al.
PERPLEXITY = "word_perplexity"
ARTICLE = 10  # a whole article takes as long as so many questions, and counts as many


@dataclass(frozen=True)
class Questions:
    """How a suite is asked.

    Attributes:
        tasks: names of tasks, see `circuitune.taskfiles`.
        data_dir: folder with the data sets; None reads them from the Hugging Face hub.
        limit: most documents of a task, drawn at random with the seed; 0 for all. An article of
            running text counts as ten, and two are asked at least.
        shots: solved examples in front of each question; None for the task's own number.
        chat: whether questions go through the tokenizer's chat template.
        seed: of the draw of documents.
    """

    tasks: tuple[str, ...]
    data_dir: Path | None
    limit: int = 0
    shots: int | None = None
    chat: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """Outcomes of a suite.

    Attributes:
        samples: one row per task, variant, metric and document, `COLUMNS`.
        kinds: task -> ``math`` or ``retention``.
        main: task -> its main metric.
        missing: task -> why it was not asked, in a sentence.
        chance: task -> what guessing scores by the main metric, for tasks with choices.
    """

    samples: pd.DataFrame
    kinds: dict[str, str]
    main: dict[str, str]
    missing: dict[str, str]
    chance: dict[str, float] = field(default_factory=dict)


def named_tasks(suite: str) -> tuple[str, ...]:
    """Tasks of a suite, or of a list of task names with commas.

    Raises:
        UserError: a name is unknown.
    """
    if suite in SUITES:
        return SUITES[suite]
    names = tuple(dict.fromkeys(part.strip() for part in suite.split(",")))
    if not set(names) <= set(TASKS):
        raise UserError(
            f"--suite must be {', '.join(SUITES)} or some of {', '.join(TASKS)}, found {suite!r}; "
            "use one of them."
        )
    return names


def ask_suite(
    model: Model,
    variants: Mapping[str, Callable[[], AbstractContextManager[None]]],
    questions: Questions,
    kept: Path,
) -> Answered:
    """Ask every task of every variant; outcomes are kept as they come.

    Args:
        model: the base.
        variants: name -> a context in which the model is that variant.
        questions: how the suite is asked.
        kept: folder that outlives an interruption; what is in it is not asked again.

    Raises:
        UserError: lm-eval is not installed, or no task at all could be asked.
    """
    scoring = _scoring()
    files, missing = _task_files(questions, kept / TASKS_FOLDER)
    backend = scoring.backend(model)
    frames: list[pd.DataFrame] = []
    for name, context in variants.items():
        with context():
            for file in files:
                if file.name in missing:
                    continue
                path = kept / f"{name}-{file.name}.parquet"
                try:
                    frames.append(_asked(scoring, backend, file, questions, path, name))
                except UserError as error:
                    missing[file.name] = str(error)
    if not frames:
        raise UserError(
            "A suite needs at least one task that can be asked, none could: "
            f"{' '.join(missing.values())}"
        )
    samples = pd.concat(frames, ignore_index=True)
    return Answered(
        samples=samples[~samples["task"].isin(missing)].reset_index(drop=True),
        kinds={file.name: file.kind for file in files if file.name not in missing},
        main={file.name: file.metrics[0] for file in files if file.name not in missing},
        missing=missing,
        chance={file.name: file.chance for file in files if 0 < file.chance < 1},
    )


def _scoring() -> Any:
    """The module that talks to lm-eval; it is imported when a suite is asked."""
    try:
        from circuitune import scoring
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            "A suite needs the package lm-eval, it is not installed; "
            '`pip install "circuitune[eval]"`.'
        ) from error
    from datasets import disable_progress_bars

    disable_progress_bars()  # of files of a few records
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # defaults of its own tasks
    return scoring


def _task_files(questions: Questions, folder: Path) -> tuple[list[TaskFile], dict[str, str]]:
    """Every task as lm-eval reads it, and the reasons of those that cannot be had."""
    files, missing = [], {}
    for name in questions.tasks:
        try:
            files.append(write_task(name, questions.data_dir, folder, shots=questions.shots))
        except UserError as error:
            missing[name] = str(error)
    return files, missing


def _asked(
    scoring: Any, backend: Any, file: TaskFile, questions: Questions, path: Path, variant: str
) -> pd.DataFrame:
    """Outcomes of one task of one variant, from the file if it was asked before."""
    if path.is_file():
        return pd.read_parquet(path)
    chosen = drawn(file, questions)  # lm-eval asks all documents of a part that is not named
    results = scoring.ask(
        backend, tuple(chosen), path.parent / TASKS_FOLDER, samples=chosen, chat=questions.chat
    )
    frame = sample_frame(results["samples"], file, variant)
    beside = path.with_suffix(".part")
    frame.to_parquet(beside, index=False)
    beside.replace(path)
    return frame


def drawn(file: TaskFile, questions: Questions) -> dict[str, list[int]]:
    """Documents that are asked, by lm-eval's task name: all, or a random draw over the task."""
    every = [(name, i) for name in file.lm_names for i in range(file.documents[name])]
    most = questions.limit
    if most and file.metrics[0] == PERPLEXITY:
        most = max(2, math.ceil(most / ARTICLE))  # one article alone says nothing of the others
    if 0 < most < len(every):
        rng = np.random.default_rng([questions.seed, zlib.crc32(file.name.encode())])
        chosen = sorted(rng.choice(len(every), size=most, replace=False))
        every = [every[place] for place in chosen]
    found: dict[str, list[int]] = {}
    for name, place in every:
        found.setdefault(name, []).append(place)
    return found


def sample_frame(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], file: TaskFile, variant: str
) -> pd.DataFrame:
    """Outcomes as rows, from lm-eval's logged samples.

    A metric is named ``metric,filter`` as in lm-eval's results, without the filter ``none``. The
    metric of rolling perplexity is the loss, nats a word, weighted by the number of words.

    Args:
        samples: lm-eval's task name -> one record per document and filter.
        file: the task.
        variant: name of the variant.
    """
    rows = []
    for lm_name, records in samples.items():
        for record in records:
            for metric in record["metrics"]:
                name = ",".join([metric, record["filter"]]).removesuffix(",none")
                if name not in file.metrics:
                    continue
                value, weight = record[metric], 1.0
                if isinstance(value, tuple | list):  # log likelihood, and words behind it
                    value, weight = -value[0] / value[1], float(value[1])
                output = record["resps"][0]  # as it was written, before any filter
                output = output[0] if isinstance(output, tuple | list) else output
                rows.append(
                    {
                        "task": file.name,
                        "variant": variant,
                        "metric": name,
                        "id": f"{lm_name}:{record['doc_id']}",
                        "value": float(value),
                        "weight": weight,
                        "output": output if isinstance(output, str) else "",
                    }
                )
    rows.sort(key=lambda row: file.metrics.index(row["metric"]))
    return pd.DataFrame(rows, columns=COLUMNS)


def missing_record(task: str, reason: str) -> dict[str, Any]:
    """What ``eval.json`` says of a task that could not be asked."""
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    return {"task": task, "variant": "", "metric": "missing", "reason": reason} | nothing


def scores_of(samples: pd.DataFrame, *, seed: int = 0) -> dict[tuple[str, str, str], Scores]:
    """Outcomes by task, metric and variant, as `circuitune.comparing` takes them.

    Args:
        samples: rows of `COLUMNS`, of one training seed.
        seed: that seed.
    """
    found = {}
    for (task, metric, name), rows in samples.groupby(["task", "metric", "variant"], sort=False):
        weights = rows["weight"].to_numpy(float)
        found[task, metric, name] = Scores(
            task,
            name,
            seed,
            tuple(rows["id"]),
            rows["value"].to_numpy(float),
            None if (weights == 1).all() else weights,
        )
    return found


def suite_records(answered: Answered, *, seed: int) -> list[dict[str, Any]]:
    """Scores of every variant, and all paired differences, for ``eval.json``.

    Holm's correction runs over the tasks of a pair of variants. A retention task has ``not_worse``
    against the base: whether a loss of `MARGIN` is excluded. A score has ``chance``, that of
    guessing, where there are choices: a base that is no better has nothing to lose.
    """
    found = scores_of(answered.samples, seed=seed)
    records = []
    for (task, metric, name), own in found.items():
        value = _shown(metric, score([own], seed=seed), difference=False)
        facts: dict[str, Any] = {"kind": answered.kinds[task]}
        if task in answered.chance and metric == answered.main[task]:
            facts["chance"] = answered.chance[task]
        records.append(_record(task, name, metric, value, len(own.ids)) | facts)
    for first, second in combinations(dict.fromkeys(answered.samples["variant"]), 2):
        pair = (second, first) if first == "base" else (first, second)
        records += _differences(answered, found, *pair, seed=seed)
    return records + [missing_record(*item) for item in answered.missing.items()]


def _differences(
    answered: Answered,
    found: Mapping[tuple[str, str, str], Scores],
    one: str,
    two: str,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Every task of one variant minus another, and the mean of the word problems."""
    results, records = [], []
    for task, metric in answered.main.items():
        kept = answered.kinds[task] == "retention" and metric != PERPLEXITY and two == "base"
        both = [[found[task, metric, name]] for name in (one, two)]
        rng = np.random.default_rng(seed)
        results.append(compare(*both, rng=rng, margin=MARGIN if kept else None))
    name = f"{one} - {two}"
    for result in family(results):
        metric = answered.main[result.task]
        value = _shown(metric, result.difference, difference=True)
        facts = {"p": result.p, "p_holm": result.p_holm, "not_worse": result.non_inferior}
        kind = {"kind": answered.kinds[result.task]}
        records.append(_record(result.task, name, metric, value, result.n) | kind | facts)
    problems = [task for task in answered.main if task in WORD_PROBLEMS]
    if len(problems) > 1:
        pairs = [
            tuple([found[task, answered.main[task], variant]] for variant in (one, two))
            for task in problems
        ]
        mean = mean_over_tasks(pairs)
        records.append(_record(MEAN, name, "exact_match", mean, mean.n) | {"kind": "math"})
    return records


def _shown(metric: str, value: Interval, *, difference: bool) -> Interval:
    """Losses as perplexities, a difference of losses as a relative change; the rest as it is."""
    if metric != PERPLEXITY:
        return value
    with np.errstate(over="ignore"):  # a model that is lost has no finite perplexity
        ends = np.exp([value.estimate, value.low, value.high]) - difference
    return Interval(*ends.tolist(), value.n)


def _record(task: str, name: str, metric: str, value: Interval, n: int) -> dict[str, Any]:
    ends: tuple[float | None, float | None] = value.low, value.high
    if not np.isfinite([value.low, value.high]).all():  # JSON has no infinity
        ends = None, None
    facts = {"value": value.estimate, "low": ends[0], "high": ends[1], "n": n}
    return {"task": task, "variant": name, "metric": metric} | facts
