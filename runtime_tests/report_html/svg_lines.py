"""Line charts as inline SVG, in the manner of `runtime_tests.report_html.svg`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from runtime_tests.report_html.page import visible
from runtime_tests.report_html.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, captions, frame, ticks

LONGEST = 44
"""Characters of a level's name that are drawn."""
MOST_POINTS = 400
"""A longer line is drawn as the means of this many runs of its points."""


class Line(NamedTuple):
    """One line of a chart."""

    kind: str
    """Class of the stylesheet: "line a", "line b", "line c", "faint a", "guide"."""
    points: Sequence[tuple[float, float]]
    marked: bool = False
    """Whether every point gets a dot."""


def chart(lines: Sequence[Line], levels: Mapping[str, float], label: str, caption: str) -> Markup:
    """Values by step.

    Args:
        lines: Drawn one over the other.
        levels: Horizontal lines across the chart, by what they are.
        label: For screen readers.
        caption: What stands beside the vertical axis.
    """
    values = [value for line in lines for _, value in line.points] + list(levels.values())
    low, high = _room(min(values), max(values))
    last = max((step for line in lines for step, _ in line.points), default=1.0) or 1.0

    def across(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = axes([(across(t), f"{t:g}") for t in ticks(0.0, last)], [(up(t), f"{t:.4g}") for t in ticks(low, high)])
    for name, level in levels.items():
        body += Markup('<path class="guide" d="M{:.1f} {:.1f}H{:.1f}"/>').format(LEFT, up(level), WIDTH - RIGHT)
        text = Markup('<text x="{:.1f}" y="{:.1f}" class="end">{}</text>')
        body += text.format(WIDTH - RIGHT, max(up(level) - 4, TOP), visible(name[:LONGEST]))
    for line in lines:
        places = [(across(step), up(value)) for step, value in thinned(line.points)]
        body += Markup('<path class="{}" d="M{}"/>').format(line.kind, "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
        if line.marked:
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
            body += Markup('<path class="{} mark" d="{}"/>').format(line.kind, dots)
    return frame(label, body + captions("optimizer steps", caption))


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most `MOST_POINTS` points, each the mean of as many neighbours."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[at : at + size] for at in range(0, len(points), size)] if size > 1 else []
    return [_mean(part) for part in parts] or points


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average over about a twentieth of the points, without a bias to the first ones."""
    weight = 1 / max(1.0, len(points) / 20)
    total = norm = 0.0
    found = []
    for step, value in points:
        total, norm = (1 - weight) * total + weight * value, (1 - weight) * norm + weight
        found.append((step, total / norm))
    return found


def _mean(part: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(step for step, _ in part) / len(part), math.fsum(value for _, value in part) / len(part)


def _room(low: float, high: float) -> tuple[float, float]:
    """The range of the vertical axis: from 0 if that is near, with some room."""
    if 0 <= low < 0.5 * high or low == high == 0:
        low = 0.0
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.1
    return (low if low == 0 else low - margin), high + margin
