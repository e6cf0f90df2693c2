"""The curves of a run as one HTML page that needs nothing else, in the style of the parity report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runtime_tests.report_html.page import HERE, visible
from runtime_tests.report_html.runs import Run
from runtime_tests.report_html.svg_lines import Line, chart, smoothed

KINDS = ("a", "b", "c", "d")
"""Line styles; the run itself has the first."""


class Figure(NamedTuple):
    """How a figure is shown."""

    title: str
    caption: str
    unit: str
    how: str


FIGURES = {
    "held_out_perplexity": Figure(
        "Held-out perplexity", "perplexity", "",
        "On the windows of --eval-text: before training (step 0), every --eval-every steps and after the last. In a "
        "LoRA warm-up it is the unquantized model's.",
    ),
    "loss": Figure("Training loss", "loss (nats)", "", "Faint: every step. Strong: moving average over a twentieth of "
                   "the steps."),
    "scale_drift": Figure(
        "Scale drift", "mean |s / s₀ − 1| (%)", " %",
        "How far the scales are from where quantization started, on a sample of layers and rows.",
    ),
    "clipped": Figure(
        "Clipped weights", "share (%)", " %",
        "Share of the sampled weights W₀ + αBA that lie beyond the ends of their group's grid.",
    ),
    "zero_point_moves": Figure(
        "Zero-point moves", "groups per step (%)", " %",
        "Share of the sampled groups whose zero-point went to another code since the step before; none for symmetric "
        "grids.",
    ),
    "grad_norm": Figure("Gradient norm", "norm", "", "Over all trained parameters, before clipping."),
}  # fmt: skip


def render_curves(runs: Sequence[Run], references: Mapping[str, float]) -> str:
    """The page.

    Args:
        runs: The run, then those it is compared with; at most as many as `KINDS`.
        references: Perplexities to hold the run against, by label: horizontal lines.
    """
    levels = ({"the 16-bit model before training": runs[0].base} if runs[0].base else {}) | dict(references)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # names and paths come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    style = "".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "curves.css"))
    return environment.get_template("curves.html.j2").render(
        runs=[(kind, run) for kind, run in zip(KINDS, runs, strict=False)],
        levels=levels,
        charts=[_chart(name, runs, levels) for name in FIGURES if any(name in run.series for run in runs)],
        numbers=numbers(runs),
        verdict=verdict(runs[0], levels),
        figures=FIGURES,
        style=style,
    )


def verdict(run: Run, levels: Mapping[str, float]) -> str:
    """The outcome in one sentence."""
    losses = smoothed(run.series["loss"])
    points = run.series.get("held_out_perplexity", [])
    steps = f"{losses[-1][0]:.0f} steps"
    if len(points) < 2:
        return f"Loss {losses[0][1]:.3f} → {losses[-1][1]:.3f} in {steps}"
    beside = "; ".join(f"{label} {value:.3f}" for label, value in levels.items())
    return f"Held-out perplexity {points[0][1]:.3f} → {points[-1][1]:.3f} in {steps}" + (
        f" ({beside})" if beside else ""
    )


def numbers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """First, last, least and greatest value of every figure of every run."""
    rows = []
    for name, figure in FIGURES.items():
        for run in runs:
            points = run.series.get(name)
            if points:
                least, most = min(points, key=_value), max(points, key=_value)
                row = {"figure": figure.title, "name": name, "run": run.name, "unit": figure.unit, "count": len(points)}
                rows.append(row | {"first": points[0], "last": points[-1], "least": least, "most": most})
    return rows


def write_curves(page: str, path: Path) -> None:
    """Write the page, with the folder it belongs in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _chart(name: str, runs: Sequence[Run], levels: Mapping[str, float]) -> dict[str, Any]:
    figure = FIGURES[name]
    held_out = name == "held_out_perplexity"
    lines = []
    for kind, run in zip(KINDS, runs, strict=False):
        points = run.series.get(name, [])
        if points and name == "loss":
            lines += [Line(f"faint {kind}", points), Line(f"line {kind}", smoothed(points))]
        elif points:
            lines.append(Line(f"line {kind}", points, marked=held_out or len(points) == 1))
    shown: Markup = chart(lines, levels if held_out else {}, f"{figure.title} by step", figure.caption)
    return {"name": name, "figure": figure, "svg": shown, "levels": levels if held_out else {}}


def _value(point: tuple[float, float]) -> float:
    return point[1]
