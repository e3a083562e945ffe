"""Benchmarks of a run: scores of every variant, and what their differences say."""

from collections.abc import Sequence
from dataclasses import dataclass

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.format import MISSING, Cell
from circuitune.report.records import Evaluation
from circuitune.report.tables import Row, Table, columns, row

PERPLEXITY = "word_perplexity"
BETWEEN = " - "  # in the name of a difference of variants
WIDEST = 4  # variants that stand side by side; more stand one below the other
CHIEF = "precise"  # is compared with every other variant


@dataclass(frozen=True)
class Benchmarks:
    """Tables of the benchmarks.

    Attributes:
        scores: one row per task and metric, one column per variant; with many variants a row each.
        differences: one row per pair of variants and task, None where there is one variant.
        missing: tasks that could not be asked, with the reason.
    """

    scores: Table
    differences: Table | None
    missing: tuple[str, ...]


def benchmarks(evaluations: Sequence[Evaluation]) -> Benchmarks | None:
    """Tables of all records that belong to a suite; None where there are none."""
    own = [record for record in evaluations if record.kind]
    missing = tuple(
        f"{fmt.task_name(record.task)}: not asked. {record.reason}"
        for record in evaluations
        if record.metric == "missing"
    )
    if not own and not missing:
        return None
    return Benchmarks(_scores(own), _differences(own), missing)


def _scores(records: Sequence[Evaluation]) -> Table:
    plain = [record for record in records if BETWEEN not in record.variant]
    variants = list(dict.fromkeys(record.variant for record in plain))
    by = {(r.task, r.metric, r.variant): r for r in plain}
    rows: list[Row] = []
    tall = len(variants) > WIDEST
    choices = any(record.chance is not None for record in plain)
    for task, metric in dict.fromkeys((r.task, r.metric) for r in plain):
        found = [by.get((task, metric, name)) for name in variants]
        cells = [Cell(MISSING) if r is None else _score(r) for r in found]
        size = max((r.n for r in found if r is not None), default=0)
        chance = next((r.chance for r in found if r is not None), None)
        start = (fmt.task_name(task), metric_name(metric), fmt.count(size))
        if choices:
            start += (MISSING if chance is None else fmt.percent(Estimate(chance), digits=1),)
        if tall:
            rows += [row(*start, *pair) for pair in zip(variants, cells, strict=True)]
        else:
            rows.append(row(*start, *cells))
    left = ["Task", "Score", "Variant"]
    counts = ["Questions", "Guessing"] if choices else ["Questions"]
    heads = columns(*left[:2], *counts, *(["Variant", "Value"] if tall else variants), left=left)
    return Table("Benchmarks", heads, tuple(rows), "95 % intervals over questions.")


def _differences(records: Sequence[Evaluation]) -> Table | None:
    """Every variant against the base, and precise against the others where it was trained."""
    rows: list[Row] = []
    pairs = [record for record in records if BETWEEN in record.variant]
    names = {name for record in pairs for name in _sides(record)}
    shown = [r for r in pairs if CHIEF not in names or {"base", CHIEF} & set(_sides(r))]
    guessed = {record.task for record in records if record.variant == "base" and guessing(record)}
    for record in shown:
        p = "" if record.p_holm is None else fmt.p_value(record.p_holm)
        judged = {None: "", True: "yes", False: "not shown"}[record.not_worse]
        task = fmt.task_name(record.task)
        if judged and record.task in guessed:
            judged += ", base at guessing"
        rows.append(row(record.variant, task, _difference(record), p, judged))
    if not rows:
        return None
    words = ["Variants", "Task", "Not worse by a point"]
    note = (
        "Paired by question. p: exact McNemar or sign flips, Holm over the tasks of a pair of "
        "variants. Not worse by a point: the interval's lower end is above -1 point."
    )
    if guessed:
        note += " At guessing: the base is not shown to beat it, so it has little to lose."
    note += " All pairs of variants are in eval.json." if len(shown) < len(pairs) else ""
    heads = columns("Variants", "Task", "Difference", "p", words[2], left=words)
    return Table("Differences", heads, tuple(rows), note)


def guessing(record: Evaluation) -> bool:
    """Whether a score is not shown to be above that of guessing."""
    low = record.estimate.low
    return record.chance is not None and low is not None and low <= record.chance


def _sides(record: Evaluation) -> list[str]:
    return record.variant.split(BETWEEN)


def _score(record: Evaluation) -> Cell:
    if record.metric == PERPLEXITY:
        return fmt.plain(record.estimate, digits=2)
    return fmt.accuracy(record.estimate)


def _difference(record: Evaluation) -> Cell:
    """Points of a share, percent of a perplexity."""
    if record.metric == PERPLEXITY:
        return fmt.percent(record.estimate, signed=True, digits=2)
    return fmt.points(record.estimate, digits=1)


def metric_name(metric: str) -> str:
    """A metric in words."""
    known = {"acc": "accuracy", "strict_match": "strict", "exact_match": "exact match"}
    base, _, rule = metric.partition(",")
    return {"flexible-extract": "exact match", "strict-match": "strict"}.get(
        rule, known.get(base, base.replace("_", " "))
    )
