"""Draw the figures of docs/method.md with the code they explain: python -m tools.figures [--check].

Plain SVG, written here; the curves are l4q's own forward and gradients on a sweep of one group's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
INK, FAINT, BLUE, RED, GREEN = "#333333", "#c8c8c8", "#1f5fbf", "#b3261e", "#1b7a3d"
WIDTH, HEIGHT, MARGIN = 640, 320, 44
BITS, SCALE, OFFSET = 3, 0.5, 0.0
SWEEP = 601

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The rectangle of data that a figure shows."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Data to pixels."""
        left = MARGIN + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - 2 * MARGIN)
        return left, HEIGHT - MARGIN - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - 2 * MARGIN)

    def line(self, points: Points, colour: str, dash: str = "") -> str:
        """A curve."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        style = f' stroke-dasharray="{dash}"' if dash else ""
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'

    def frame(self, x_label: str, y_label: str, ticks: Sequence[float]) -> list[str]:
        """Axes through 0, ticks below, and what they show."""
        zero = self.place(0, 0)[1]
        parts = [self.line([(self.x[0], 0), (self.x[1], 0)], FAINT), self.line([(0, self.y[0]), (0, self.y[1])], FAINT)]
        parts += [text(self.place(tick, 0)[0], zero + 16, f"{tick:g}", anchor="middle") for tick in ticks if tick]
        parts.append(text(WIDTH - MARGIN, zero - 8, x_label, anchor="end"))
        return [*parts, text(self.place(0, 0)[0] + 8, MARGIN - 14, y_label)]


def text(x: float, y: float, words: str, *, colour: str = INK, anchor: str = "start", size: int = 13) -> str:
    """Words at a place."""
    safe = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">{safe}</text>'


def svg(parts: Sequence[str], title: str) -> str:
    """A whole file on white ground, so that it is readable on a dark page."""
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" role="img">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{title}</title>", ground, *parts, "</svg>"]) + "\n"


def sweep() -> tuple[list[float], dict[str, list[float]]]:
    """Weights W from below the grid to above it; W_q and the derivatives of W_q by W0, s and b, from `L4QLinear`.

    One row of outputs per weight, one column: the gradient of the sum of all outputs for input 1 is each derivative.
    """
    import torch
    from torch import nn

    from l4q.config import LoraConfig, QuantConfig
    from l4q.linear import L4QLinear

    swept = torch.linspace(-3.207, 2.703, SWEEP)  # no point lies on a border between two codes
    weight = nn.Parameter(swept[:, None].repeat(1, 32))
    quant = QuantConfig(bits=BITS, group_size=32, zero_point="float")
    layer = L4QLinear(weight, None, quant, LoraConfig(rank=1, alpha=1.0), kernels="eager")
    with torch.no_grad():
        layer.scales.fill_(SCALE)
        layer.offsets.fill_(OFFSET)
        layer.lora_A.fill_(1.0)  # B = 0: the weight is W0, and dW_q/dB is dW_q/dW times A = 1
        layer.lora_B.zero_()
    one = torch.zeros(1, 32)
    one[0, 0] = 1.0  # only the group's first column
    out = layer(one)
    out.sum().backward()
    curves = {
        "W_q": out.detach()[0],
        "by W": layer.lora_B.grad[:, 0],  # type: ignore[index]
        "by s": layer.scales.grad[:, 0],  # type: ignore[index]
        "by b": layer.offsets.grad[:, 0],  # type: ignore[index]
    }
    return swept.tolist(), {name: values.tolist() for name, values in curves.items()}


def staircase() -> str:
    """W to W_q."""
    weights, curves = sweep()
    axes = Axes(x=(-3.21, 2.71), y=(-2.4, 2.0))
    levels = [SCALE * code + OFFSET for code in range(-(2 ** (BITS - 1)), 2 ** (BITS - 1))]
    parts = axes.frame("W = W0 + αBA", "W_q", levels)
    parts.append(axes.line([(-2.4, -2.4), (2.0, 2.0)], FAINT, "4 4"))
    parts.append(axes.line(list(zip(weights, curves["W_q"], strict=True)), BLUE))
    parts.append(text(MARGIN, HEIGHT - 8, "clipped to the lowest code", colour=RED))
    parts.append(text(WIDTH - MARGIN, MARGIN + 4, "clipped to the highest code", colour=RED, anchor="end"))
    return svg(parts, f"The quantizer: {BITS} bits, s = {SCALE}, b = {OFFSET:g}")


def gradients() -> str:
    """The derivatives of W_q by W, s and b."""
    weights, curves = sweep()
    axes = Axes(x=(-3.21, 2.71), y=(-4.6, 3.6))
    parts = axes.frame("W", "derivative of W_q", [-3, -2, -1, 1, 2])
    names = (("by W", "by W0 and αBA (eq 17)", BLUE), ("by s", "by s (eq 19)", RED), ("by b", "by b (eq 21)", GREEN))
    for row, (name, label, colour) in enumerate(names):
        parts.append(axes.line(list(zip(weights, curves[name], strict=True)), colour))
        parts.append(text(350, HEIGHT - 90 + 22 * row, label, colour=colour))
    return svg(parts, "Gradients through the quantizer")


def paths() -> str:
    """LoRA beside a quantized weight, and inside the quantizer."""
    parts: list[str] = []
    rows = (
        (70, "LoRA beside (QLoRA, QAT-LoRA): two paths at inference", ("W0", "quantize"), "+ αBA x  in 16 bits"),
        (200, "L4Q: one path, integers only", ("W0 + αBA", "quantize"), ""),
    )
    for y, title, boxes, extra in rows:
        parts.append(text(MARGIN, y - 28, title, size=15))
        for index, label in enumerate((*boxes, "· x", "y")):
            left = MARGIN + 130 * index
            parts.append(f'<rect x="{left}" y="{y}" width="100" height="36" fill="none" stroke="{INK}" rx="4"/>')
            parts.append(text(left + 50, y + 23, label, anchor="middle"))
            if index:
                parts.append(f'<path d="M{left - 30} {y + 18}h26m-7 -5l7 5l-7 5" fill="none" stroke="{INK}"/>')
        if extra:
            parts.append(f'<path d="M{MARGIN + 310} {y + 62}h105v-22m-5 7l5 -7l5 7" fill="none" stroke="{RED}"/>')
            parts.append(text(MARGIN + 175, y + 67, extra, colour=RED))
    parts.append(
        text(MARGIN, 276, "Trained by QLoRA: A and B; by QAT-LoRA and L4Q: A, B, s and b. W0 is frozen.", colour=BLUE)
    )
    return svg(parts, "Where LoRA is added")


FIGURES: dict[str, Callable[[], str]] = {"quantizer": staircase, "gradients": gradients, "paths": paths}


@click.command(name="figures")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a figure is stale.")
def command(check: bool) -> None:
    """Draw docs/figures."""
    drawn = {FOLDER / f"{name}.svg": draw() for name, draw in FIGURES.items()}
    if check:
        raise SystemExit(any(path.read_text(encoding="utf-8") != content for path, content in drawn.items()))
    FOLDER.mkdir(exist_ok=True)
    for path, content in drawn.items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    command()
