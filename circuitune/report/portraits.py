"""The charts of an explanation: attention by role, the logit lens, the MLPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.figures import INK, OPPOSES, SUPPORTS, finished, whiskers
from circuitune.report.findings import Explanation, LensPoint, Look, MlpFact

_GREY = "128,136,148"


@dataclass(frozen=True)
class _Line:
    colour: str  # "red,green,blue"
    dash: str


_TOKENS = {
    "answer": _Line("213,94,0", "solid"),
    "operand 1": _Line("42,133,200", "solid"),
    "operand 2": _Line("0,158,115", "dash"),
    "answer - 1": _Line("140,90,190", "dot"),
    "answer + 1": _Line("148,120,60", "dashdot"),
    "other": _Line(_GREY, "dot"),
}
_OTHER = _Line("204,121,167", "dashdot")
_COSINES = {"input": "cosine of the input", "output": "cosine of the output"}


# ----------------------------------------------------------------------------------- attention


def attention_chart(found: Explanation) -> go.Figure | None:
    """Attention weight of each key head, one panel a role, against all heads and equal attention.

    None where attention was not measured.
    """
    key = [look for look in found.attention if look.kind == "key"]
    if not key:
        return None
    roles = list(dict.fromkeys(look.role for look in key))
    heads = list(dict.fromkeys(look.component for look in key))
    figure = make_subplots(
        cols=len(roles),
        shared_yaxes=True,
        horizontal_spacing=0.018,
        subplot_titles=[escape(role) for role in roles],
    )
    for panel, role in enumerate(roles, start=1):
        own = [look for look in found.attention if look.role == role]
        average = next((look for look in own if look.kind == "all"), None)
        for trace in _references(own[0].uniform, average, len(heads), named=panel == 1):
            figure.add_trace(trace, 1, panel)
        shown = [look for look in own if look.kind == "key"]
        figure.add_trace(_weights(shown, heads, named=panel == 1), 1, panel)
    figure.update_xaxes(range=[-4, 104], tickvals=[0, 50, 100], zeroline=False)
    figure.update_xaxes(title_text="attention, %", col=1)
    figure.update_yaxes(
        range=[len(heads) - 0.4, -0.6],
        tickvals=list(range(len(heads))),
        ticktext=heads,
        showgrid=True,
        zeroline=False,
    )
    tall = 34 * len(heads) + 30
    figure = finished(figure, height=tall + 120, top=66)
    return figure.update_layout(legend={"y": 1 + 30 / tall})  # above the titles


def _weights(looks: Sequence[Look], heads: Sequence[str], *, named: bool) -> go.Scatter:
    scaled = [look.weight.scaled(100.0) for look in looks]
    return go.Scatter(
        x=[_round(weight.value) for weight in scaled],
        y=[heads.index(look.component) for look in looks],
        error_x=_rounded(whiskers(scaled, SUPPORTS)),
        mode="markers",
        name="key head",
        showlegend=named,
        marker={"color": f"rgb({SUPPORTS})", "size": 9},
        text=[
            f"<b>{look.component}</b> to {escape(look.role)}<br>{fmt.percent(look.weight)}"
            for look in looks
        ],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def _references(
    uniform: float, average: Look | None, rows: int, *, named: bool
) -> list[go.Scatter]:
    """Upright lines through a panel: the mean over all heads (with its interval), and equality."""
    ends = [-0.6, rows - 0.4]
    found = []
    if average is not None:
        mean = average.weight.scaled(100.0)
        text = f"mean of all heads<br>{fmt.percent(average.weight)}"
        if mean.low is not None and mean.high is not None:
            found.append(
                go.Scatter(
                    x=[_round(x) for x in (mean.low, mean.low, mean.high, mean.high)],
                    y=[*ends, *reversed(ends)],
                    fill="toself",
                    mode="none",
                    fillcolor=f"rgba({OPPOSES},0.2)",
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        found.append(_upright(mean.value, ends, f"rgb({OPPOSES})", "solid", "mean of all heads"))
        found[-1].update(text=text, hovertemplate="%{text}<extra></extra>", showlegend=named)
    name = "equal attention to all tokens"
    text = f"{name}<br>{fmt.percent(Estimate(uniform))}"
    found.append(_upright(100 * uniform, ends, f"rgb({_GREY})", "dot", name))
    found[-1].update(text=text, hovertemplate="%{text}<extra></extra>", showlegend=named)
    return found


def _upright(x: float, ends: list[float], colour: str, dash: str, name: str) -> go.Scatter:
    line = {"color": colour, "dash": dash, "width": 1.6}
    return go.Scatter(x=[_round(x)] * 2, y=ends, mode="lines", line=line, name=name)


# ----------------------------------------------------------------------------------------- lens


def lens_chart(found: Explanation) -> go.Figure | None:
    """Probability and rank of the answer, operands and neighbours after each layer, with bands.

    None without a lens.
    """
    if not found.lens:
        return None
    kinds = list(dict.fromkeys(point.token for point in found.lens))
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.075,
        subplot_titles=["probability, %", "rank among all tokens"],
    )
    for kind in reversed(kinds):
        own = sorted((p for p in found.lens if p.token == kind), key=lambda point: point.layer)
        layers = [point.layer for point in own]
        chances = [point.probability.scaled(100.0) for point in own]
        text = [_lens_hover(point) for point in own]
        for panel, values in enumerate((chances, [point.rank for point in own]), start=1):
            for trace in _banded(layers, values, kind, text):
                figure.add_trace(
                    trace.update(showlegend=trace.mode != "none" and panel == 1), 1, panel
                )
    figure.update_annotations(yshift=36)  # above the names of the turns
    _turning(figure, found.rise)
    figure.update_xaxes(title_text="after layer", showgrid=False, zeroline=False)
    figure.update_yaxes(rangemode="tozero", zeroline=False, col=1)
    figure.update_yaxes(type="log", autorange="reversed", dtick=1, zeroline=False, col=2)
    figure.update_layout(legend_traceorder="reversed")
    figure = finished(figure, height=420, top=104)
    return figure.update_layout(legend={"y": 1.23})


def _lens_hover(point: LensPoint) -> str:
    return (
        f"<b>{escape(point.token)}</b> after layer {point.layer}<br>"
        f"probability {fmt.percent(point.probability)}<br>rank {fmt.plain(point.rank, digits=1)}"
    )


def _banded(
    layers: Sequence[int], values: Sequence[Estimate], kind: str, text: Sequence[str]
) -> tuple[go.Scatter, go.Scatter]:
    """Band and line of one kind of token."""
    style = _TOKENS.get(kind, _OTHER)
    known = [(x, v) for x, v in zip(layers, values, strict=True) if v.has_interval]
    edge = [(x, v.high) for x, v in known] + [(x, v.low) for x, v in reversed(known)]
    band = go.Scatter(
        x=[x for x, _ in edge],
        y=[_round(end or 0.0) for _, end in edge],
        fill="toself",
        mode="none",
        fillcolor=f"rgba({style.colour},0.13)",
        legendgroup=kind,
        hoverinfo="skip",
    )
    line = go.Scatter(
        x=list(layers),
        y=[_round(value.value) for value in values],
        mode="lines",
        name=escape(kind.replace(" - ", " \u2212 ")),
        legendgroup=kind,
        line={
            "color": f"rgb({style.colour})",
            "dash": style.dash,
            "width": 2.6 if kind == "answer" else 1.7,
        },
        text=list(text),
        hovertemplate="%{text}<extra></extra>",
    )
    return band, line


def _turning(figure: go.Figure, rise: Mapping[str, Estimate]) -> None:
    """Upright lines where the answer starts to rise, rises most and has risen; their names."""
    anchors = {"start": ("right", 1.0), "inflection": ("center", 1.06), "end": ("left", 1.0)}
    for name, layer in rise.items():
        for panel in (1, 2):
            figure.add_vline(
                x=layer.value,
                line={"color": INK, "width": 1, "dash": "dot"},
                opacity=0.55,
                layer="below",
                row=1,
                col=panel,
            )
        anchor, y = anchors.get(name, ("center", 1.0))
        figure.add_annotation(
            x=layer.value,
            y=y,
            xref="x",
            yref="paper",
            text=escape(name),
            showarrow=False,
            xanchor=anchor,
            yanchor="bottom",
        )


# ----------------------------------------------------------------------------------------- MLPs


def mlp_chart(found: Explanation) -> go.Figure | None:
    """Direct effect of each MLP, and cosines of its input and output with unembedding rows.

    None where nothing of them was measured.
    """
    effects = [fact for fact in found.mlps if fact.measure == "effect"]
    cosines = {m: [fact for fact in found.mlps if fact.measure == m] for m in _COSINES}
    cosines = {measure: facts for measure, facts in cosines.items() if facts}
    if not effects and not cosines:
        return None
    titles = ["direct effect, logits"] * bool(effects) + [_COSINES[name] for name in cosines]
    figure = make_subplots(cols=len(titles), horizontal_spacing=0.06, subplot_titles=titles)
    if effects:
        figure.add_trace(_bars(effects), 1, 1)
    named: set[str] = set()
    for panel, facts in enumerate(cosines.values(), start=1 + bool(effects)):
        for kind in reversed(list(dict.fromkeys(fact.token for fact in facts))):
            own = sorted((f for f in facts if f.token == kind), key=lambda fact: fact.layer)
            text = [_cosine_hover(fact) for fact in own]
            layers, values = [fact.layer for fact in own], [fact.value for fact in own]
            for trace in _banded(layers, values, kind, text):
                shown = trace.mode != "none" and kind not in named
                figure.add_trace(trace.update(showlegend=shown), 1, panel)
            named.add(kind)
    figure.update_xaxes(title_text="layer", showgrid=False, zeroline=False)
    figure.update_yaxes(zeroline=True)
    figure.update_layout(legend_traceorder="reversed")
    figure = finished(figure, height=330, top=74)
    return figure.update_layout(legend={"y": 1.16})


def _bars(effects: Sequence[MlpFact]) -> go.Bar:
    values = [fact.value for fact in effects]
    colours = [SUPPORTS if value.value < 0 else OPPOSES for value in values]
    return go.Bar(
        x=[fact.layer for fact in effects],
        y=[_round(value.value) for value in values],
        error_y=_rounded(whiskers(values, _GREY)),
        marker={"color": [f"rgba({colour},0.7)" for colour in colours], "line": {"width": 0}},
        hovertext=[
            f"<b>mlp.{fact.layer}</b><br>{fmt.effect_in_words('logit_diff', fact.value)}"
            for fact in effects
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )


def _cosine_hover(fact: MlpFact) -> str:
    cosine = fmt.plain(fact.value, digits=3)
    return f"<b>mlp.{fact.layer}</b>, {fact.measure}<br>cosine with {escape(fact.token)}: {cosine}"


# ------------------------------------------------------------------------------------------ size


def _round(value: float) -> float:
    """Five digits, finer than a pixel: keeps the page small."""
    return float(f"{value:.5g}")


def _rounded(bars: dict) -> dict:
    return bars | {side: [_round(end) for end in bars[side]] for side in ("array", "arrayminus")}
