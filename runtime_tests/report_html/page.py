"""Render report.json as one HTML page that needs nothing else: styles and charts are inside, there is no script."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runtime_tests.report_html import svg
from runtime_tests.report_html.causes import problems
from runtime_tests.report_html.measured import MEASURES

HERE = Path(__file__).resolve().parent
LAYER_WORDS = ("layers", "h", "blocks")
RUNTIME_NAMES = {
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "onnxruntime": "ONNX Runtime",
    "torch": "torch",
}


def render_page(report: Mapping[str, Any]) -> str:
    """The page of a report, fresh or read from report.json; whatever an older report lacks is left out."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # token texts, paths and engines' messages come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, lines=visible_lines)
    page = environment.get_template("report.html.j2")
    return page.render(
        report=report,
        number=Numbers(report).show,
        rows=[_row(report, index) for index in range(len(report["rows"]))],
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        measures=MEASURES,
        svg=svg,
        heat=_heat(report),
        size_bars=_size_bars(report),
    )


class Numbers:
    """Numbers of a report as <data> elements that carry the exact value and its place in report.json."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report

    def show(self, place: str, form: str, scale: float = 1, unit: str = "") -> Markup:
        """The number at a dotted place, formatted; a dash where there is none.

        Args:
            place: Keys and list indices joined by dots, or by "/" if keys have dots in them.
            form: Format of `scale` times the number.
            scale: 100 for shares shown as percent.
            unit: Text after the number.
        """
        value: Any = self._report
        for key in place.split("/" if "/" in place else "."):
            value = value[int(key)] if isinstance(value, list) else value.get(key)
            if value is None:
                return Markup('<span class="none" title="not measured">–</span>')
        shown = format(scale * value, form).replace("-", "−")
        return Markup('<data value="{!r}" data-key="{}">{}{}</data>').format(value, visible(place), shown, unit)


def visible(text: str) -> str:
    """Token text with line ends shown as signs; control, direction-changing and unassigned characters spelled out."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(
        signs.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn"} else c)
        for c in text
    )


def visible_lines(text: str) -> str:
    """As `visible`, with line ends left as they are."""
    return "\n".join(map(visible, text.splitlines()))


def _row(report: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A row with its names, its problems and the share of each bound that was used."""
    row = report["rows"][index]
    variant = f"level {row['variant']}" if row["format"] == "onnx" else row["variant"]
    return {
        "skipped": None,  # older reports do not say
        **row,
        "place": f"rows.{index}",
        "id": f"run-{index + 1}",
        "runtime_name": RUNTIME_NAMES.get(row["runtime"], visible(row["runtime"])),
        "format_name": visible(f"{row['format']} {variant}".strip()),
        "problems": row.get("problems", problems(row)),
        "shares": [_share(check) for check in row["checks"]],
        "tokens_detail": row.get("tokens_detail"),
        "perplexity_band": row.get("perplexity_band"),
    }


def _share(check: Mapping[str, Any]) -> float:
    """How much of its bound a figure uses: 1 is the bound itself."""
    sign, bound = check["allowed"].split()
    room, used = (1 - float(bound), 1 - check["value"]) if sign == ">=" else (float(bound), abs(check["value"]))
    return float(used / room) if room else 0.0


def _size_bars(report: Mapping[str, Any]) -> list[Markup]:
    """One bar per row: quantized tensors, then the rest, on the scale of the 16-bit size or the largest file."""
    sizes = [row.get("bytes") or 0 for row in report["rows"]]
    full = max(*sizes, report.get("model", {}).get("bytes_16bit", 0), 1)
    bars = []
    for row, size in zip(report["rows"], sizes, strict=True):
        quantized = min(row.get("quantized_bytes") or 0, size)
        bars.append(svg.bar([("bar", quantized / full), ("rest", (size - quantized) / full)]))
    return bars


def _heat(report: Mapping[str, Any]) -> Markup | None:
    """The weight errors of numbered layers as squares; None if there are none."""
    cells = {}
    for module, value in report.get("weight_error", {}).get("layers", {}).items():
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part in LAYER_WORDS and i + 1 < len(parts)), None)
        if at is not None and parts[at + 1].isdigit():
            cells[(visible(parts[-1]), int(parts[at + 1]))] = float(value)
    label = "Weight error by layer and kind of linear; the table below holds the numbers"
    return svg.heat(cells, label) if cells else None
