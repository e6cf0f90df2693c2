"""The paper's comparison, reproduced small: python -m tools.reproduce [--model smollm2] [--resume].

Every cell (method x bits x seed) trains on the same sequences for the same steps and is measured as deployed, on
held-out text. Each writes one JSON file into --out; the last line of stdout is one JSON object:
{"bits3": {"gap_closed", "best_baseline_gap_closed"}, "bits4": ...}. The gap closed is 0 at round-to-nearest of the
original model and 1 at 16-bit LoRA.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from l4q.cli_common import run
from l4q.errors import L4QError, UsageError
from tools.reproduction.methods import METHODS
from tools.reproduction.recipe import MODELS, Cell, Recipe, plan_cells
from tools.reproduction.tables import Results, headline, load_results, markdown

ASSETS = Path("build/assets")
RESULTS = Path("build/reproduce")


class CellError(L4QError):
    """Cells that ended without a result."""

    exit_code = 4


def pending(cells: Sequence[Cell], out: Path, recipe: Recipe, bits: Sequence[int], *, resume: bool) -> list[Cell]:
    """The cells that still have to run.

    Raises:
        UsageError: Results are there and `resume` is off, or they come from another recipe.
    """
    left = []
    for cell in cells:
        path = out / f"{cell.name}.json"
        if not path.is_file():
            left.append(cell)
            continue
        if not resume:
            raise UsageError(
                "the folder already holds results", where=path, remedy="add --resume to go on, or choose another --out"
            )
        found = _read(path)
        if found.get("recipe_key") != recipe.key(cell.method):
            raise UsageError(
                "a result comes from another recipe",
                where=path,
                got=found.get("recipe"),
                expected=recipe.to_dict(),
                remedy="repeat the run with its own options, or choose another --out",
            )
        if cell.bits is None and not set(bits) <= set(found["all_bits"]):
            left.append(cell)
    return left


def run_cells(
    cells: Sequence[Cell], recipe: Recipe, bits: tuple[int, ...], assets: Path, out: Path
) -> dict[str, int | None]:
    """Run cells one after another, each in a fresh process; returns the exit code of those that failed.

    The processes are forked from a server that has only imported torch and transformers, so that none pays for the
    import and none inherits another's memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.reproduction.worker"])
    failed: dict[str, int | None] = {}
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        row = bars.add_task("", total=len(cells))
        for cell in cells:
            bars.update(row, description=cell.name)
            process = context.Process(target=_child, args=(cell, recipe, bits, assets, out))
            process.start()
            process.join()
            if process.exitcode or not (out / f"{cell.name}.json").is_file():
                failed[cell.name] = process.exitcode
            bars.advance(row)
    return failed


def _child(cell: Cell, recipe: Recipe, bits: tuple[int, ...], assets: Path, out: Path) -> None:
    from tools.reproduction.worker import run_cell

    run_cell(cell, recipe, bits, assets, out)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("a result cannot be read", where=path, got=error, remedy="delete the file") from error
    return found


def _recipe(model: str, device: str, changes: dict[str, Any]) -> Recipe:
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(MODELS[model], device=device, **given)


def _integers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in value.split(","))
    except ValueError as error:
        raise click.BadParameter("give whole numbers separated by commas, such as 4,3") from error


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(list(MODELS)), default="glassllm", help="Model under build/assets.")
@click.option("--methods", default=",".join(METHODS), help="Comma-separated.")
@click.option("--bits", default="4,3", callback=_integers, help="Comma-separated bit widths.")
@click.option("--seeds", default="0,1,2", callback=_integers, help="Comma-separated: data order, LoRA's A.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: the model's: 60 for glassllm, 40 for smollm2]")
@click.option("--lr", type=float, help="Learning rate of A and B in every method.  [default: the model's]")
@click.option("--scale-lr", type=float, help="Learning rate of trained scales.  [default: the model's]")
@click.option("--offset-lr", type=float, help="Learning rate of trained offsets.  [default: the model's]")
@click.option("--benchmark-items", type=int, help="Questions per CSQA and MMLU task, 0 = none.  [default: 0]")
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--assets", type=click.Path(path_type=Path), default=ASSETS, help="Models and texts.")
@click.option("--out", type=click.Path(path_type=Path), help="Results.  [default: build/reproduce/MODEL]")
@click.option("--resume", is_flag=True, help="Skip cells that have their result.")
@click.option("--table-only", is_flag=True, help="Run nothing: print the tables of the results that are there.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the tables to this Markdown file too.")
def command(
    model: str, methods: str, bits: tuple[int, ...], seeds: tuple[int, ...], device: str, **options: Any
) -> None:
    """Compare L4Q with its baselines at equal data, steps and seeds; prints tables, then one JSON line."""
    changes = {name: options[name] for name in ("steps", "lr", "scale_lr", "offset_lr", "benchmark_items")}
    recipe = _recipe(model, device, changes)
    cells = plan_cells(tuple(methods.split(",")), bits, seeds)
    out: Path = options["out"] or RESULTS / model
    out.mkdir(parents=True, exist_ok=True)
    todo = pending(cells, out, recipe, bits, resume=options["resume"] or options["table_only"])
    todo = [] if options["table_only"] else todo
    began = time.monotonic()
    failed = run_cells(todo, recipe, bits, options["assets"], out)
    results: Results = load_results(cells, out, bits)
    text = markdown(results, recipe, bits, seeds)
    click.echo(text)
    if options["report"]:
        options["report"].write_text(text + "\n", encoding="utf-8")
    click.echo(f"{len(todo)} cells in {(time.monotonic() - began) / 60:.1f} minutes; results in {out}", err=True)
    click.echo(json.dumps(headline(results, bits)))
    if failed:
        raise CellError(
            "cells ended without a result",
            got=", ".join(f"{name} (exit {code})" for name, code in failed.items()),
            remedy="their rows are blank; run again with --resume to retry them",
        )


def main() -> None:
    """Entry point."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    run(command)


if __name__ == "__main__":
    main()
