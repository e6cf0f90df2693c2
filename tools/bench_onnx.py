"""Load time and memory of an ONNX export: python -m tools.bench_onnx [EXPORT] [--layers N].

EXPORT is a folder that l4q-export wrote with --onnx-runtime-optimized. Without one, a llama of 7B's shapes with random
codes and N layers (11 make 2.3 GB, more than one protobuf may hold) is written to --scratch, exported there with
verification, and removed at the end; the export's own memory is measured too. Every measurement is a fresh process.
The last line of stdout is one JSON object; `load_ratio` is the plain file's load time divided by that of the saved
optimized graph, `load_cpu_ratio` the same of CPU time, which other load disturbs less. Memory is private memory: pages
of a mapped file can be dropped at any time and are not counted.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from l4q.cli_common import run
from l4q.errors import UsageError, VerificationError
from tools.measure import private_bytes

SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
GROUP = 64
PROTOBUF_LIMIT = 2**31
PROMPT = [1, 5, 17, 42]
SAME = 1e-2
"""Difference of logits, as a share of the largest: sums in another order, and at level 4 a few activations' int8."""


def write_random(folder: Path, layers: int) -> None:
    """An L4Q checkpoint of a llama with random codes, written tensor by tensor."""
    import torch

    from l4q.checkpoint import save_checkpoint
    from l4q.config import QuantConfig
    from l4q.weight import QuantizedWeight

    rng = np.random.default_rng(0)
    hidden, inner = SHAPES["hidden_size"], SHAPES["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}

    def weights() -> Iterator[tuple[str, QuantizedWeight]]:
        for layer in range(layers):
            for name, shape in shapes.items():
                codes = rng.integers(0, 16, shape, dtype=np.uint8)
                scales = rng.uniform(1e-3, 3e-3, (shape[0], shape[1] // GROUP)).astype(np.float16)
                weight = QuantizedWeight(codes=codes, scales=scales, bits=4, group_size=GROUP, zeros=None)
                yield f"model.layers.{layer}.{name}", weight

    def dense() -> Iterator[tuple[str, Any]]:
        matrix = torch.randn(SHAPES["vocab_size"], hidden, generator=torch.Generator().manual_seed(0)) * 0.02
        yield from (("model.embed_tokens.weight", matrix), ("lm_head.weight", matrix))
        yield "model.norm.weight", torch.ones(hidden)
        for layer in range(layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{name}.weight", torch.ones(hidden)

    config = {**SHAPES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    quant = QuantConfig(bits=4, group_size=GROUP, zero_point="none")
    save_checkpoint(folder, config=config, weights=weights(), dense=dense(), quant=quant)


def export_folder(checkpoint: str, out: str) -> dict[str, float]:
    """Export with verification, then let ONNX Runtime save its graph; figures of the export alone."""
    from exporters.driver import export
    from l4q.checkpoint import L4QCheckpoint

    began = time.perf_counter()
    with private_peak() as peak:
        result = export(L4QCheckpoint.open(checkpoint), "onnx", out)
    exact = result.verified.exact if result.verified else 0
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak[0], "exact_modules": exact}


def optimize_folder(folder: str, linears: int) -> None:
    """Add the graph that ONNX Runtime saves."""
    from exporters.onnx.optimized import write_optimized

    write_optimized(Path(folder), 0, linears)


def load_file(path: str, level: str) -> dict[str, Any]:
    """Create a session and run one prompt; seconds of the first, the process's peak, the last row's largest logits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    with private_peak() as peak:
        began, spent = time.perf_counter(), time.process_time()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    feeds = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in caches}
    feeds |= {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    logits = session.run(["logits"], feeds)[0][0, -1]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak[0],
        "logits": np.sort(logits)[-5:].tolist(),
    }


@contextmanager
def private_peak(interval: float = 0.01) -> Iterator[list[int]]:
    """A list whose one entry becomes the largest private memory of this process inside the block, sampled."""
    peak, done = [private_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measured(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a process of its own, so that peaks and caches are its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


@contextmanager
def random_export(scratch: Path, layers: int, report: dict[str, Any]) -> Iterator[Path]:
    """A synthetic export in a temporary folder; its sizes and the export's memory go into the report."""
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="bench-onnx-"))
    try:
        measured(write_random, folder / "checkpoint", layers)
        report["export"] = measured(export_folder, str(folder / "checkpoint"), str(folder / "onnx"))
        shutil.rmtree(folder / "checkpoint")
        measured(optimize_folder, str(folder / "onnx"), report["export"]["exact_modules"])
        yield folder / "onnx"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_folder(folder: Path, repetitions: int, report: dict[str, Any]) -> None:
    """Sizes, then both files loaded in turns.

    Raises:
        UsageError: The folder lacks one of the two files.
        VerificationError: They do not compute the same.
    """
    from exporters.onnx.optimized import OPTIMIZED_NAME

    files = {"plain": folder / "model.onnx", "optimized": folder / OPTIMIZED_NAME}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UsageError(
            "the folder lacks a file", where=folder, got=missing, remedy="export with --onnx-runtime-optimized"
        )
    report["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.glob("model*"))}
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    level = config["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for _ in range(repetitions):
        for name, path in files.items():
            found[name].append(measured(load_file, str(path), level))
    answers = np.array([run["logits"] for runs in found.values() for run in runs])  # [runs, 5]
    if np.ptp(answers, axis=0).max() > SAME * np.abs(answers).max():
        raise VerificationError("the two files do not compute the same", where=folder, got=answers.tolist())
    for name, runs in found.items():
        report[f"{name}_load_seconds"] = statistics.median(run["seconds"] for run in runs)
        report[f"{name}_load_cpu_seconds"] = statistics.median(run["cpu_seconds"] for run in runs)
        report[f"{name}_peak_bytes"] = statistics.median(run["peak_bytes"] for run in runs)
    report["load_ratio"] = report["plain_load_seconds"] / report["optimized_load_seconds"]
    report["load_cpu_ratio"] = report["plain_load_cpu_seconds"] / report["optimized_load_cpu_seconds"]
    report["over_protobuf_limit"] = report["bytes"]["model.onnx.data"] > PROTOBUF_LIMIT


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("export", required=False, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--layers", type=click.IntRange(1), default=11, show_default=True, help="Of the random model.")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), default=Path(), help="For the random model.")
def command(export: Path | None, layers: int, repetitions: int, scratch: Path) -> None:
    """Measure how fast ONNX Runtime loads EXPORT, plain and optimized; a random model of many gigabytes without one."""
    report: dict[str, Any] = {}
    if export is not None:
        measure_folder(export, repetitions, report)
    else:
        with random_export(scratch, layers, report) as folder:
            measure_folder(folder, repetitions, report)
    by_clock, by_cpu = report["load_ratio"], report["load_cpu_ratio"]
    Console(stderr=True).print(f"plain / optimized: {by_clock:.2f} by the clock, {by_cpu:.2f} in CPU time")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    run(command)
