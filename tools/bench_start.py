"""What `l4q-export` costs before the first weight: python -m tools.bench_start.

A checkpoint of one layer of SmolLM2's shapes, with its vocabulary, is exported to every format, each time by a fresh
process; beside it the same interpreter starts, imports torch, and prints `l4q-export --help`. The last line of stdout
is one JSON object: seconds besides interpreter and torch per format, and those of `--help`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from exporters.cli import FORMATS
from l4q.cli_common import run
from tools.bench_export_models import MODELS, write_random
from tools.bench_export_report import machine, spread, table_head, table_row

COMMAND = "import sys; from exporters.cli import main; sys.argv[0] = 'l4q-export'; main()"
TORCH, HELP = "interpreter and torch", "l4q-export --help"
COLUMNS = ("process", "s", "s besides interpreter and torch")


def processes(checkpoint: Path, out: Path) -> dict[str, list[str]]:
    """Arguments of the interpreter for everything that is timed, by its name."""
    arguments = [str(checkpoint), "--out", str(out), "--no-verify", "--overwrite"]
    exports = {name: ["-c", COMMAND, *arguments, "--to", name] for name in FORMATS}
    return {TORCH: ["-c", "import torch"], HELP: ["-c", COMMAND, "--help"], **exports}


def seconds(arguments: Sequence[str]) -> float:
    """Wall time of one process, which must succeed."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - began


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--repetitions", type=click.IntRange(1), default=5, help="Of each process, in turns; one more first.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), default=Path("build/assets/smollm2"), help="SmolLM2's folder."
)
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path("build"), help="Disk.")
def command(repetitions: int, tokenizer: Path, scratch: Path) -> None:
    """Time one-layer exports by fresh processes."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-start-", dir=scratch))
    try:
        write_random(replace(MODELS["smollm2"], layers=1), folder / "checkpoint", tokenizer)
        timed: dict[str, list[float]] = {}
        for turn in range(repetitions + 1):
            for name, arguments in processes(folder / "checkpoint", folder / "export").items():
                took = seconds(arguments)
                if turn:  # the first reads files that the later ones find in memory
                    timed.setdefault(name, []).append(took)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    floor = statistics.median(timed[TORCH])
    beside = {name: statistics.median(timed[name]) - floor for name in FORMATS}
    click.echo(f"{machine()}, {repetitions} repetitions in turns: median [least, greatest]\n")
    rows = [[name, spread(values), f"{beside[name]:.2f}" if name in beside else ""] for name, values in timed.items()]
    click.echo("\n".join([*table_head(COLUMNS), *map(table_row, rows)]))
    rounded = {name: round(value, 2) for name, value in beside.items()}
    click.echo(json.dumps({"seconds_besides_torch": rounded, "help": round(statistics.median(timed[HELP]), 2)}))


if __name__ == "__main__":
    run(command)
