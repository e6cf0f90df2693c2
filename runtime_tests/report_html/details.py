"""What the report shows beyond the rows' figures: tokens, sizes, weight errors, and how everything was measured."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.manifest import read_manifest
from l4q.checkpoint import L4QCheckpoint
from runtime_tests.compare import TokenTrace
from runtime_tests.parity_runs import ParityReport, ParityRow
from runtime_tests.report_html.causes import problems
from runtime_tests.report_html.measured import MEASURES
from runtime_tests.report_html.weight_error import weight_errors

POINTS = 400
BINS = 41
WORST = 10
BEFORE, AFTER = 16, 6
"""Tokens of context shown around a token."""

Decode = Callable[[Sequence[int]], str]


def describe(
    report: ParityReport,
    checkpoint: L4QCheckpoint,
    windows: Sequence[Sequence[int]],
    decode: Decode,
    *,
    start: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """report.json in full: `ParityReport.to_dict`, and everything the page shows besides.

    Args:
        report: The comparison.
        checkpoint: The checkpoint it is of.
        windows: The token ids that were compared.
        decode: Token ids to text.
        start: The 16-bit model training started from; None looks it up in the checkpoint.
        settings: Text, windows, threads: what was asked for.

    Raises:
        UsageError: `start` is given and is no folder of 16- or 32-bit safetensors.
    """
    content = report.to_dict()
    for row, source in zip(content["rows"], report.rows, strict=True):
        row["problems"] = problems(row)
        row["perplexity_band"] = perplexity_band(row)
        row["quantized_bytes"] = quantized_bytes(source, checkpoint)
        if source.trace is not None:
            row["tokens_detail"] = token_detail(source.trace, windows, decode)
    content["settings"] = {**(settings or {}), "machine": f"{platform.machine()}, {platform.system()}"}
    content["model"] = model_facts(checkpoint)
    content["weight_error"] = weight_errors(checkpoint, start)
    content["measured"] = {key: measure.how for key, measure in MEASURES.items()}
    return content


def perplexity_band(row: dict[str, Any]) -> list[float] | None:
    """[lowest, highest] perplexity that the bound on Δ allows; None where Δ has no bound."""
    bounds = [float(c["allowed"].split()[-1]) for c in row["checks"] if c["figure"] == "delta_percent"]
    if not bounds:
        return None
    oracle = row["oracle_perplexity"]
    return [oracle * (1 - bounds[0] / 100), oracle * (1 + bounds[0] / 100)]


def quantized_bytes(row: ParityRow, checkpoint: L4QCheckpoint) -> int | None:
    """Bytes of the export's quantized tensors, from its manifest; None for folders without one."""
    bits = (read_manifest(row.target.folder) or {}).get("bits_per_weight")
    return None if bits is None else round(bits * quantized_weights(checkpoint) / 8)


def quantized_weights(checkpoint: L4QCheckpoint) -> int:
    """Weights that are integers."""
    infos = [checkpoint.info(module) for module in checkpoint.modules]
    return sum(info.out_features * info.in_features for info in infos)


def model_facts(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """What the checkpoint is."""
    quantized = quantized_weights(checkpoint)
    dense = sum(int(np.prod(checkpoint.dense_shape(name))) for name in checkpoint.dense_names)
    return {
        "architecture": checkpoint.architecture,
        "grid": checkpoint.quant.to_dict(),
        "quantized_tensors": len(checkpoint.modules),
        "quantized_weights": quantized,
        "dense_weights": dense,
        "bytes_16bit": 2 * (quantized + dense),
    }


def token_detail(trace: TokenTrace, windows: Sequence[Sequence[int]], decode: Decode) -> dict[str, Any]:
    """Scatter, histogram and worst tokens of one run.

    Returns:
        scatter: At most POINTS [oracle, runtime] pairs, evenly spaced over the text, and the worst ones.
        histogram: BINS counts of runtime - oracle; `edges` bound the 99 % nearest to zero, the rest is in the end bins.
        worst: The WORST tokens with the largest |runtime - oracle|, in context.
    """
    delta = (trace.runtime - trace.oracle).astype(np.float64)
    order = np.argsort(-np.abs(np.nan_to_num(delta, posinf=1e9, neginf=-1e9)), kind="stable")
    chosen = np.unique(np.linspace(0, len(delta) - 1, min(POINTS, len(delta))).astype(int))
    points = np.union1d(chosen, order[:WORST])
    reach = max(float(np.quantile(np.abs(delta), 0.99)), 1e-9)
    counts, edges = np.histogram(np.clip(delta, -reach, reach), bins=BINS, range=(-reach, reach))
    return {
        "scatter": [[_short(trace.oracle[i]), _short(trace.runtime[i])] for i in points],
        "histogram": {"edges": [_short(edge) for edge in edges], "counts": counts.tolist()},
        "worst": [worst_token(int(i), trace, windows, decode) for i in order[:WORST]],
    }


def worst_token(number: int, trace: TokenTrace, windows: Sequence[Sequence[int]], decode: Decode) -> dict[str, Any]:
    """One scored token with its context, both log-probabilities and what each side would have said."""
    place, position = number, 0
    for index, window in enumerate(windows):  # every window has one scored token less than tokens
        position = index
        if place < len(window) - 1:
            break
        place -= len(window) - 1
    ids, at = list(windows[position]), place + 1
    return {
        "window": position,
        "position": at,
        "before": decode(ids[max(0, at - BEFORE) : at]),
        "token": decode([ids[at]]),
        "after": decode(ids[at + 1 : at + 1 + AFTER]),
        "oracle": float(trace.oracle[number]),
        "runtime": float(trace.runtime[number]),
        "delta": float(np.float64(trace.runtime[number]) - np.float64(trace.oracle[number])),
        "oracle_top": decode([int(trace.oracle_top[number])]),
        "runtime_top": decode([int(trace.runtime_top[number])]),
    }


def _short(value: Any) -> float:
    """Five significant digits: enough for a chart."""
    return float(f"{float(value):.5g}")
