"""`make demo`: train SmolLM2-135M-Instruct at 4 bits, export it to three formats, run each in its own runtime.

Everything goes through the commands a user would type; added here are only two baselines (the 16-bit model, and
round-to-nearest on the same grid) and the closing table. A second run reuses whatever is complete.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from l4q.cli_common import run

PROJECT = Path(__file__).resolve().parent.parent
ASSETS = PROJECT / "build" / "assets"
MODEL = ASSETS / "smollm2"
OUT = PROJECT / "build" / "demo"
TRAIN_TEXT = ASSETS / "text" / "train.txt"
HELD_OUT = ASSETS / "text" / "wiki_demo.txt"
FORMATS = ("gptq", "gguf", "onnx")
GRID: dict[str, Any] = {"bits": 4, "group_size": 64, "zero_point": "none"}
WINDOWS, WINDOW = 4, 512

console = Console()


@click.command(name="demo")
@click.option("--steps", default=40, show_default=True, help="Training steps of 1,024 tokens.")
def command(steps: int) -> None:
    """Train, export and compare; results in build/demo."""
    started = time.monotonic()
    train(steps)
    for name in FORMATS:
        export(name)
    report = compare()
    conclude(report, time.monotonic() - started)


def train(steps: int) -> None:
    """`l4q-train` into build/demo; the run folder's checkpoint/ is what gets exported."""
    if (OUT / "checkpoint" / "config.json").is_file():
        console.print("[bold]training[/]: reusing build/demo/checkpoint")
        return
    resume = ["--resume"] if OUT.exists() else []
    grid = [f"--{key.replace('_', '-')}={value}" for key, value in GRID.items()]
    sizes = [f"--steps={steps}", "--max-length=1024", "--batch-size=1", "--save-every=10", "--seed=0"]
    tool("l4q-train", MODEL, "--data", TRAIN_TEXT, *grid, *sizes, "--out", OUT, *resume)


def export(name: str) -> None:
    """`l4q-export` to one format."""
    if (OUT / name).is_dir():
        console.print(f"[bold]export[/]: reusing build/demo/{name}")
        return
    tool("l4q-export", OUT / "checkpoint", "--to", name, "--out", OUT)


def compare() -> dict[str, Any]:
    """`l4q-parity` over the three folders, and the baselines; the report of a complete earlier run is reused."""
    from runtime_tests.report import write_report

    path = OUT / "report.json"
    if path.is_file():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "baselines" in report:
            console.print("[bold]parity[/]: reusing build/demo/report.json")
            return report
    folders = [OUT / name for name in FORMATS]
    counts = [f"--windows={WINDOWS}", f"--window={WINDOW}"]
    tool("l4q-parity", OUT / "checkpoint", *folders, "--text", HELD_OUT, *counts, "--report", path)
    report = json.loads(path.read_text(encoding="utf-8"))
    report["baselines"] = baselines()
    write_report(report, path)  # once more, with the baselines
    return report


def baselines() -> dict[str, float]:
    """Perplexity of the 16-bit model and of its round-to-nearest on the same grid, on the same windows."""
    import torch
    from transformers import AutoModelForCausalLM

    from l4q.config import LoraConfig, QuantConfig
    from l4q.evaluate import windows_perplexity
    from l4q.model import wrap_linears
    from runtime_tests.run import progress_bars, read_windows

    windows, _ = read_windows(OUT / "checkpoint", HELD_OUT, WINDOWS, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    figures = {}
    with progress_bars() as progress:
        for name in ("16-bit model, not tuned", "round-to-nearest"):
            done = 0

            def advance(count: int, label: str = name) -> None:
                nonlocal done
                done += count
                progress(label, done, len(windows))

            figures[name] = windows_perplexity(model, windows, on_windows=advance).value
            if name == "16-bit model, not tuned":
                wrap_linears(model, QuantConfig(**GRID), LoraConfig())  # untrained: B = 0, so this rounds to nearest
    return figures


def conclude(report: dict[str, Any], seconds: float) -> None:
    """Print the table and what it says."""
    from runtime_tests.report import table

    wide = Console(width=max(console.width, 150))
    wide.print(table(report, "SmolLM2-135M-Instruct, L4Q 4-bit, one set of integers in three runtimes"))
    trained, rounded = report["oracle"]["perplexity"], report["baselines"]["round-to-nearest"]
    better = 100 * (1 - trained / rounded)
    console.print(f"L4Q {trained:.3f} against round-to-nearest {rounded:.3f} on held-out text: {better:.1f} % lower.")
    console.print("The start is a 4-bit GGUF of SmolLM2 (the copy PyPI has), and Wikipedia is in its pretraining:")
    console.print("read these perplexities as differences between rows.")
    console.print(f"Folders, report.html and report.json: {OUT.relative_to(PROJECT)}. Took {seconds / 60:.1f} minutes.")


def tool(name: str, *arguments: object) -> None:
    """Run one of the project's commands as a user would, showing it first."""
    words = [str(argument) for argument in arguments]
    shown = " ".join(word.replace(f"{PROJECT}/", "") for word in words)
    console.print(f"[bold]$ {name}[/] {shown}", highlight=False)
    finished = subprocess.run([str(Path(sys.executable).parent / name), *words], cwd=PROJECT, check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


if __name__ == "__main__":
    run(command)
