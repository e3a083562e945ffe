"""The page: one HTML file that needs nothing else, not even a network."""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from circuitune.errors import UserError
from circuitune.report import drawing, feeds, figures, portraits, reach_figures, summary
from circuitune.report import format as fmt
from circuitune.report.measures import Measured
from circuitune.report.records import Pair, Run
from circuitune.report.summary import Summary

_ABLATIONS = {
    "mean": "its mean output over other prompts",
    "zero": "zero",
    "resample": "its output on another prompt",
}
_TOLD = ("proposals", "curve")
_PLACES = {"end": "at the last position", "all": "at every position"}


@dataclass(frozen=True)
class ExamplePair:
    """A pair of prompts cut into spans; a marked span differs between the two."""

    clean: tuple[tuple[str, bool], ...]
    corrupt: tuple[tuple[str, bool], ...]
    answer: str


def page(run: Run, measured: Measured, told: Summary) -> str:
    """The whole HTML page; the same run gives the same text, byte for byte."""
    environment = Environment(
        loader=PackageLoader("circuitune.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = _tied
    style, script = (
        Markup(environment.loader.get_source(environment, name)[0])
        for name in ("page.css", "page.js")
    )
    curves = measured.knockouts
    ablation = (curves.ablation, curves.where) if curves else ("mean", "end")
    return environment.get_template("template.html.j2").render(
        run=run,
        told=told,
        task=fmt.task_name(run.circuit.task),
        example=example_pair(run),
        plots={name: _embedded(chart) for name, chart in _charts(run, measured, told).items()},
        steps={step.stage: step for step in told.steps},
        feeds_caption=feeds.caption(run.circuit.feeds) if run.circuit.feeds else "",
        kinds={curve.kind for curve in curves.curves} if curves else set(),
        turns=_turns(run),
        noise=_noise(run),
        rule=_rule(run),
        iterated=any(part.round is not None for part in run.circuit.components),
        mlps=run.effects["component"].str.startswith("mlp.").any(),
        replaced=_ABLATIONS.get(ablation[0], ablation[0]),
        place=_PLACES.get(ablation[1], ablation[1]),
        duration=fmt.duration,
        style=style,
        script=script,
        plotly=Markup(get_plotlyjs()),
    )


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either the old file or the whole new one.

    Raises:
        UserError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} must be writable, but writing failed ({error}); "
            "free some space or correct the permissions, then run the command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def example_pair(run: Run) -> ExamplePair:
    """The first pair of the circuit's task, or the first of all."""
    own = [pair for pair in run.pairs if pair.task == run.circuit.task]
    pair: Pair = (own or run.pairs)[0]
    matcher = difflib.SequenceMatcher(None, pair.clean, pair.corrupt, autojunk=False)
    clean, corrupt = [], []
    for tag, from_clean, to_clean, from_corrupt, to_corrupt in matcher.get_opcodes():
        clean.append((pair.clean[from_clean:to_clean], tag != "equal"))
        corrupt.append((pair.corrupt[from_corrupt:to_corrupt], tag != "equal"))
    return ExamplePair(tuple(clean), tuple(corrupt), pair.answer)


def _charts(run: Run, measured: Measured, told: Summary) -> dict[str, go.Figure]:
    task, curves = run.circuit.task, measured.knockouts
    charts: dict[str, go.Figure | None] = {
        "effects": figures.effect_map(
            run.manifest.model, run.circuit, measured.effects, measured.noise
        )
    }
    if run.circuit.feeds:
        charts["feeds"] = drawing.feeds_chart(run.circuit.feeds)
    if run.explanation:
        charts["attention"] = portraits.attention_chart(run.explanation)
        charts["lens"] = portraits.lens_chart(run.explanation)
        charts["mlps"] = portraits.mlp_chart(run.explanation)
    if curves and told.knockout:
        charts["knockout"] = figures.knockout_chart(curves, task)
    if curves:
        charts["others"] = figures.other_tasks_chart(curves, task)
    if run.circuit.joint and told.enough:
        charts["proposals"] = reach_figures.proposals_chart(run.circuit.joint, told.enough.sets)
    if run.transfer:
        charts["reach"] = reach_figures.matrix_chart(run.transfer, measured.reach)
    if run.evaluations:
        variants = [name for name in summary.variant_order(run) if " - " not in name]
        charts["tuning"] = figures.tuning_chart(run.evaluations, variants)
    return {name: chart for name, chart in charts.items() if chart is not None}


def _noise(run: Run) -> str:
    """The noise floor of the circuit's metric in words, empty where it was not measured."""
    metric = run.circuit.metric
    floor = run.circuit.noise.get(metric)
    return "" if floor is None else fmt.noise_in_words(metric, floor)


def _rule(run: Run) -> dict[str, str]:
    """The rule of the circuit in words; what it proposed has a section of its own."""
    own = {name: value for name, value in run.circuit.rule.items() if name not in _TOLD}
    return {name.replace("_", " "): _flat(value) for name, value in own.items()}


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(own)}" for name, own in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def _turns(run: Run) -> str:
    """Where the answer starts to rise, rises most and has risen, with intervals over layers."""
    rise = run.explanation.rise if run.explanation else {}
    return ", ".join(f"{name} {fmt.plain(layer, digits=0)}" for name, layer in rise.items())


def _embedded(chart: go.Figure) -> Markup:
    """The figure as JSON that no text inside can end: every `<` is escaped."""
    plain = json.dumps(json.loads(chart.to_json()), separators=(",", ":"))
    return Markup(plain.replace("<", "\\u003c"))


def _tied(text: object) -> str:
    """Keep a number, its unit and its interval on one line."""
    return re.sub(r" (?=%|pts|logits|\[)|(?<=,) (?=[^\[\]]*\])", "\u00a0", str(text))
