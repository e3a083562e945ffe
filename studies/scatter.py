"""A scatter of gain against drift as an SVG file, with both intervals of every point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from circuitune.stats import Interval

WIDTH, HEIGHT = 940, 520
LEFT, RIGHT, TOP, BOTTOM = 64, 270, 54, 56  # names stand on the right
COLOURS = {"precise": "#0b6e4f", "random": "#9a9a9a", "lora": "#b3541e", "full": "#3a5a98"}
OTHER = "#7b4b94"


@dataclass(frozen=True)
class Point:
    """A trained variant.

    Attributes:
        label: its name, in the list on the right.
        method: decides its colour.
        x: drift, more than 0; the axis is logarithmic.
        y: gain.
    """

    label: str
    method: str
    x: Interval
    y: Interval


def scatter(points: Sequence[Point], title: str, x_title: str, y_title: str) -> str:
    """The picture as text."""
    low = math.floor(math.log10(min(p.x.low for p in points)))
    high = math.ceil(math.log10(max(p.x.high for p in points)))
    floor = 10 * math.floor(min(p.y.low for p in points) / 10)
    top = 10 * math.ceil(max(p.y.high for p in points) / 10)

    def across(value: float) -> float:
        share = (math.log10(max(value, 10**low)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - floor) / (top - floor) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 24, title, size=16, weight=600),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_title, anchor="middle"),
        _text(LEFT, TOP - 10, y_title, size=12),
    ]
    for power in range(low, high + 1):
        x = across(10**power)
        if power < high:
            third = across(3 * 10**power)
            parts.append(_line(third, TOP, third, HEIGHT - BOTTOM, "#f1f1f1", 1))
            label = f"{3 * 10**power:g}"
            parts.append(_text(third, HEIGHT - BOTTOM + 18, label, anchor="middle", fill="#777"))
        parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, "#e4e4e4", 1))
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{10**power:g}", anchor="middle"))
    for value in range(floor, top + 1, 10):
        parts.append(_line(LEFT, up(value), WIDTH - RIGHT, up(value), "#e4e4e4", 1))
        parts.append(_text(LEFT - 8, up(value) + 4, str(value), anchor="end"))
    for number, point in enumerate(sorted(points, key=lambda p: -p.y.estimate), start=1):
        colour = COLOURS.get(point.method, OTHER)
        x, y = across(point.x.estimate), up(point.y.estimate)
        parts.append(_line(across(point.x.low), y, across(point.x.high), y, colour, 1.4))
        parts.append(_line(x, up(point.y.low), x, up(point.y.high), colour, 1.4))
        beside = WIDTH - RIGHT + 24, TOP + 22 * number - 8
        for spot in ((x, y), beside):
            parts.append(f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="9" fill="{colour}"/>')
            parts.append(_text(spot[0], spot[1] + 4, str(number), "middle", size=11, fill="#fff"))
        parts.append(_text(beside[0] + 16, beside[1] + 4, point.label, fill=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, words: str, anchor: str = "start", *, size: int = 13, **more: object
) -> str:
    extra = "".join(f' font-{key}="{value}"' for key, value in more.items() if key != "fill")
    extra += f' fill="{more["fill"]}"' if "fill" in more else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{extra}>'
        f"{escape(words)}</text>"
    )
