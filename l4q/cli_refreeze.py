"""`l4q-freeze`: a saved step of a run as a checkpoint, if asked on another grid, with what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run
from l4q.config import ScaleGrid, ZeroPoint
from l4q.train_options import EvalOptions

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command_line(
    "freeze",
    examples=(
        "l4q-freeze RUN --step 200 --out CHECKPOINT",
        "l4q-freeze RUN --zero-point integer --out CHECKPOINT --eval-text held_out.txt",
    ),
)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to create.")
@click.option("--step", type=int, help="Saved step to freeze.  [default: the newest]")
@click.option("--zero-point", type=click.Choice(get_args(ZeroPoint)), help="Other kind of zero-point: snap and recode.")
@click.option("--scale-grid", type=click.Choice(get_args(ScaleGrid)), help="Other scale values.")
@click.option("--model", help="Where the base model lies now, if it has moved.")
@click.option("--eval-text", type=FILE, help="Held-out text; perplexity as trained and as frozen.")
@click.option("--eval-window", type=int, help="Tokens per window.  [default: 512, at most the model's context]")
@click.option("--eval-windows", type=int, default=12, help="Number of windows.")
@click.option("--overwrite", is_flag=True, help="Replace an existing --out.")
def command(run_folder: Path, as_json: bool, **values: Any) -> None:
    """Freeze a saved step of RUN, a folder of l4q-train, to an L4Q checkpoint.

    With another --zero-point or --scale-grid, offsets and scales are snapped onto it and all codes taken anew from
    W0 + scaling * B A; the loss is printed per layer, as root mean square of the weight error relative to the weights.
    """
    from l4q.refreeze import FreezeOptions, refreeze

    take = values.pop
    evaluation = EvalOptions(text=take("eval_text"), window=take("eval_window"), windows=take("eval_windows"))
    result = refreeze(FreezeOptions(run=run_folder, evaluation=evaluation, **values))
    if as_json:
        print_json(result)
    else:
        click.echo(format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """The result as a table of layers, overall last, and a few lines for people."""
    lines = []
    losses = result["weight_loss"]
    if losses:
        width = max(len(loss["name"]) for loss in losses)
        lines.append(f"{'relative RMS weight error':{width}}  {'trained':>8}  {'frozen':>8}  {'change':>8}")
        lines += [
            f"{loss['name']:{width}}  {loss['trained']:8.5f}  {loss['frozen']:8.5f}  {loss['change']:8.5f}"
            for loss in losses
        ]
    lines += [f"perplexity, {stage:10} {value:.4f}" for stage, value in result["perplexity"].items()]
    grid = result["grid"]["frozen"]
    lines.append(f"step {result['step']}, zero_point {grid['zero_point']}, scale_grid {grid['scale_grid']}")
    lines.append(f"checkpoint {result['checkpoint']}")
    return "\n".join(lines)


def main() -> None:
    """Entry point of the `l4q-freeze` script."""
    run(command)
