"""Medians, ratios and tables of tools.bench_export."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench_export_jobs import ExportCost, PeerCost
from tools.bench_export_models import BenchModel

MIB = 1 << 20
EXPORT_COLUMNS = (
    "format",
    "MB",
    "MB/s",
    "export s",
    "cp s",
    "cp synced s",
    "export / cp synced",
    "peak MiB",
    "private MiB",
    "verified s",
    "verified peak MiB",
)
PEER_COLUMNS = ("format", "by", "s", "times ours")


@dataclass(kw_only=True)
class FormatCosts:
    """All repetitions of one format."""

    exports: list[ExportCost] = field(default_factory=list)
    verified: list[ExportCost] = field(default_factory=list)
    copies: list[tuple[float, float]] = field(default_factory=list)
    peers: dict[str, list[PeerCost]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Peers that raised, with their words."""


def summary(costs: FormatCosts, model: BenchModel) -> dict[str, Any]:
    """One format's entry of the last line."""
    seconds = statistics.median(cost.seconds for cost in costs.exports)
    copied = statistics.median(synced for _, synced in costs.copies)
    peak = max(cost.peak for cost in costs.exports)
    speedups = {}
    for name, runs in costs.peers.items():
        per_weight = statistics.median(run.seconds / run.weights for run in runs)
        speedups[name] = round(per_weight * model.linear_weights / seconds, 2)
    return {"wall_vs_cp": round(seconds / copied, 3), "peak_mib": round(peak / MIB, 1), "speedup_vs": speedups}


def export_table(costs: dict[str, FormatCosts]) -> list[str]:
    """Our exports against `cp` and fsync, as lines of Markdown: medians, and in brackets least and greatest."""
    lines = table_head(EXPORT_COLUMNS)
    for label, found in costs.items():
        exports, size = found.exports, found.exports[0].nbytes
        seconds = statistics.median(cost.seconds for cost in exports)
        synced = [value for _, value in found.copies]
        cells = [
            label,
            f"{size / 1e6:,.1f}",
            f"{size / 1e6 / seconds:,.0f}",
            spread([cost.seconds for cost in exports]),
            spread([value for value, _ in found.copies]),
            spread(synced),
            f"{seconds / statistics.median(synced):.2f}",
            f"{max(cost.peak for cost in exports) / MIB:,.0f}",
            f"{max(cost.private for cost in exports) / MIB:,.0f}",
            spread([cost.seconds for cost in found.verified]) if found.verified else "",
            f"{max(cost.peak for cost in found.verified) / MIB:,.0f}" if found.verified else "",
        ]
        lines.append(table_row(cells))
    return lines


def peer_table(costs: dict[str, FormatCosts], model: BenchModel) -> list[str]:
    """Other people's code on the same linears, scaled to all of them, as lines of Markdown."""
    lines = table_head(PEER_COLUMNS)
    for label, found in costs.items():
        for peer, ratio in summary(found, model)["speedup_vs"].items():
            scaled = [run.seconds / run.weights * model.linear_weights for run in found.peers[peer]]
            lines.append(table_row([label, peer, spread(scaled), f"{ratio:.1f}"]))
    return lines


def table_head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_row(columns), "|---" * len(columns) + "|"]


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """The median, and in brackets least and greatest."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def machine() -> str:
    """Processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
