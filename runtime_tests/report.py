"""Parity reports: a terminal table, Markdown for the model card, a page for people, JSON for machines.

All functions take the JSON form of a report (`ParityReport.to_dict`), so that a stored report prints like a fresh one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from l4q.durable import write_atomic
from l4q.errors import UsageError

Report = Mapping[str, Any]

# heading, key in a row, format
FIGURES = (
    ("bytes", "bytes", ","),
    ("bits/w", "bits_per_weight", ".2f"),
    ("bit-exact", "bit_exact", ""),
    ("perplexity", "perplexity", ".4f"),
    ("Δ %", "delta_percent", "+.3f"),
    ("KL", "kl", ".1e"),
    ("top-1 %", "top1", ".2f"),
    ("tokens/s", "tokens_per_s", ".1f"),
    ("greedy", "greedy_match", ""),
)
COLUMNS = ("runtime", "format", *(heading for heading, _, _ in FIGURES), "verdict")
NARROW = 140
"""Below this width a table has one column that names the run, and only the figures that fit 80 columns."""
LEFT_OUT = ("bytes", "bits/w", "tokens/s", "greedy")


def report_rows(report: Report) -> list[tuple[str, ...]]:
    """The table's cells in the order of COLUMNS: baselines, the oracle, then every runtime."""
    baselines = [{"runtime": "torch", "name": name, "perplexity": value} for name, value in _baselines(report).items()]
    oracle = {"runtime": "torch", "name": "oracle (float32)", **report["oracle"]}
    return [_cells(row) for row in (*baselines, oracle, *report["rows"])]


def table(report: Report, title: str = "", width: int = 200) -> Table:
    """The report as a rich table for a terminal of this width; below `NARROW` without the columns `LEFT_OUT`."""
    title = title or f"{report['tokens']} held-out tokens, Δ and KL against the torch float32 oracle"
    left = {"runtime", "format", "verdict", "run"}
    if width >= NARROW:
        headings, rows = COLUMNS, report_rows(report)
    else:
        kept = [number for number, heading in enumerate(COLUMNS) if number > 1 and heading not in LEFT_OUT]
        headings = ("run", *(COLUMNS[number] for number in kept))
        rows = [(f"{row[0]} {row[1]}", *(row[number] for number in kept)) for row in report_rows(report)]
    shown = Table(title=title)
    if width < NARROW:
        shown.box, shown.pad_edge, shown.collapse_padding = SIMPLE_HEAD, False, True
    for column in headings:
        shown.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for cells in rows:
        shown.add_row(*cells)
    return shown


def markdown(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The given rows of a report as a Markdown table, with one line on how they were measured."""
    lines = [
        f"Measured on {report['tokens']} tokens against torch float32 on the dequantized checkpoint "
        f"(perplexity {report['oracle']['perplexity']:.4f}):",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def report_files(place: Path) -> tuple[Path, Path]:
    """Where the two files of a report go: into the folder `place`, or at PLACE.json and PLACE.html; folders are made.

    Raises:
        UsageError: `place` cannot be written to.
    """
    folder, stem = (place.parent, place.stem) if place.suffix == ".json" else (place, "report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "the report cannot be written there",
            where=place,
            got=error,
            expected="a folder, or a file name ending in .json",
            remedy="choose another --report",
        ) from error
    return folder / f"{stem}.json", folder / f"{stem}.html"


def write_report(report: Report, place: Path) -> None:
    """Write report.json and, beside it, report.html with the same numbers; see `report_files`."""
    from runtime_tests.report_html.page import render_page

    data, page = report_files(place)
    write_atomic(data, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(page, render_page(report))


def _baselines(report: Report) -> dict[str, float]:
    return dict(report.get("baselines", {}))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    good = "not run" if row.get("skipped") else "ok"
    verdict = "" if "passed" not in row else good if row["passed"] else "FAILED"
    return (row["runtime"], _name(row), *(_figure(row, key, form) for _, key, form in FIGURES), verdict)


def _name(row: Mapping[str, Any]) -> str:
    if "name" in row:
        return str(row["name"])
    level = f"level {row['variant']}" if row["format"] == "onnx" else row["variant"]
    return f"{row['format']} {level}".strip()


def _figure(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "bit_exact":
        return f"{value} of {row['quantized_tensors']}"
    if key == "greedy_match":
        return f"{value[0]}/{value[1]}"
    return format(100 * value if key == "top1" else value, form)
