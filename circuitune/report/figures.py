"""The charts of a report, as plotly figures.

Backgrounds are transparent and text, axes and grid take their colours from the page's style
sheet, so one figure serves the light and the dark page. The series colours are those of Okabe and
Ito, told apart with every common colour vision; dashes and symbols repeat the distinction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.fields import COMPONENT
from circuitune.report.measures import Curve, Knockouts
from circuitune.report.records import Circuit, Evaluation, ModelCard

_FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
INK = "#7b828c"  # where the style sheet is not applied, legible on white and on black
_GRID = "rgba(128,136,148,0.22)"
SUPPORTS, OPPOSES = "217,98,8", "32,126,196"


@dataclass(frozen=True)
class _Style:
    colour: str  # "red,green,blue"
    dash: str
    symbol: str


_STYLES = {
    "top": _Style("213,94,0", "solid", "circle"),
    "single_pass": _Style("0,158,115", "dash", "diamond"),
    "matched": _Style("42,133,200", "solid", "square"),
    "random": _Style("128,136,148", "dot", "triangle-up"),
    "least": _Style("148,120,60", "dot", "triangle-down"),
    "other_task": _Style("140,90,190", "dash", "cross"),
    "own_circuit": _Style("140,90,190", "solid", "x"),
    "precise": _Style("213,94,0", "solid", "circle"),
    "base": _Style("128,136,148", "solid", "diamond"),
    "full": _Style("58,90,152", "solid", "star"),
    "lora": _Style("0,158,115", "solid", "triangle-up"),
    "lora_heads": _Style("0,158,115", "solid", "triangle-down"),
    "layers": _Style("148,120,60", "solid", "cross"),
}
_OTHER = _Style("204,121,167", "dashdot", "x")


def effect_map(
    model: ModelCard,
    circuit: Circuit,
    effects: Mapping[str, Mapping[str, Estimate]],
    noise: Mapping[str, Mapping[str, float]],
) -> go.Figure:
    """Mean effect of every head (layer by head) and, on its own axis below, of every MLP.

    The chosen components carry their rank. Colour is centred on 0: orange supports the answer,
    blue opposes it.

    Args:
        model: The shape of the model.
        circuit: The chosen components; its metric is the one that is drawn.
        effects: Metric -> component -> mean effect; see `mean_effects`.
        noise: Metric -> component -> what rounding alone does to it; may be empty.
    """
    metric = circuit.metric if circuit.metric in effects else next(iter(effects))
    drawn, unit = effects[metric], fmt.unit_of(metric)
    ranks = {part.id: rank for rank, part in enumerate(circuit.components, start=1)}
    mlps = {name: value for name, value in drawn.items() if name.startswith("mlp.")}
    hovers = {name: _hover(name, ranks.get(name), effects, noise) for name in drawn}
    tile = min(30, max(14, ceil(420 / model.heads)))
    tall = tile * model.heads
    strip = 110 if mlps else 0
    gap = 34 if mlps else 0
    figure = make_subplots(
        rows=2 if mlps else 1,
        shared_xaxes=True,
        row_heights=[tall, strip] if mlps else None,
        vertical_spacing=gap / (tall + strip + gap),
    )
    figure.add_trace(_heat(model, drawn, unit, hovers), 1, 1)
    figure.update_traces(colorbar={"len": tall / (tall + gap + strip)}, row=1, col=1)
    _add_ranks(figure, ranks)
    if mlps:
        figure.add_trace(_mlp_bars(mlps, unit, hovers, ranks), 2, 1)
        figure.update_yaxes(title_text="MLP", showgrid=True, zeroline=True, row=2, col=1)
    figure.update_xaxes(showgrid=False, zeroline=False, dtick=1 if model.layers <= 40 else 5)
    figure.update_xaxes(title_text="layer", row=2 if mlps else 1, col=1)
    figure.update_xaxes(range=[-0.5, model.layers - 0.5])
    figure.update_yaxes(
        title_text="head",
        range=[model.heads - 0.5, -0.5],
        dtick=1 if model.heads <= 16 else 4,
        showgrid=False,
        zeroline=False,
        row=1,
        col=1,
    )
    return finished(figure, height=tall + strip + gap + 70, top=10)


def knockout_chart(curves: Knockouts, task: str) -> go.Figure:
    """Accuracy on `task` in percent against the number of components removed, one line a set."""
    figure = go.Figure()
    for curve in reversed(curves.curves):
        if curve.task == task:
            figure.add_traces(_curve_traces(curve))
    _accuracy_axes(figure, curves)
    figure.update_layout(legend_traceorder="reversed")
    figure.update_xaxes(title_text="components removed")
    figure.update_yaxes(title_text=f"accuracy on {escape(fmt.task_name(task))}, %")
    return finished(figure, height=400, top=44)


def other_tasks_chart(curves: Knockouts, task: str) -> go.Figure | None:
    """The same sets on every other task, one small panel each; None where there is no other."""
    others = [name for name in curves.tasks if name != task]
    if not others:
        return None
    wide = min(4, len(others))
    high = ceil(len(others) / wide)
    figure = make_subplots(
        rows=high,
        cols=wide,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.28 / high,
        subplot_titles=[escape(fmt.task_name(name)) for name in others],
    )
    for place, name in enumerate(others):
        spot = (place // wide + 1, place % wide + 1)
        for curve in reversed(curves.curves):
            if curve.task == name:
                for trace in _curve_traces(curve):
                    figure.add_trace(trace, *spot)
    _accuracy_axes(figure, curves)
    figure.update_xaxes(title_text="removed", row=high)
    figure.update_yaxes(title_text="accuracy, %", col=1)
    figure.update_traces(showlegend=False)
    return finished(figure, height=220 * high + 50, top=34)


def tuning_chart(records: Sequence[Evaluation], variants: Sequence[str]) -> go.Figure | None:
    """Exact match in percent by task and variant, with intervals; None where none was measured."""
    matched = [record for record in records if record.metric == "exact_match"]
    matched = [record for record in matched if record.variant in variants]
    if not matched:
        return None
    tasks = list(dict.fromkeys(record.task for record in matched))
    figure = go.Figure()
    step = min(0.2, 0.8 / len(variants))
    shifts = {name: step * (place - (len(variants) - 1) / 2) for place, name in enumerate(variants)}
    for name in variants:
        own = [record for record in matched if record.variant == name]
        scaled = [record.estimate.scaled(100.0) for record in own]
        style = _STYLES["matched"] if name == "random" else _STYLES.get(name, _OTHER)
        figure.add_trace(
            go.Scatter(
                x=[estimate.value for estimate in scaled],
                y=[tasks.index(record.task) + shifts[name] for record in own],
                error_x=whiskers(scaled, style.colour),
                mode="markers",
                name=escape(name),
                marker={"color": f"rgb({style.colour})", "symbol": style.symbol, "size": 10},
                text=[
                    f"{escape(fmt.task_name(r.task))}, {escape(name)}<br>{fmt.accuracy(r.estimate)}"
                    for r in own
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    figure.update_xaxes(range=[-2, 102], title_text="exact match, %", zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(tasks))),
        ticktext=[escape(fmt.task_name(task)) for task in tasks],
        range=[len(tasks) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return finished(figure, height=max(52, 16 * len(variants)) * len(tasks) + 100, top=44)


def _heat(
    model: ModelCard, drawn: Mapping[str, Estimate], unit: fmt.Unit, hovers: Mapping[str, str]
) -> go.Heatmap:
    ids = [[f"{layer}.{head}" for layer in range(model.layers)] for head in range(model.heads)]
    values = [[drawn[i].value * unit.factor if i in drawn else None for i in line] for line in ids]
    limit = max((abs(v) for line in values for v in line if v is not None), default=0.0) or 1.0
    # One hue each side, fading out at 0, so that the page itself is the neutral colour.
    fade = ((1.0, 1.0), (0.5, 0.6), (0.0, 0.06))
    scale = [(0.5 - 0.5 * at, f"rgba({SUPPORTS},{alpha})") for at, alpha in fade]
    scale += [(0.5 + 0.5 * at, f"rgba({OPPOSES},{alpha})") for at, alpha in reversed(fade)]
    return go.Heatmap(
        z=values,
        zmin=-limit,
        zmax=limit,
        colorscale=scale,
        xgap=1.5,
        ygap=1.5,
        text=[[hovers.get(name, f"{name}<br>not measured") for name in line] for line in ids],
        hovertemplate="%{text}<extra></extra>",
        colorbar={
            "title": {
                "text": escape(unit.axis),
                "side": "right",
                "font": {"size": 13},
            },
            "thickness": 10,
            "outlinewidth": 0,
            "x": 1.01,
            "y": 1.0,
            "yanchor": "top",
            "nticks": 5,
        },
    )


def _add_ranks(figure: go.Figure, ranks: Mapping[str, int]) -> None:
    """Outline the tiles of the chosen heads and write their ranks on them."""
    places = [
        (int(match["layer"]), int(match["head"]), str(rank))
        for name, rank in ranks.items()
        if (match := COMPONENT.fullmatch(name)) and match["head"]
    ]
    for layer, head, _ in places:
        corners = {"x0": layer - 0.47, "x1": layer + 0.47, "y0": head - 0.47, "y1": head + 0.47}
        figure.add_shape(type="rect", line={"color": INK, "width": 1.2}, **corners, row=1, col=1)
    numbers = go.Scatter(
        x=[layer for layer, _, _ in places],
        y=[head for _, head, _ in places],
        text=[rank for _, _, rank in places],
        mode="text",
        textfont={"size": 12, "weight": 700},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    figure.add_trace(numbers, 1, 1)


def _mlp_bars(
    mlps: Mapping[str, Estimate],
    unit: fmt.Unit,
    hovers: Mapping[str, str],
    ranks: Mapping[str, int],
) -> go.Bar:
    names = sorted(mlps, key=_mlp_layer)
    scaled = [mlps[name].scaled(unit.factor) for name in names]
    colours = [SUPPORTS if estimate.value < 0 else OPPOSES for estimate in scaled]
    return go.Bar(
        x=[_mlp_layer(name) for name in names],
        y=[estimate.value for estimate in scaled],
        error_y=whiskers(scaled, _STYLES["base"].colour),
        marker={"color": [f"rgba({colour},0.7)" for colour in colours], "line": {"width": 0}},
        hovertext=[hovers[name] for name in names],
        hovertemplate="%{hovertext}<extra></extra>",
        text=[str(ranks.get(name, "")) for name in names],
        textposition="outside",
        textfont={"size": 12, "weight": 700},
        showlegend=False,
    )


def _mlp_layer(name: str) -> int:
    return int(name.removeprefix("mlp."))


def _hover(
    name: str,
    rank: int | None,
    effects: Mapping[str, Mapping[str, Estimate]],
    noise: Mapping[str, Mapping[str, float]],
) -> str:
    lines = [f"<b>{name}</b>" + (f", rank {rank}" if rank else "")]
    for metric, means in effects.items():
        if name in means:
            name_of_metric = escape(fmt.unit_of(metric).name)
            floor = noise.get(metric, {}).get(name)
            noisy = "" if floor is None else f", noise floor {fmt.noise(metric, floor)}"
            words = fmt.effect_in_words(metric, means[name])
            lines.append(f"{name_of_metric}: {escape(words)}{escape(noisy)}")
    return "<br>".join(lines)


def _curve_traces(curve: Curve) -> tuple[go.Scatter, ...]:
    """Band, single draws and line of one curve, back to front; the circuit is drawn last."""
    style = _STYLES.get(curve.kind, _OTHER)
    drawn = any(point.draws for point in curve.points)
    # Intervals over draws and over examples are not joined to one band.
    banded = [p for p in curve.points if p.accuracy.has_interval and bool(p.draws) == drawn]
    edge = [(p.k, p.accuracy.high) for p in banded]
    edge += [(p.k, p.accuracy.low) for p in reversed(banded)]
    singles = [(point.k, draw) for point in curve.points for draw in point.draws]
    common = {"legendgroup": curve.kind, "hoverinfo": "skip", "showlegend": False}
    band = go.Scatter(
        x=[k for k, _ in edge],
        y=[100 * (end or 0.0) for _, end in edge],
        fill="toself",
        mode="none",
        fillcolor=f"rgba({style.colour},0.16)",
        **common,
    )
    dots = go.Scatter(
        x=[k for k, _ in singles],
        y=[100 * draw for _, draw in singles],
        mode="markers",
        marker={"color": f"rgba({style.colour},0.4)", "size": 4},
        **common,
    )
    line = go.Scatter(
        x=[point.k for point in curve.points],
        y=[100 * point.accuracy.value for point in curve.points],
        mode="lines+markers",
        name=escape(fmt.set_name(curve.kind)),
        legendgroup=curve.kind,
        line={"color": f"rgb({style.colour})", "dash": style.dash, "width": 2.2},
        marker={"symbol": style.symbol, "size": 7},
        text=[_point_hover(curve, place) for place in range(len(curve.points))],
        hovertemplate="%{text}<extra></extra>",
    )
    return band, dots, line


def _point_hover(curve: Curve, place: int) -> str:
    point = curve.points[place]
    lines = [
        f"<b>{escape(fmt.set_name(curve.kind))}</b>, {point.k} removed",
        f"{fmt.accuracy(point.accuracy)} of {point.n} answers survive",
    ]
    if point.draws:
        lines.append(f"mean of {len(point.draws)} draws")
    if point.logit_diff is not None:
        lines.append(f"logit difference {fmt.number(point.logit_diff, 2)}")
    return "<br>".join(lines)


def whiskers(estimates: Sequence[Estimate], colour: str) -> dict[str, object]:
    """Error bars to the ends of the intervals, none where there is none; `colour` as "r,g,b"."""
    ends = [(e.low, e.high) if e.has_interval else (e.value, e.value) for e in estimates]
    pairs = list(zip(estimates, ends, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, (high or 0.0) - e.value) for e, (_, high) in pairs],
        "arrayminus": [max(0.0, e.value - (low or 0.0)) for e, (low, _) in pairs],
        "color": f"rgba({colour},0.75)",
        "thickness": 1.4,
        "width": 0,
    }


def _accuracy_axes(figure: go.Figure, curves: Knockouts) -> None:
    largest = max(point.k for curve in curves.curves for point in curve.points)
    figure.update_yaxes(range=[-3, 103], dtick=25, zeroline=False)
    figure.update_xaxes(range=[-0.015 * largest, 1.015 * largest], showgrid=False, zeroline=False)


def finished(figure: go.Figure, *, height: int, top: int) -> go.Figure:
    """The figure in the style of the page; `height` and the margin at the `top` in pixels."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 8, "t": top, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "#20242b", "bordercolor": "#20242b", "font": {"color": "#f4f5f7"}},
        hovermode="closest",
        dragmode=False,
    )
    lines = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": _GRID, "ticks": ""}
    figure.update_xaxes(**lines, title_font_size=13, fixedrange=True)
    figure.update_yaxes(**lines, title_font_size=13, fixedrange=True, automargin=True)
    figure.update_annotations(font_size=14)
    return figure
