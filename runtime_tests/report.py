"""Parity reports for people: a terminal table, Markdown for the model card, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from runtime_tests.parity import ParityReport, ParityRow

COLUMNS = (
    "runtime",
    "format",
    "bytes",
    "bits/weight",
    "bit-exact",
    "perplexity",
    "Δ %",
    "KL",
    "top-1 %",
    "tokens/s",
    "greedy",
    "verdict",
)


def report_rows(report: ParityReport) -> list[tuple[str, ...]]:
    """The table's cells, the oracle first; columns as in COLUMNS."""
    speed = _number(report.oracle_tokens_per_s, ".1f")
    oracle = ("torch", "oracle fp32", "", "", "", f"{report.oracle_perplexity:.4f}", "", "", "", speed, "", "")
    return [oracle, *(_cells(row) for row in report.rows)]


def table(report: ParityReport, title: str = "") -> Table:
    """The report as a rich table."""
    shown = Table(title=title or f"{report.tokens} tokens against the torch fp32 oracle")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in {"runtime", "format", "verdict"} else "right")
    for cells in report_rows(report):
        shown.add_row(*cells)
    return shown


def markdown(report: ParityReport, rows: tuple[ParityRow, ...]) -> str:
    """The given rows as a Markdown table with one line on how they were measured."""
    lines = [
        f"Measured on {report.tokens} tokens against torch float32 on the dequantized checkpoint "
        f"(perplexity {report.oracle_perplexity:.4f}):",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def write_report(report: ParityReport, path: Path) -> None:
    """Write report.json."""
    path.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cells(row: ParityRow) -> tuple[str, ...]:
    target, stats = row.target, row.stats
    level = f"onnx level {target.variant}" if target.format == "onnx" else target.label
    match = f"{row.greedy_match[0]}/{row.greedy_match[1]}" if row.greedy_match else ""
    return (
        target.engine,
        level,
        f"{target.nbytes:,}",
        _number(target.bits_per_weight, ".2f"),
        f"{row.exact} of {row.total}" if row.exact is not None else "",
        _number(stats.perplexity if stats else None, ".4f"),
        _number(stats.delta_percent if stats else None, "+.3f"),
        _number(stats.kl if stats else None, ".2e"),
        _number(100 * stats.top1 if stats else None, ".2f"),
        _number(row.tokens_per_s, ".1f"),
        match,
        "ok" if row.passed else "FAILED",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
