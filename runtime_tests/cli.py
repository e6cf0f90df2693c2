"""`l4q-parity`: prove that every export of a checkpoint gives the checkpoint's perplexity in its own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run


@command_line(
    "parity",
    examples=(
        "l4q-parity RUN/checkpoint exports/gptq exports/gguf --text held_out.txt \\\n--report",
        "l4q-parity RUN/checkpoint exports/gptq --text held_out.txt \\\n--python vllm=/opt/vllm/bin/python",
    ),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("exports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Held-out text, UTF-8.")
@click.option("--windows", default=4, show_default=True, type=click.IntRange(1), help="Windows from the text's middle.")
@click.option("--window", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window.")
@click.option("--new-tokens", default=48, show_default=True, type=click.IntRange(0), help="Greedy tokens; 0 skips.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads per engine.")
@click.option(
    "--engine-timeout", "--timeout", "timeout", default=900.0, show_default=True, metavar="SECONDS",
    type=click.FloatRange(0, min_open=True), help="How long one engine may take to load, and for one answer.",
)  # fmt: skip
@click.option("--python", "pythons", multiple=True, metavar="ENGINE=PATH", help="Another interpreter for an engine.")
@click.option(
    "--report", type=click.Path(path_type=Path), default=None, is_flag=False, flag_value=Path("parity"),
    metavar="[DIR|FILE.json]", help="Write report.html and report.json here; into ./parity if no place is given.",
)  # fmt: skip
@click.option(
    "--start", type=click.Path(path_type=Path), default=None, metavar="FOLDER",
    help="16-bit model for the report's weight errors; found by itself where the run's record names it.",
)  # fmt: skip
@click.option(
    "--card/--no-card", default=True, show_default=True, help="Put the figures into the exports' model cards."
)
def command(as_json: bool, **arguments: Any) -> None:
    """Run CHECKPOINT in torch and every folder of EXPORTS in its runtime, on the same token ids.

    Exit code 4 if any runtime differs by more than its documented bound.
    """
    from runtime_tests.run import print_table, run_and_report

    run_and_report(arguments, show=print_json if as_json else print_table)


def main() -> None:
    """Entry point of the `l4q-parity` command."""
    run(command)
