"""`l4q-verify`: check an exported folder or a checkpoint against its manifest, and against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run
from l4q.errors import VerificationError


@command_line("verify", examples=("l4q-verify RUN/checkpoint", "l4q-verify exports/gguf --source RUN/checkpoint"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint it was exported from.")
@click.option(
    "--verify", "mode", type=click.Choice(["full", "sample", "none"]), default="full", show_default=True,
    help="With --source: how many quantized tensors to decode with foreign code and compare.",
)  # fmt: skip
def command(folder: Path, as_json: bool, **values: Any) -> None:
    """Check that FOLDER, an export or an L4Q checkpoint, holds the files its manifest lists, byte for byte.

    Missing, extra, truncated and changed files are named. With --source the checkpoint must be the one that was
    exported, and its weights are compared with what decoders that are not l4q's read in FOLDER. Exit code 4 if
    anything differs.
    """
    from exporters.check_folder import check_folder

    checked = check_folder(folder, **values)
    if as_json:
        print_json(checked.to_dict())
    else:
        click.echo("\n".join(checked.lines()))
    if not checked.passed:
        raise VerificationError("the folder is not what was written", where=folder, got="see the list above")


def main() -> None:
    """Entry point of the `l4q-verify` command."""
    run(command)
