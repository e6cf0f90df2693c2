"""Accuracy level 4 of ONNX Runtime against block size: python -m tools.onnx_levels CHECKPOINT --text FILE.

Exports the checkpoint once per block size, runs the same token windows at level 4 (and the largest block at level 0)
and compares with the torch float32 oracle. Prints a Markdown table; the last line of stdout is one JSON object.
Decoding is timed in the process's own CPU time on one thread, the fastest of several steps, so that other load matters
less.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from exporters.driver import export
from exporters.onnx.pack import MIN_BLOCK, choose_block
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_common import run
from runtime_tests.compare import LogprobComparison
from runtime_tests.engines.onnxruntime_engine import Engine as OnnxEngine
from runtime_tests.engines.torch_engine import Engine as TorchEngine
from runtime_tests.run import read_windows

COLUMNS = ("block", "level", "MB", "perplexity", "Δ to oracle", "KL", "top-1", "decode ms")


def blocks_of(checkpoint: L4QCheckpoint) -> list[int]:
    """Block sizes that fit every group, largest first."""
    infos = [checkpoint.info(module) for module in checkpoint.modules]
    block = min(
        choose_block(in_features=info.in_features, group_size=info.group_size, requested=None, where="")
        for info in infos
    )
    sizes = []
    while block >= MIN_BLOCK:
        sizes.append(block)
        block //= 2
    return sizes


def decode_milliseconds(engine: OnnxEngine, prompt: list[int], steps: int) -> float:
    """CPU time of a decoding step: two generations' difference, the least of three."""
    found = []
    for _ in range(3):
        spent = []
        for tokens in (1, 1 + steps):
            began = time.process_time()
            new, _ = engine.generate(prompt, tokens)
            spent.append((time.process_time() - began, len(new)))
        found.append((spent[1][0] - spent[0][0]) / max(spent[1][1] - spent[0][1], 1))
    return 1000 * min(found)


def measure(
    checkpoint: L4QCheckpoint, windows: list[list[int]], prompt: list[int], folder: Path
) -> list[dict[str, Any]]:
    """One row per block size and level."""
    blocks = blocks_of(checkpoint)
    cases = [(blocks[0], 0), *((block, 4) for block in blocks)]
    for block in blocks:
        export(checkpoint, "onnx", folder / str(block), ExportOptions(onnx_block_size=block), check="none")
    comparisons = [LogprobComparison() for _ in cases]
    oracle = TorchEngine(str(checkpoint.path))
    engines = [OnnxEngine(str(folder / str(block)), threads=1, accuracy_level=level) for block, level in cases]
    for window in windows:
        expected = oracle.prompt_logprobs(window)
        for comparison, engine in zip(comparisons, engines, strict=True):
            comparison.add(window, expected, engine.prompt_logprobs(window))
    rows = []
    for (block, level), comparison, engine in zip(cases, comparisons, engines, strict=True):
        size = (folder / str(block) / "model.onnx.data").stat().st_size
        decode = decode_milliseconds(engine, prompt, 12)
        rows.append({"block": block, "level": level, "bytes": size, "decode_ms": decode, **comparison.stats.to_dict()})
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/onnx.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = (
            row["block"],
            row["level"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['delta_percent']:+.3f} %",
            f"{row['kl']:.1e}",
            f"{100 * row['top1']:.2f} %",
            f"{row['decode_ms']:.1f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True), help="Held-out text.")
@click.option("--windows", type=click.IntRange(1), default=4, show_default=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens in each.")
def command(checkpoint: Path, text: Path, windows: int, window: int) -> None:
    """Compare accuracy level 4 of CHECKPOINT's ONNX export over all block sizes that fit its groups."""
    opened = L4QCheckpoint.open(checkpoint)
    token_windows, prompt = read_windows(checkpoint, text, windows, window)
    with tempfile.TemporaryDirectory(prefix="onnx-levels-") as folder:
        rows = measure(opened, token_windows, prompt, Path(folder))
    click.echo(as_markdown(rows))
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    run(command)
