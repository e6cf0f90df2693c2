"""`l4q-verify`: check an exported folder or a checkpoint against its manifest, and against its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from l4q.cli_common import run
from l4q.errors import VerificationError


@click.command(
    name="verify",
    epilog="Example: l4q-verify exports/gguf --source RUN/checkpoint",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint it was exported from.")
@click.option(
    "--verify", "mode", type=click.Choice(["full", "sample", "none"]), default="full", show_default=True,
    help="With --source: how many quantized tensors to decode with foreign code and compare.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(folder: Path, as_json: bool, **values: Any) -> None:
    """Check that FOLDER, an export or an L4Q checkpoint, holds the files its manifest lists, byte for byte.

    Missing, extra, truncated and changed files are named. With --source the checkpoint must be the one that was
    exported, and its weights are compared with what decoders that are not l4q's read in FOLDER. Exit code 4 if
    anything differs.
    """
    from exporters.check_folder import check_folder

    checked = check_folder(folder, **values)
    click.echo(json.dumps(checked.to_dict(), indent=2) if as_json else "\n".join(checked.lines()))
    if not checked.passed:
        raise VerificationError("the folder is not what was written", where=folder, got="see the list above")


def main() -> None:
    """Entry point of the `l4q-verify` command."""
    run(command)
