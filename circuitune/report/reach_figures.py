"""The charts of how far a circuit reaches and of which set is enough."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.figures import INK, SUPPORTS, finished, whiskers
from circuitune.report.measures import Reach
from circuitune.report.proposing import BothHalves
from circuitune.report.reach import Joint, Transfer
from circuitune.report.reaching import RANDOM, names_of

_GAP = 0.3  # of a tile, between families
_TILE = 34  # pixels
_DEPTH = 4.6  # pixels that a letter of a slanted name takes downwards
_COLOURS = {
    "iterated": ("213,94,0", "circle"),
    "greedy": ("42,133,200", "square"),
    "mask": ("140,90,190", "diamond"),
    "single_pass": ("0,158,115", "triangle-up"),
}
_OTHER = ("204,121,167", "x")


# ------------------------------------------------------------------------------------ the matrix


def matrix_chart(found: Transfer, cells: Sequence[Reach]) -> go.Figure | None:
    """Right answers left, by whose heads are removed (rows) and what is asked (columns)."""
    if not cells:
        return None
    sources, targets = names_of(found, cells)
    family = {place.task: place.family for place in found.places} | {"": "random"}
    xs, ys = _centres(targets, family), _centres(sources, family)
    figure = go.Figure()
    known = {(cell.source, cell.target): cell for cell in cells}
    figure.add_trace(_tiles(known, xs, ys))
    figure.add_trace(_numbers(known, xs, ys))
    for name in set(xs) & set(ys):
        _outline(figure, xs[name], ys[name])
    for name, (start, stop) in _spans(targets, xs, family).items():
        figure.add_annotation(
            x=(start + stop) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=escape(name),
            showarrow=False,
        )
    figure.update_xaxes(
        tickvals=list(xs.values()),
        ticktext=[escape(fmt.task_name(name)) for name in targets],
        range=[-0.5, max(xs.values()) + 0.5],
        tickangle=-40,
        side="bottom",
        showgrid=False,
        zeroline=False,
        title_text="task that is asked",
        title_standoff=6,
        automargin=True,
    )
    figure.update_yaxes(
        tickvals=list(ys.values()),
        ticktext=[escape(fmt.task_name(name)) if name else RANDOM for name in sources],
        range=[max(ys.values()) + 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        title_text="heads of",
        title_standoff=6,
    )
    height = _TILE * (max(ys.values()) + 1)
    below = 44 + _DEPTH * max(len(fmt.task_name(name)) for name in targets)
    figure = finished(figure, height=round(height + below) + 28, top=28)
    return figure.update_layout(margin_b=round(below))


def _centres(names: Sequence[str], family: Mapping[str, str]) -> dict[str, float]:
    """Where the tiles stand: side by side, families apart."""
    found, at, last = {}, -1.0, None
    for name in names:
        own = family.get(name)
        at += 1.0 + (_GAP if last is not None and own != last else 0.0)
        found[name], last = at, own
    return found


def _spans(
    names: Sequence[str], places: Mapping[str, float], family: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """From where to where each family reaches."""
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        own = family.get(name, "")
        start, _ = found.get(own, (places[name], 0.0))
        found[own] = (start, places[name])
    return found


def _tiles(
    known: Mapping[tuple[str, str], Reach], xs: Mapping[str, float], ys: Mapping[str, float]
) -> go.Heatmap:
    """The coloured tiles; the gaps between families are tiles without a value."""
    (columns, across), (lines, down) = _slots(xs), _slots(ys)
    cells = [[known.get((source, target)) for target in columns] for source in lines]
    return go.Heatmap(
        x=across,
        y=down,
        z=[[cell and 100 * cell.accuracy.value for cell in own] for own in cells],
        text=[[_hover(cell) if cell else "" for cell in own] for own in cells],
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        zmin=0,
        zmax=100,
        # Fading out where nothing is lost, so that the page itself is the neutral colour.
        colorscale=[
            (at, f"rgba({SUPPORTS},{alpha})") for at, alpha in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.05))
        ],
        xgap=1.5,
        ygap=1.5,
        colorbar={
            "title": {"text": "right answers left, %", "side": "right", "font": {"size": 13}},
            "thickness": 10,
            "outlinewidth": 0,
            "x": 1.01,
            "nticks": 5,
        },
    )


def _slots(places: Mapping[str, float]) -> tuple[list[str | None], list[float]]:
    """The names, None for each gap, and the edges of their tiles: one more."""
    names: list[str | None] = []
    edges = [-0.5]
    for name, at in places.items():
        if at - 0.5 > edges[-1] + _GAP / 2:
            names.append(None)
            edges.append(at - 0.5)
        names.append(name)
        edges.append(at + 0.5)
    return names, edges


def _hover(cell: Reach) -> str:
    heads = f"heads of {fmt.task_name(cell.source)}" if cell.source else f"heads: {RANDOM}"
    lines = [
        f"<b>{escape(fmt.task_name(cell.target))}</b>, {escape(heads)}",
        f"{fmt.accuracy(cell.accuracy)} of {cell.n} answers survive",
    ]
    if cell.draws > 1:
        lines.append(f"mean of {cell.draws} draws")
    if cell.logit_diff is not None:
        lines.append(f"logit difference {fmt.number(cell.logit_diff, 2)}")
    return "<br>".join([*lines, " ".join(cell.heads)]).removesuffix("<br>")


def _numbers(
    known: Mapping[tuple[str, str], Reach], xs: Mapping[str, float], ys: Mapping[str, float]
) -> go.Scatter:
    """The number in each tile."""
    drawn = [cell for (source, target), cell in known.items() if source in ys and target in xs]
    return go.Scatter(
        x=[xs[cell.target] for cell in drawn],
        y=[ys[cell.source] for cell in drawn],
        text=[fmt.number(100 * cell.accuracy.value, 0) for cell in drawn],
        mode="text",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _outline(figure: go.Figure, x: float, y: float) -> None:
    """Frame the tile of a task without its own heads."""
    corners = {"x0": x - 0.48, "x1": x + 0.48, "y0": y - 0.48, "y1": y + 0.48}
    figure.add_shape(type="rect", line={"color": INK, "width": 1.2}, **corners)


# ---------------------------------------------------------------------------- which set is enough


def proposals_chart(found: Joint, sets: Sequence[BothHalves]) -> go.Figure:
    """What proposed sets leave of the targets and cost the spared tasks, by number of heads.

    Solid lines are the held-out half, dotted ones the select half that the choice saw.
    """
    figure = make_subplots(cols=2, horizontal_spacing=0.09, subplot_titles=_titles(found))
    held = any(own.held_left for own in sets)
    for by in dict.fromkeys(own.proposal.by for own in sets):
        own = [item for item in sets if item.proposal.by == by]
        figure.add_traces(_lines(own, by, held=False, legend=not held), rows=1, cols=[1, 2])
        if held:
            figure.add_traces(_lines(own, by, held=True, legend=True), rows=1, cols=[1, 2])
    chosen = next((item for item in sets if item.proposal is found.chosen), None)
    if chosen is not None:
        figure.add_traces(_rings(chosen), rows=1, cols=[1, 2])
    for column, goal in ((1, found.left), (2, found.harm)):
        style = {"color": INK, "dash": "dash", "width": 1}
        figure.add_hline(y=100 * goal, line=style, row=1, col=column)
    largest = max(own.size for own in sets)
    figure.update_xaxes(
        title_text="heads in the set",
        range=[0.6, largest + 0.4],
        dtick=max(1, largest // 8),
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        range=[-3, 103], dtick=25, zeroline=False, title_text="right answers, %", col=1
    )
    figure.update_yaxes(rangemode="tozero", title_text="accuracy, percentage points", col=2)
    figure = finished(figure, height=380, top=78)
    return figure.update_layout(legend={"y": 1.1})


def _titles(found: Joint) -> list[str]:
    one = len(found.targets) == 1
    target = fmt.task_name(found.targets[0]) if one else "the target that keeps most"
    return [f"left of {escape(target)}", "lost by the spared tasks, mean"]


def _lines(own: Sequence[BothHalves], by: str, *, held: bool, legend: bool) -> list[go.Scatter]:
    """What a proposer's sets leave and cost, one trace each."""
    colour, symbol = _COLOURS.get(by, _OTHER)
    left = [(item, item.held_left if held else Estimate(item.left)) for item in own]
    lost = [(item, item.held_lost if held else item.lost) for item in own]
    kept = [(item, value.scaled(100.0)) for item, value in left if value is not None]
    cost = [(item, Estimate(100 * value)) for item, value in lost if value is not None]
    look = {
        "mode": "lines+markers",
        "name": escape(fmt.set_name(by)),
        "legendgroup": by,
        "line": {
            "color": f"rgba({colour},{0.95 if held else 0.5})",
            "dash": "solid" if held else "dot",
            "width": 2.0 if held else 1.4,
        },
        "marker": {"symbol": symbol if held else f"{symbol}-open", "size": 7},
        "hovertemplate": "%{text}<extra></extra>",
    }
    return [
        go.Scatter(
            x=[item.size for item, _ in points],
            y=[value.value for _, value in points],
            error_y=whiskers([value for _, value in points], colour) if place == 0 else None,
            text=[_set_hover(item) for item, _ in points],
            showlegend=legend and place == 0,
            **look,
        )
        for place, points in enumerate((kept, cost))
    ]


