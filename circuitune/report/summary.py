"""The tables of a report, from a run; the page and the terminal only lay them out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from circuitune.report import feeds
from circuitune.report import format as fmt
from circuitune.report.benchmarks import Benchmarks, benchmarks
from circuitune.report.certainty import certainty
from circuitune.report.estimate import Estimate
from circuitune.report.explaining import Explained, explained
from circuitune.report.format import MISSING, Cell
from circuitune.report.headline import headline, primary_task
from circuitune.report.judging import Judged, judged
from circuitune.report.load import stage_command
from circuitune.report.measures import Knockouts, Measured
from circuitune.report.proposing import Enough, enough
from circuitune.report.reaching import Reached, reached
from circuitune.report.records import (
    Circuit,
    Evaluation,
    ModelCard,
    Pair,
    Prefix,
    Run,
    TunedVariant,
)
from circuitune.report.tables import Row, Sentence, Table, columns, row
from circuitune.stats import proportion

_RANKS_SHOWN = 10
_VARIANTS = ("base", "random", "precise")
_STAGES = {
    "validate": "removes the components and counts the answers that survive, beside random heads",
    "explain": "shows what the heads look at and write, and how the answer forms layer by layer",
    "tune": "trains these components alone, and as many random ones as a control",
    "evaluate": "measures arithmetic and retention before and after tuning",
}


@dataclass(frozen=True)
class Step:
    """A stage that has not run: the command line, and what it gives."""

    stage: str
    command: str
    gives: str


@dataclass(frozen=True)
class Summary:
    """Everything a report says in words and numbers.

    Attributes:
        title: Task and model.
        headline: The result in a few sentences, computed from the data.
        outdated: Stages whose results are of files that have changed since, a sentence for each.
        card: Facts about the model and the run, label and text.
        pairs: Tasks with the share of problems that the model answers.
        prefixes: Prompt prefixes that were tried, None where there was no choice.
        certainty: How sure the first sweep is, in sentences; empty where not measured.
        ranking: The chosen components, most important first.
        brought: Which heads bring what to the answer, a sentence for each contrast.
        feeding: Components with what they bring, None where that was not traced.
        edges: Every edge of the graph, None where there is none.
        single_pass: The first components of the paper's ranking, None where it was not made.
        knockout: Accuracy by number of components removed, None before `validate`.
        other_tasks: The same sets on other tasks, None where none were measured.
        explained: What the heads do and how the answer forms, None before `explain`.
        judged: Other ablations, control tasks and criteria, None before `validate`.
        tuning: One row per variant, None before `tune` and `evaluate`.
        measurements: Every record of `eval.json`, None before `evaluate`.
        benchmarks: Scores and differences of a suite, None where none was asked.
        enough: What joint selection proposed, None where another rule chose the components.
        reached: How far the circuit reaches, None before `transfer`.
        steps: The stages that are still to run.
    """

    title: str
    headline: tuple[Sentence, ...]
    outdated: tuple[str, ...]
    card: tuple[tuple[str, str], ...]
    pairs: Table
    prefixes: Table | None
    certainty: tuple[str, ...]
    ranking: Table
    single_pass: Table | None
    brought: tuple[Sentence, ...]
    feeding: Table | None
    edges: Table | None
    knockout: Table | None
    other_tasks: Table | None
    explained: Explained | None
    judged: Judged | None
    tuning: Table | None
    measurements: Table | None
    benchmarks: Benchmarks | None
    enough: Enough | None
    reached: Reached | None
    steps: tuple[Step, ...]


def build(run: Run, measured: Measured) -> Summary:
    """All tables of `run` and of its averages."""
    circuit, curves = run.circuit, measured.knockouts
    joint = circuit.joint
    ranks = [part.id for part in circuit.components]
    again = stage_command("validate", run.path)
    model = run.manifest.model.id
    named = Path(model).name if Path(model).is_absolute() else model
    return Summary(
        title=f"{fmt.task_name(circuit.task).capitalize()} in {named}",
        headline=headline(run, curves),
        outdated=tuple(
            f"{stage} was run before {by} was run anew: its numbers are of what {by} had made "
            f"before; `{stage_command(stage, run.path)}` makes them anew."
            for stage, by in run.outdated.items()
        ),
        card=_card(run),
        pairs=_pairs(run),
        prefixes=_prefixes(run),
        certainty=certainty(circuit),
        ranking=_ranking(run, measured),
        single_pass=_single_pass(circuit),
        brought=feeds.told(circuit),
        feeding=feeds.nodes_table(circuit.feeds, ranks) if circuit.feeds else None,
        edges=feeds.edges_table(circuit.feeds) if circuit.feeds else None,
        knockout=None if curves is None else _knockout(curves, circuit.task),
        other_tasks=None if curves is None else _other_tasks(curves, circuit.task),
        explained=run.explanation and explained(run.explanation),
        judged=judged(measured.removals, run.judgement, circuit.task, again) if curves else None,
        tuning=_tuning(run),
        measurements=measurements(run.evaluations or ()),
        benchmarks=benchmarks(run.benchmarks),
        enough=joint and enough(joint, measured.held_out, circuit.size, again),
        reached=run.transfer and reached(run.transfer, measured.reach),
        steps=_steps(run),
    )


def _card(run: Run) -> tuple[tuple[str, str], ...]:
    model: ModelCard = run.manifest.model
    spent = [s["seconds"] for s in run.manifest.stages.values() if "seconds" in s]
    seconds = sum(float(value) for value in spent if isinstance(value, int | float))
    heads = f"{model.layers} \u00d7 {model.heads} = {fmt.count(model.layers * model.heads)}"
    shared = f", {model.kv_heads} key-value" if model.kv_heads != model.heads else ""
    facts = [
        ("Model", model.id if Path(model.id).is_absolute() else ""),
        ("Family", model.family),
        ("Parameters", f"{fmt.short_count(model.parameters)}"),
        ("Layers \u00d7 heads", f"{heads}{shared}"),
        ("Widths", f"{model.d_model} model, {model.d_head} head"),
        ("Precision", model.dtype),
        ("Machine", ", ".join(_fact(k, v) for k, v in run.manifest.machine.items())),
        ("Time", fmt.duration(seconds) if spent else ""),
    ]
    return tuple((label, text) for label, text in facts if text)


def _fact(name: str, value: object) -> str:
    return f"{value} {name}" if isinstance(value, int | float) else str(value)


def _pairs(run: Run) -> Table:
    if run.selection is None:
        tasks = dict.fromkeys(pair.task for pair in run.pairs)
        rows = [
            row(fmt.task_name(task), *(_split_size(run.pairs, task, s) for s in ("select", "test")))
            for task in tasks
        ]
        return Table("Prompt pairs", columns("Task", "Select", "Test", left=["Task"]), tuple(rows))
    return Table(
        "Prompt pairs",
        columns("Task", "Tried", "Right", "Rate", "Select", "Test", left=["Task"]),
        tuple(
            row(
                fmt.task_name(kept.task),
                fmt.count(kept.tried),
                fmt.count(kept.correct),
                fmt.accuracy(kept.rate),
                fmt.count(kept.select),
                fmt.count(kept.test),
            )
            for kept in run.selection.tasks
        ),
        note="Only problems that the model answers are kept: without a right answer, "
        "nothing can be removed."
        if all(kept.select + kept.test <= kept.correct for kept in run.selection.tasks)
        else "All pairs are kept, also those that the model does not answer.",
    )


def _split_size(pairs: Sequence[Pair], task: str, split: str) -> str:
    return fmt.count(sum(pair.task == task and pair.split == split for pair in pairs))


def _prefixes(run: Run) -> Table | None:
    if run.selection is None or not run.selection.prefixes:
        return None
    return Table(
        "Prefixes tried",
        columns("Prefix", "Accuracy", "Problems", code=["Prefix"]),
        tuple(
            row(
                json.dumps(prefix.text, ensure_ascii=False),
                fmt.accuracy(_with_interval(prefix)),
                fmt.count(prefix.n),
                strong=prefix.chosen,
            )
            for prefix in run.selection.prefixes
        ),
        note=run.selection.answer_policy,
    )


def _with_interval(prefix: Prefix) -> Estimate:
    """The accuracy with a Wilson interval where the run gives none."""
    rate = prefix.accuracy
    if rate.has_interval or prefix.n == 0:
        return rate
    wilson = proportion(round(rate.value * prefix.n), prefix.n)
    return Estimate(rate.value, wilson.low, wilson.high)


def _ranking(run: Run, measured: Measured) -> Table:
    circuit = run.circuit
    first_sweep = measured.effects.get(circuit.metric, {})
    floors = measured.noise.get(circuit.metric, {})
    rows = []
    for rank, part in enumerate(circuit.components[:_RANKS_SHOWN], start=1):
        alone, floor = first_sweep.get(part.id), floors.get(part.id)
        cells = [
            str(rank),
            part.id,
            MISSING if part.round is None else str(part.round),
            fmt.effect(circuit.metric, part.effect),
            fmt.effect(circuit.metric, alone) if alone else MISSING,
        ]
        if floors:
            cells.append(MISSING if floor is None else fmt.noise(circuit.metric, floor))
        rows.append(row(*cells))
    labels = ["Rank", "Component", "Round", "Effect when chosen", "In the first sweep"]
    labels += ["Noise floor"] if floors else []
    note = _unit_note(circuit, circuit.metric)
    if any(part.round is not None for part in circuit.components):
        note += (
            " Stronger when chosen than in the first sweep: a backup of what was removed before."
        )
    note += _cut_note(len(circuit.components))
    return Table("Circuit", columns(*labels, code=["Component"]), tuple(rows), note)


def _single_pass(circuit: Circuit) -> Table | None:
    ranking = circuit.single_pass
    if ranking is None:
        return None
    rows = [
        row(str(rank), part.id, fmt.effect(ranking.metric, part.effect))
        for rank, part in enumerate(ranking.components[:_RANKS_SHOWN], start=1)
    ]
    note = _unit_note(circuit, ranking.metric)
    if ranking.key_cut is not None and ranking.key_heads is not None:
        cut = fmt.number(ranking.key_cut * 100, 0)
        note += f" Below the cut of {cut} %: {ranking.key_heads} heads."
    note += _cut_note(len(ranking.components))
    heads = columns("Rank", "Component", "Effect", code=["Component"])
    return Table("Single-pass ranking", heads, tuple(rows), note)


def _unit_note(circuit: Circuit, metric: str) -> str:
    unit, floor = fmt.unit_of(metric), circuit.noise.get(metric)
    noise = "" if floor is None else f"; noise floor {fmt.noise(metric, floor)}"
    return f"Effects: {unit.name}, {unit.axis}{noise}."


def _cut_note(count: int) -> str:
    return f" The first {_RANKS_SHOWN} of {count}." if count > _RANKS_SHOWN else ""


def _knockout(curves: Knockouts, task: str) -> Table | None:
    own = [curve for curve in curves.curves if curve.task == task]
    if not own:
        return None
    sizes = sorted({point.k for curve in own for point in curve.points})
    rows = []
    for k in sizes:
        points = [curve.at(k) for curve in own]
        rows.append(row(str(k), *(fmt.accuracy(p.accuracy) if p else MISSING for p in points)))
    labels = [fmt.set_name(curve.kind) for curve in own]
    title = f"Accuracy on {fmt.task_name(task)} by number of components removed"
    return Table(title, columns("Removed", *labels), tuple(rows))


def _other_tasks(curves: Knockouts, task: str) -> Table | None:
    tops = [curve for name in curves.tasks if name != task if (curve := curves.curve("top", name))]
    if not tops:
        return None
    sizes = sorted({point.k for curve in tops for point in curve.points})
    rows = []
    for k in sizes:
        points = [curve.at(k) for curve in tops]
        rows.append(row(str(k), *(fmt.accuracy(p.accuracy) if p else MISSING for p in points)))
    labels = [fmt.task_name(curve.task) for curve in tops]
    title = f"The circuit of {fmt.task_name(task)} removed from other tasks"
    return Table(title, columns("Removed", *labels), tuple(rows))


def _tuning(run: Run) -> Table | None:
    if run.tuning is None and run.evaluations is None:
        return None
    tuned = {variant.name: variant for variant in run.tuning.variants} if run.tuning else {}
    records = run.evaluations or ()
    tasks = list(dict.fromkeys(r.task for r in records if r.metric == "exact_match"))
    mlps = any(name.startswith("mlp.") for own in tuned.values() for name in own.components)
    size = "Components" if mlps else "Heads"
    labels = ["Variant", size, "Parameters", *(fmt.task_name(task) for task in tasks)]
    primary = primary_task(records, run.circuit.task)
    extras = _extra_columns(records, primary)
    rows: list[Row] = []
    for name in variant_order(run):
        cells = [name, *_trained(tuned.get(name), run.manifest.model.parameters)]
        own = [record for record in records if record.variant == name]
        cells += [_measured(own, "exact_match", task) for task in tasks]
        cells += [find(own) for find in extras.values()]
        seconds = tuned[name].seconds if name in tuned else None
        cells.append(MISSING if seconds is None else fmt.duration(seconds))
        rows.append(row(*cells, strong=name == "precise"))
    note = f"{run.tuning.rule} " if run.tuning and run.tuning.rule else ""
    if tasks:
        note += "Task columns: exact match; gain: exact match against base"
        note += f" on {fmt.task_name(primary)}." if primary else "."
    heads = columns(*labels, *extras, "Time", left=["Variant"])
    return Table("Variants", heads, tuple(rows), note.strip())


def variant_order(run: Run) -> tuple[str, ...]:
    """Base, random, precise, then all others as they come."""
    tuned = [variant.name for variant in run.tuning.variants] if run.tuning else []
    names = dict.fromkeys([*tuned, *(record.variant for record in run.evaluations or ())])
    known = [name for name in _VARIANTS if name in names]
    return (*known, *(name for name in names if name not in _VARIANTS))


def _trained(variant: TunedVariant | None, total: int) -> tuple[str | Cell, str | Cell]:
    if variant is None:
        return MISSING, MISSING
    share = fmt.percent(Estimate(variant.share)) if total else Cell("")
    picked = str(len(variant.components)) if variant.components else MISSING
    return picked, Cell(fmt.short_count(variant.parameters), str(share))


def _extra_columns(
    records: Sequence[Evaluation], primary: str | None
) -> Mapping[str, Callable[[Sequence[Evaluation]], Cell]]:
    wanted = {
        "Gain": ("exact_match_gain", primary),
        "Perplexity change": ("perplexity_change", None),
        "KL, nats": ("kl", None),
    }
    measured = {record.metric for record in records}
    return {
        label: partial(_measured, metric=metric, task=task)
        for label, (metric, task) in wanted.items()
        if metric in measured
    }


def _measured(records: Sequence[Evaluation], metric: str, task: str | None) -> Cell:
    """The first record of `metric` on `task`, on any task where that is None."""
    found = (r for r in records if r.metric == metric and task in (None, r.task))
    record = next(found, None)
    return Cell(MISSING) if record is None else evaluation_cell(record)


def evaluation_cell(record: Evaluation) -> Cell:
    """The number of a record in the unit of its metric."""
    metric, difference = record.metric, " - " in record.variant
    if metric.startswith("exact_match"):
        signed = difference or metric.endswith("_gain")
        return fmt.points(record.estimate) if signed else fmt.accuracy(record.estimate)
    if metric == "perplexity_change":
        return fmt.percent(record.estimate, signed=True)
    return fmt.plain(record.estimate, signed=difference, digits=4 if metric == "kl" else None)


def measurements(records: Sequence[Evaluation]) -> Table | None:
    """Every record as it is, None where there is none."""
    if not records:
        return None
    rows = [
        row(
            fmt.task_name(r.task),
            r.variant,
            r.metric.replace("_", " "),
            evaluation_cell(r),
            fmt.count(r.n),
        )
        for r in records
    ]
    words = ["Task", "Variant", "Metric"]
    return Table("All measurements", columns(*words, "Value", "Examples", left=words), tuple(rows))


def _steps(run: Run) -> tuple[Step, ...]:
    there = {
        "validate": run.knockout is not None,
        # Without a head there is nothing to explain.
        "explain": run.explanation is not None
        or not any(c.is_head for c in run.circuit.components),
        "tune": run.tuning is not None,
        "evaluate": run.evaluations is not None,
    }
    return tuple(
        Step(stage, stage_command(stage, run.path), gives)
        for stage, gives in _STAGES.items()
        if not there[stage]
    )
