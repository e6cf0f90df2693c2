"""From cell results to tables and the headline: means and spreads over seeds, blank where nothing was measured."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.reproduction.methods import DEPLOYABLE, METHODS, OURS, REFERENCE_BEST, REFERENCE_WORST
from tools.reproduction.recipe import Cell, Recipe

HEADLINE_TEXT = "wiki_demo"
SECOND_TEXT = "heldout"
HALF_BITS = 16


@dataclass
class Row:
    """What was measured for one row at one width, seed by seed."""

    perplexity: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    accuracy: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bits_per_weight: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def mean(self, text: str = HEADLINE_TEXT) -> float | None:
        """Mean perplexity over the seeds there are."""
        values = self.perplexity.get(text)
        return statistics.fmean(values) if values else None


Results = dict[tuple[str, int], Row]
"""(row name, bits) -> figures."""


def load_results(cells: Iterable[Cell], out: Path, bits: Sequence[int]) -> Results:
    """Read the result files of the cells that have one."""
    results: Results = {}
    for cell in cells:
        path = out / f"{cell.name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found["rows"]:
            if entry["bits"] in (*bits, HALF_BITS):
                _add(results.setdefault((entry["row"], entry["bits"]), Row()), entry, found["training"])
    return results


def gap_closed(results: Results, row: str, bits: int) -> float | None:
    """Share of the way back from round-to-nearest (0) to 16-bit LoRA (1) in mean headline perplexity."""
    worst, best = _mean(results, REFERENCE_WORST, bits), _mean(results, REFERENCE_BEST, HALF_BITS)
    own = _mean(results, row, HALF_BITS if (row, HALF_BITS) in results else bits)
    if worst is None or best is None or own is None or worst == best:
        return None
    return (worst - own) / (worst - best)


def headline(results: Results, bits: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{"bits3": {"gap_closed", "l4q", "best_baseline_gap_closed", "best_baseline"}, ...}.

    The best L4Q row and the best row among the other methods that deploy one quantized file; null without a figure.
    """
    found: dict[str, dict[str, Any]] = {}
    for width in bits:
        ours, our_gap = _best(results, OURS, width)
        theirs, their_gap = _best(results, [row for row in DEPLOYABLE if row not in OURS], width)
        found[f"bits{width}"] = {
            "gap_closed": our_gap,
            "l4q": ours,
            "best_baseline_gap_closed": their_gap,
            "best_baseline": theirs,
        }
    return found


def markdown(results: Results, recipe: Recipe, bits: Sequence[int], seeds: Sequence[int]) -> str:
    """All tables. A cell that was not measured is an empty cell."""
    settings = (
        f"{recipe.model}: {recipe.steps} steps of {recipe.batch} x {recipe.length} tokens, group {recipe.group_size}, "
        f"rank {recipe.rank}, alpha {recipe.alpha:g}, learning rate {recipe.lr:g}, seeds {', '.join(map(str, seeds))}, "
        f"{recipe.device}{', bfloat16 products' if recipe.amp else ''}, "
        f"L4Q from the {recipe.init} initialisation. "
        f"Perplexity as deployed on {recipe.eval_windows} windows of {recipe.eval_window} tokens; "
        "mean ± standard deviation over seeds."
    )
    parts = [settings]
    for width in bits:
        parts += ["", f"### {width} bits", "", *_table(results, width)]
    return "\n".join(parts)


def _table(results: Results, bits: int) -> list[str]:
    benchmarks = sorted({name for row in results.values() for name in row.accuracy})
    columns = ["method", "one quantized file", "Wikipedia", "held-out leads", "gap closed", "bits/weight", "step s"]
    columns += ["training peak MB", *benchmarks]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method in METHODS.values():
        for name in method.rows:
            row = results.get((name, HALF_BITS)) or results.get((name, bits)) or Row()
            gap = gap_closed(results, name, bits)
            values = [
                name,
                "yes" if name in DEPLOYABLE else "",
                spread(row.perplexity.get(HEADLINE_TEXT, []), "{:.1f}"),
                spread(row.perplexity.get(SECOND_TEXT, []), "{:.1f}"),
                "" if gap is None else f"{100 * gap:.0f} %",
                f"{row.bits_per_weight:.2f}" if row.bits_per_weight else "",
                f"{statistics.median(row.step_seconds):.3f}" if row.step_seconds else "",
                f"{statistics.median(row.peak_bytes) / 1e6:.0f}" if row.peak_bytes else "",
                *(spread([100 * value for value in row.accuracy.get(task, [])], "{:.1f}") for task in benchmarks),
            ]
            lines.append("| " + " | ".join(values) + " |")
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone for one value, nothing for none."""
    if not values:
        return ""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def _add(row: Row, entry: dict[str, Any], training: dict[str, Any] | None) -> None:
    for text, value in entry["perplexity"].items():
        row.perplexity[text].append(value)
    for task, value in entry["accuracy"].items():
        row.accuracy[task].append(value)
    row.bits_per_weight = entry["bits_per_weight"]
    if training:
        row.step_seconds.append(training["step_seconds"])
        row.peak_bytes.append(training["peak_bytes"])


def _mean(results: Results, row: str, bits: int) -> float | None:
    return results[row, bits].mean() if (row, bits) in results else None


def _best(results: Results, rows: Sequence[str], bits: int) -> tuple[str | None, float | None]:
    gaps = {row: gap for row in rows if (gap := gap_closed(results, row, bits)) is not None}
    if not gaps:
        return None, None
    name = max(gaps, key=lambda row: gaps[row])
    return name, gaps[name]
