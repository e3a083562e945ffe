"""The graph of who feeds the key heads, drawn: one panel for each thing that may differ.

From left to right stand the positions, from bottom to top the depth: the tokens, the components
that feed, the key heads at END, the answer. Only measured effects are lines.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.fields import COMPONENT
from circuitune.report.figures import INK, OPPOSES, SUPPORTS, finished
from circuitune.report.records import EMBEDDING, FeedEdge, FeedEffect, Feeds

_END, _OTHER, _ANSWER = "end", "other", "answer"
_STEPS = 24  # points along a line
_ROW = 42  # pixels between two levels


@dataclass(frozen=True)
class _Spot:
    """A component (or the tokens, or the answer) at the positions of a role."""

    name: str
    role: str


@dataclass(frozen=True)
class _Point:
    """Where a spot is drawn, and on which side its name stands."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class _Line:
    """One measured effect between two spots."""

    start: _Spot
    stop: _Spot
    effect: FeedEffect
    text: str


def feeds_chart(feeds: Feeds) -> go.Figure | None:
    """The drawn graph; None without a single line."""
    panels = {name: list(_lines(feeds, name)) for name in feeds.contrasts}
    lines = [line for own in panels.values() for line in own]
    if not lines:
        return None
    levels = {key: place for place, key in enumerate(_levels(lines))}
    crowds = [_crowds(own) for own in panels.values()]
    roles = _roles(feeds, crowds)
    places = [_columns(roles, own) for own in crowds]
    largest = max(abs(line.effect.mean.value) for line in lines)
    figure = make_subplots(
        cols=len(panels),
        column_widths=[_extent(own) for own in places],
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[_title(feeds, name) for name in panels],
    )
    for panel, own in enumerate(panels.values(), start=1):
        columns = places[panel - 1]
        at = _layout(crowds[panel - 1], columns, levels)
        for line in sorted(own, key=lambda line: abs(line.effect.mean.value)):
            figure.add_trace(_drawn(line, at, largest), 1, panel)
        figure.add_traces(_marks(feeds, at), 1, panel)
        figure.update_xaxes(
            tickvals=list(columns.values()),
            ticktext=[escape(role).replace(" ", "<br>") for role in columns],
            range=[0.0, _extent(columns)],
            col=panel,
        )
    for trace in _legend():
        figure.add_trace(trace, 1, 1)
    figure.update_xaxes(showgrid=False, zeroline=False, tickangle=0, tickfont={"size": 11})
    figure.update_yaxes(
        range=[-0.6, len(levels) - 0.4], showgrid=False, zeroline=False, showticklabels=False
    )
    tall = _ROW * len(levels)
    figure = finished(figure, height=tall + 130, top=82)
    return figure.update_layout(legend={"y": 1 + 34 / tall})  # above the titles


def _title(feeds: Feeds, contrast: str) -> str:
    total = fmt.effect_in_words("logit_diff", Estimate(feeds.totals[contrast]))
    return f"{escape(contrast)} differs: {escape(total)}"


# ------------------------------------------------------------------------------ what is drawn


def _lines(feeds: Feeds, contrast: str) -> Iterator[_Line]:
    """The edges of one contrast, and the direct effects of the heads that bring it."""
    edges = [edge for edge in feeds.edges if edge.contrast == contrast]
    for edge in edges:
        start = _Spot(edge.sender, edge.role)
        yield _Line(start, _Spot(edge.head, edge.at or _END), edge.effect, _edge_text(edge))
    fed = {edge.head for edge in edges if edge.then is None}
    for node in feeds.nodes:
        brings = contrast in node.brings and not node.id.startswith("mlp.")
        if contrast in node.effects and (node.id in fed or brings):
            effect = node.effects[contrast]
            text = f"<b>{node.id}</b> at END \u2192 <b>answer</b><br>{_numbers(contrast, effect)}"
            yield _Line(_Spot(node.id, _END), _Spot(_ANSWER, _END), effect, text)


def _edge_text(edge: FeedEdge) -> str:
    sender = "tokens" if edge.sender == EMBEDDING else edge.sender
    into = edge.receiver if edge.then is None else f"{edge.receiver} \u2192 {edge.then}"
    where = escape(edge.role)
    return f"<b>{sender}</b> at {where} \u2192 <b>{into}</b><br>" + _numbers(
        edge.contrast, edge.effect
    )


def _numbers(contrast: str, effect: FeedEffect) -> str:
    words = fmt.effect_in_words("logit_diff", effect.mean)
    share = fmt.percent(Estimate(effect.share), digits=0)
    p = fmt.p_value(effect.p_adjusted)
    return f"{escape(contrast)} differs: {escape(words)}<br>share {share}, p = {p}"


# ------------------------------------------------------------------------------------- places


_Crowds = dict[tuple[str, tuple[int, int]], list[_Spot]]


def _crowds(lines: Sequence[_Line]) -> _Crowds:
    """The spots of a panel, by role and level."""
    found: _Crowds = defaultdict(list)
    for spot in dict.fromkeys(spot for line in lines for spot in (line.start, line.stop)):
        found[spot.role, _level(spot.name)].append(spot)
    return found


