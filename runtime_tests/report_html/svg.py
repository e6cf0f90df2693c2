"""Charts as inline SVG: plain shapes and text in the page's own colours, no scripts.

Every function returns Markup whose variable parts passed through `Markup.format`, which escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44

_FRAME = Markup(
    '<svg role="img" width="{width}" viewBox="0 0 {width} {height}" aria-label="{label}">'
    "<title>{label}</title>{body}</svg>"
)
_TEXT = Markup('<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{text}</text>')
_LINE = Markup('<path class="{kind}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
_RECT = Markup('<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>')


def scatter(points: Sequence[Sequence[float]], label: str) -> Markup:
    """Log-probabilities of tokens: the oracle's to the right, the runtime's upwards, both in nats, both up to 0."""
    values = [max(value, -60.0) for point in points for value in point]
    low = min(math.floor(min(values, default=-1.0)), -1)

    def across(value: float) -> float:
        return LEFT + (1 - max(value, -60.0) / low) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return TOP + max(value, -60.0) / low * (HEIGHT - TOP - BOTTOM)

    marks = ticks(low, 0.0)
    body = axes([(across(t), f"{t:g}") for t in marks], [(up(t), f"{t:g}") for t in marks])
    body += _LINE.format(kind="guide", x0=across(low), y0=up(low), x1=across(0), y1=up(0))
    # A dot is a line of no length with a round cap: one path for all.
    dots = "".join(f"M{across(a):.1f} {up(b):.1f}h0" for a, b in points)
    body += Markup('<path class="dots" d="{}"/>').format(dots)
    body += captions("log p, oracle (nats)", "log p, runtime")
    return frame(label, body)


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> Markup:
    """Counts of runtime - oracle log-probability; the end bins hold everything beyond them."""
    top = max(*counts, 1)
    span = edges[-1] - edges[0]
    plot = WIDTH - LEFT - RIGHT

    def across(value: float) -> float:
        return LEFT + (value - edges[0]) / span * plot

    body = axes(
        [(across(t), f"{t:.2g}") for t in ticks(edges[0], edges[-1], 4)],
        [(HEIGHT - BOTTOM - t / top * (HEIGHT - TOP - BOTTOM), f"{t:g}") for t in ticks(0.0, float(top))],
    )
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        height = count / top * (HEIGHT - TOP - BOTTOM)
        x = across(left)
        body += _RECT.format(
            kind="bar", x=x + 0.5, y=HEIGHT - BOTTOM - height, width=across(right) - x - 1, height=height
        )
    body += _LINE.format(kind="guide", x0=across(0), y0=TOP, x1=across(0), y1=HEIGHT - BOTTOM)
    body += captions("log p, runtime − oracle (nats)", "tokens")
    return frame(label, body)


def heat(cells: Mapping[tuple[str, int], float], label: str) -> Markup:
    """One square per (row name, column number), the stronger the larger; rows in order of appearance."""
    rows = list(dict.fromkeys(name for name, _ in cells))
    columns = max((number for _, number in cells), default=0) + 1
    side = min(22.0, 560.0 / columns)
    left, top = 92.0, 8.0
    low, high = min(cells.values()), max(cells.values())
    body = Markup("")
    for index, name in enumerate(rows):
        body += _TEXT.format(x=left - 6, y=top + (index + 0.5) * side + 4, kind="end", text=name)
    for (name, number), value in cells.items():
        share = 0.15 + 0.85 * ((value - low) / (high - low) if high > low else 1.0)
        square = Markup(
            '<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
            'fill-opacity="{share:.2f}">'
            "<title>{text}</title></rect>"
        )
        body += square.format(
            x=left + number * side, y=top + rows.index(name) * side, side=side - 1, share=share,
            text=f"layer {number} {name}: {100 * value:.2f} %",
        )  # fmt: skip
    bottom = top + len(rows) * side
    for number in sorted({0, (columns - 1) // 2, columns - 1}):
        body += _TEXT.format(x=left + (number + 0.5) * side, y=bottom + 16, kind="middle", text=number)
    width = left + columns * side + 8
    body += _TEXT.format(x=left - 6, y=bottom + 16, kind="end", text="layer")
    return frame(label, body, width=math.ceil(max(width, 160)), height=math.ceil(bottom + 24))


def bar(shares: Sequence[tuple[str, float]], *, limit: float | None = None) -> Markup:
    """A bar in parts, (class, share of the full width) each; decoration of a number that stands beside it in text."""
    body, x = Markup(""), 0.0
    for kind, share in shares:
        width = 160 * min(max(share, 0.0), 1.0)
        body += _RECT.format(kind=kind, x=x, y=2, width=min(width, 160 - x), height=10)
        x += width
    if limit is not None:
        body += _LINE.format(kind="limit", x0=160 * limit, y0=0, x1=160 * limit, y1=14)
    return Markup('<svg class="inline" aria-hidden="true" focusable="false" viewBox="0 0 161 14">{}</svg>').format(body)


def frame(label: str, body: Markup, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """The drawing, with its name for screen readers."""
    return _FRAME.format(label=label, body=body, width=width, height=height)


def axes(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> Markup:
    """Both axes with ticks, (place, text) each."""
    body = _LINE.format(kind="axis", x0=LEFT, y0=HEIGHT - BOTTOM, x1=WIDTH - RIGHT, y1=HEIGHT - BOTTOM)
    body += _LINE.format(kind="axis", x0=LEFT, y0=TOP, x1=LEFT, y1=HEIGHT - BOTTOM)
    for x, text in across:
        body += _LINE.format(kind="axis", x0=x, y0=HEIGHT - BOTTOM, x1=x, y1=HEIGHT - BOTTOM + 4)
        body += _TEXT.format(x=x, y=HEIGHT - BOTTOM + 18, kind="middle", text=text)
    for y, text in up:
        body += _LINE.format(kind="grid", x0=LEFT, y0=y, x1=WIDTH - RIGHT, y1=y)
        body += _TEXT.format(x=LEFT - 6, y=y + 4, kind="end", text=text)
    return body


def captions(across: str, up: str) -> Markup:
    """What the axes show."""
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = Markup('<text class="middle" transform="translate(13 {:.1f}) rotate(-90)">{}</text>')
    x = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return _TEXT.format(x=x, y=HEIGHT - 8, kind="middle", text=across) + turned.format(middle, up)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]
