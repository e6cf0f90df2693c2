"""`l4q-import`: somebody else's integers as an L4Q checkpoint, to be exported to another runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run
from l4q.config import ZeroPoint

if TYPE_CHECKING:
    from l4q.importing.plan import ImportPlan

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)


@command_line(
    "import",
    examples=(
        "l4q-import model.gguf --out CHECKPOINT",
        "l4q-import TheBloke/TinyLlama-1.1B-GPTQ --out CHECKPOINT --dry-run",
    ),
)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to create.")
@click.option(
    "--model-config",
    "config",
    type=FOLDER,
    help="Folder with config.json and tokenizer, in place of a GGUF file's own.",
)
@click.option(
    "--zero-point",
    type=click.Choice(get_args(ZeroPoint)),
    help="Kind of zero-point of the checkpoint.  [default: the narrowest of those that hold most modules]",
)
@click.option("--allow-dense", is_flag=True, help="Keep modules that do not fit as dense float32, instead of stopping.")
@click.option("--dry-run", is_flag=True, help="Print what would become of each module and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an existing --out.")
def command(as_json: bool, **values: Any) -> None:
    """Turn SOURCE into an L4Q checkpoint that holds the same integers.

    SOURCE is a GPTQ, AWQ or compressed-tensors folder or hub id, or a GGUF file with Q4_0 or Q4_1 blocks. Nothing is
    quantized again: every weight of a module keeps its value, or the module is refused with the reason.
    """
    from l4q.importing import ImportOptions, import_model

    options = ImportOptions(**values)
    plan = import_model(options)
    written = None if options.dry_run else str(options.out)
    if as_json:
        print_json({**plan.to_dict(), "checkpoint": written})
    else:
        click.echo(format_plan(plan, Console().width))
    if options.dry_run:
        plan.check(allow_dense=options.allow_dense)
    elif not as_json:
        click.echo(f"checkpoint {written}")


def format_plan(plan: ImportPlan, width: int = 80) -> str:
    """The plan as a few lines of at most `width`: equal fates of modules are counted, refused modules are named."""
    from l4q.importing.plan import grid_words

    fates = Counter((module.own or "no linear grid", module.exact) for module in plan.modules)
    lines = [f"{plan.format}: {plan.source}"]
    lines += [f"{count:5} modules {'exact' if exact else 'REFUSED'}: {own}" for (own, exact), count in fates.items()]
    lines += [f"      {module.name}: {module.reason}" for module in plan.refused]
    lines += [f"note: {note}" for note in plan.notes]
    lines.append(f"grid: {grid_words(plan.quant) if plan.quant else 'none'}")
    folded = (wrap(line, width, subsequent_indent=" " * 8, break_on_hyphens=False) for line in lines)
    return "\n".join(piece for pieces in folded for piece in pieces)


def main() -> None:
    """Entry point of the `l4q-import` script."""
    run(command)


if __name__ == "__main__":
    main()
