"""Print what was counted, within 80 columns, or give it as JSON values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exporters.inspect.counts import Counts
from exporters.inspect.facts import Source

BAR = 36
MOST_ROWS = 16
LEAST_BYTES = 64
"""Smaller tensors are left out of the table of layers."""
WIDTH = 80
NAME_WIDTH = 22


def as_json(path: Path, source: Source, counts: Counts) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "path": str(path),
        "format": source.format,
        "title": source.title,
        "facts": source.facts,
        "bytes": counts.nbytes,
        "grids": asdict(counts.grids),
        "parts": {name: asdict(part) for name, part in counts.parts.items()},
        "layers": [{**asdict(row), "shape": list(row.shape)} for row in counts.rows],
        "codes": counts.codes if counts.read else None,
        "scales_log2": dict(sorted(counts.scales.items())) if counts.read else None,
        "negative_scales": counts.negative_scales,
        "zero_scales": counts.zero_scales,
        "runtimes": [asdict(runtime) for runtime in source.runtimes(counts.grids)],
        "notes": list(source.notes),
    }


def show(path: Path, source: Source, counts: Counts, console: Console) -> None:
    """Print the tables and histograms."""
    console.print(Text(f"{path}: {source.title}", style="bold"))
    for label, text in (*source.facts.items(), *_grid_lines(counts)):
        console.print(_line(f"{label}: {text}"))
    console.print(_layers(counts))
    console.print(_parts(counts))
    for bits, many in sorted(counts.codes.items()):
        console.print(Text(f"codes, {bits} bits", style="bold"))
        console.print(Text("\n".join(bars(_code_rows(many)))))
    if counts.scales:
        console.print(Text("scales, by powers of two", style="bold"))
        low, high = min(counts.scales), max(counts.scales)
        rows = [(f"2^{power}", counts.scales.get(power, 0)) for power in range(low, high + 1)]
        console.print(Text("\n".join(bars(rows))))
    for odd, text in ((counts.negative_scales, "negative"), (counts.zero_scales, "zero")):
        if odd:
            console.print(_line(f"{odd:,} scales are {text}"))
    console.print(Text("runtimes", style="bold"))
    for runtime in source.runtimes(counts.grids):
        mark = "yes" if runtime.loads else "no "
        console.print(_line(f"{mark} {runtime.runtime}{': ' + runtime.reason if runtime.reason else ''}"))
    for note in source.notes:
        console.print(_line(f"note: {note}"))


def bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    """Text bars: label, bar, count and share."""
    most, total = max((many for _, many in rows), default=0), sum(many for _, many in rows)
    width = max((len(label) for label, _ in rows), default=0)
    lines = []
    for label, many in rows:
        length = round(BAR * many / most) if most else 0
        share = 100 * many / total if total else 0.0
        lines.append(f"  {label:>{width}} {'#' * length:<{BAR}} {many:>14,} {share:5.1f} %")
    return lines


def _code_rows(counts: list[int]) -> list[tuple[str, int]]:
    """One row per code, or per run of codes where there are many."""
    step = max(1, len(counts) // MOST_ROWS)
    if step == 1:
        return [(str(code), many) for code, many in enumerate(counts)]
    return [(f"{at}-{at + step - 1}", sum(counts[at : at + step])) for at in range(0, len(counts), step)]


def _grid_lines(counts: Counts) -> Iterable[tuple[str, str]]:
    grids = counts.grids
    for label, found in (("bits", grids.bits), ("group sizes", grids.group_sizes), ("zero-points", grids.kinds)):
        if found:
            listed = sorted(((str(key), many) for key, many in found.items()), key=lambda pair: -pair[1])
            yield f"{label} found", ", ".join(f"{key} ({many} tensors)" for key, many in listed)
    if grids.undecoded:
        yield "not decoded", f"{grids.undecoded} quantized tensors"


def _layers(counts: Counts) -> Table:
    table = _table("layers, numbers as *; grid is bits/group size and zero-point")
    for column in ("tensors", "shape", "type", "grid"):
        table.add_column(column, overflow="fold")
    for column in ("count", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    small = [row for row in counts.rows if row.nbytes < LEAST_BYTES]
    if small:
        table.caption = f"{sum(row.count for row in small)} tensors of fewer than {LEAST_BYTES} bytes are not listed"
    for row in (row for row in counts.rows if row.nbytes >= LEAST_BYTES):
        shape = "×".join(map(str, row.shape))
        cells = (_broken(row.pattern), shape, row.encoding, row.grid, str(row.count), f"{row.nbytes:,}")
        table.add_row(*(Text("\n".join(map(_plain, cell.split("\n")))) for cell in cells))
    return table


def _parts(counts: Counts) -> Table:
    table = _table("size by part")
    for column in ("part", "tensors", "weights", "bytes", "bits/weight", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in sorted(counts.parts.items(), key=lambda item: -item[1].nbytes):
        bits = f"{8 * part.nbytes / part.weights:.2f}" if part.weights else ""
        share = f"{100 * part.nbytes / counts.nbytes:.1f} %" if counts.nbytes else ""
        table.add_row(name, f"{part.tensors:,}", f"{part.weights:,}", f"{part.nbytes:,}", bits, share)
    return table


def _broken(name: str) -> str:
    """A long name in lines that break at its dots."""
    lines = [""]
    for part in name.replace("\n", "?").split("."):
        longer = f"{lines[-1]}.{part}" if lines[-1] else part
        if len(longer) > NAME_WIDTH and lines[-1]:
            lines[-1] += "."
            lines.append(part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        width=WIDTH,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _line(text: str) -> Text:
    """One indented line, wrapped under itself."""
    return Text(textwrap.fill(_plain(text), WIDTH, initial_indent="  ", subsequent_indent="      "))


def _plain(text: str) -> str:
    """Names from a file without control characters, which a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