def _set_hover(own: BothHalves) -> str:
    heads = f"{own.size} heads" if own.size != 1 else "one head"
    lines = [f"<b>{escape(fmt.set_name(own.proposal.by))}</b>, {heads}"]
    lines.append(f"targets left: {fmt.accuracy(Estimate(own.left))} on the select half")
    if own.held_left is not None:
        lines[-1] += f", {fmt.accuracy(own.held_left)} held out"
    if own.lost is not None:
        lines.append(
            f"spared lose: {fmt.points(Estimate(own.lost)).text.lstrip('+')} on the select half"
        )
    if own.held_lost is not None:
        lines[-1] += f", {fmt.points(Estimate(own.held_lost)).text.lstrip('+')} held out"
    return "<br>".join([*lines, " ".join(own.proposal.heads)])


def _rings(own: BothHalves) -> list[go.Scatter]:
    """A ring around the chosen set in both panels, on the held-out half where it is measured."""
    left = own.left if own.held_left is None else own.held_left.value
    lost = own.lost if own.held_lost is None else own.held_lost
    return [
        go.Scatter(
            x=[own.size],
            y=[None if value is None else 100 * value],
            mode="markers",
            name="chosen",
            legendgroup="chosen",
            marker={"symbol": "circle-open", "size": 17, "color": INK, "line": {"width": 2}},
            hoverinfo="skip",
            showlegend=place == 0,
        )
        for place, value in enumerate((left, lost))
    ]