def _roles(feeds: Feeds, crowds: Sequence[_Crowds]) -> list[str]:
    """The roles that are drawn, in the order of reading, END last."""
    used = {role for own in crowds for role, _ in own} | {_END}
    used |= set(feeds.contrasts) & set(feeds.roles)
    known = [role for role in feeds.roles if role not in (_OTHER, _END)]
    order = [*known, *sorted(used - set(feeds.roles)), _OTHER, _END]
    return [role for role in dict.fromkeys(order) if role in used]


def _columns(roles: Sequence[str], crowds: _Crowds) -> dict[str, float]:
    """Where the roles stand in a panel; a column is as wide as its largest crowd needs."""
    found, edge = {}, 0.0
    for role in roles:
        most = max((len(spots) for (own, _), spots in crowds.items() if own == role), default=1)
        found[role] = edge + most / 2
        edge += most
    return found


def _extent(columns: Mapping[str, float]) -> float:
    """How wide a panel is: from the left edge past END, with room for a name."""
    return max(columns.values()) + 1.4


def _level(name: str) -> tuple[int, int]:
    """What lies above what: layers, in each the heads below the MLP."""
    match = COMPONENT.fullmatch(name)
    if match is None:
        return (-1, 0) if name == EMBEDDING else (10**9, 0)
    return (int(match["layer"] or match["mlp"] or 0), int(match["mlp"] is not None))


def _levels(lines: Sequence[_Line]) -> list[tuple[int, int]]:
    spots = {spot for line in lines for spot in (line.start, line.stop)}
    return sorted({_level(spot.name) for spot in spots})


def _layout(
    crowds: _Crowds, places: dict[str, float], levels: dict[tuple[int, int], int]
) -> dict[_Spot, _Point]:
    """Coordinates of every spot of a panel; those of one level and role stand side by side."""
    found = {}
    for (role, level), crowd in crowds.items():
        for place, spot in enumerate(sorted(crowd, key=lambda spot: spot.name)):
            shift = place - (len(crowd) - 1) / 2
            label = "middle left" if shift < 0 else "middle right"
            found[spot] = _Point(places[role] + shift, float(levels[level]), label)
    return found


# -------------------------------------------------------------------------------------- traces


def _drawn(line: _Line, at: dict[_Spot, _Point], largest: float) -> go.Scatter:
    """A curve that leaves and arrives upright; beside its column where it stays in one."""
    (x0, y0), (x1, y1) = ((point.x, point.y) for point in (at[line.start], at[line.stop]))
    bulge = 0.12 + 0.02 * (y1 - y0) if x0 == x1 and y1 - y0 > 1 else 0.0
    steps = [step / _STEPS for step in range(_STEPS + 1)]
    ease = [3 * t**2 - 2 * t**3 for t in steps]
    value = line.effect.mean.value
    colour = SUPPORTS if value < 0 else OPPOSES
    return go.Scatter(
        x=[x0 + (x1 - x0) * e + bulge * 4 * t * (1 - t) for t, e in zip(steps, ease, strict=True)],
        y=[y0 + (y1 - y0) * t for t in steps],
        mode="lines",
        line={"color": f"rgba({colour},0.62)", "width": 1.0 + 8.0 * (abs(value) / largest) ** 0.5},
        text=line.text,
        hovertemplate="%{text}<extra></extra>",
        hoverlabel={"namelength": 0},
        showlegend=False,
    )


@dataclass(frozen=True)
class _Look:
    """How one kind of spot is marked."""

    name: str
    symbol: str
    size: int
    fill: str


_LOOKS = {
    "tokens": _Look("tokens", "square", 10, INK),
    "head": _Look("head", "circle", 9, INK),
    "mlp": _Look("MLP", "diamond", 9, INK),
    "key": _Look("key head", "circle", 14, f"rgb({SUPPORTS})"),
    "answer": _Look("answer", "star", 13, INK),
}


def _kind(feeds: Feeds, name: str) -> str:
    if name in (EMBEDDING, _ANSWER):
        return "tokens" if name == EMBEDDING else "answer"
    node = feeds.node(name)
    if node is not None and node.key:
        return "key"
    return "mlp" if name.startswith("mlp.") else "head"


def _marks(feeds: Feeds, at: dict[_Spot, _Point]) -> list[go.Scatter]:
    """All spots of a panel with their names, one trace for each kind."""
    found = []
    for kind, look in _LOOKS.items():
        own = {spot: point for spot, point in at.items() if _kind(feeds, spot.name) == kind}
        found.append(
            go.Scatter(
                x=[point.x for point in own.values()],
                y=[point.y for point in own.values()],
                mode="markers+text",
                text=["" if spot.name == EMBEDDING else spot.name for spot in own],
                textposition=[point.label for point in own.values()],
                textfont={"size": 12},
                marker=_marker(look),
                hoverinfo="skip",
                showlegend=False,
                cliponaxis=False,
            )
        )
    return [trace for trace in found if trace.x]


def _marker(look: _Look) -> dict[str, object]:
    return {"symbol": look.symbol, "size": look.size, "color": look.fill, "line": {"width": 0}}


def _legend() -> Iterator[go.Scatter]:
    """What lines and marks mean."""
    for name, colour in (("supports the answer", SUPPORTS), ("opposes it", OPPOSES)):
        line = {"color": f"rgba({colour},0.62)", "width": 4}
        yield go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name)
    for look in _LOOKS.values():
        yield go.Scatter(x=[None], y=[None], mode="markers", marker=_marker(look), name=look.name)
