"""`l4q-eval`: perplexity of any checkpoint or export in its own runtime, and lm_eval tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run


@command_line(
    "eval",
    examples=(
        "l4q-eval exports/gguf --text held_out.txt --tokenizer RUN/checkpoint",
        "l4q-eval RUN/checkpoint --tasks piqa,arc_easy --task-data TASK_FOLDER",
    ),
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Held-out text, UTF-8: measure perplexity on it.")
@click.option("--windows", default=12, type=click.IntRange(1), help="Windows from the text's middle.")
@click.option("--window", default=512, type=click.IntRange(2), help="Tokens per window.")
@click.option("--engine", help="Runtime for the perplexity.  [default: the format's own]")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer.  [default: MODEL]")
@click.option("--tasks", default="", help="lm_eval tasks, comma-separated (checkpoints and Hugging Face folders).")
@click.option("--task-data", type=click.Path(path_type=Path), help="Folder of TASK.yaml files with local data.")
@click.option("--limit", type=click.IntRange(1), help="First questions of each task.  [default: all]")
@click.option("--batch-size", default=1, type=click.IntRange(1), help="Task requests per forward pass.")
@click.option("--threads", default=2, type=click.IntRange(1), help="Threads of the engine.")
@click.option(
    "--engine-timeout", "--timeout", "timeout", default=900.0, metavar="SECONDS",
    type=click.FloatRange(0, min_open=True), help="How long the engine may take to load, and for one answer.",
)  # fmt: skip
@click.option("--python", "pythons", multiple=True, metavar="ENGINE=PATH", help="Another interpreter for an engine.")
def command(as_json: bool, **arguments: Any) -> None:
    """Evaluate MODEL: an L4Q checkpoint, a folder written by l4q-export, or a Hugging Face model folder."""
    from runtime_tests.run_eval import evaluate

    result = evaluate(arguments)
    if as_json:
        print_json(result)
    else:
        click.echo(format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    lines = [f"{'model':24} {result['model']}", f"{'format':24} {result['format']}"]
    if result["perplexity"] is not None:
        lines.append(f"{'runtime':24} {result['runtime']['runtime']} {result['runtime']['version']}")
        lines.append(f"{'perplexity':24} {result['perplexity']:.4f}   ({result['tokens']} tokens)")
    for task, metrics in result["tasks"].items():
        values = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        lines.append(f"{task:24} {values}")
    return "\n".join(lines)


def main() -> None:
    """Entry point of the `l4q-eval` command."""
    run(command)
