"""`l4q`: the commands as subcommands, each imported only when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import click

from l4q.cli_command import did_you_mean
from l4q.cli_common import run


class Subcommand(NamedTuple):
    """Where a subcommand is defined, and its line in the help."""

    module: str
    help: str
    script: str | None = None
    """The command that does the same, if there is one."""


SUBCOMMANDS = {
    "train": Subcommand("l4q.cli_train", "Fine-tune a model and freeze it to an L4Q checkpoint.", "l4q-train"),
    "curves": Subcommand("runtime_tests.cli_curves", "Draw a run's loss, perplexity and grid as one page."),
    "freeze": Subcommand("l4q.cli_refreeze", "Freeze a saved step of a run, if asked on another grid.", "l4q-freeze"),
    "import": Subcommand(
        "l4q.cli_import", "Turn a pre-quantized model into an L4Q checkpoint of the same integers.", "l4q-import"
    ),
    "export": Subcommand("exporters.cli", "Convert an L4Q checkpoint for a runtime.", "l4q-export"),
    "verify": Subcommand(
        "exporters.cli_verify", "Check an export or a checkpoint against its manifest and source.", "l4q-verify"
    ),
    "inspect": Subcommand(
        "exporters.inspect.cli", "Show what a checkpoint, an export or a foreign model holds.", "l4q-inspect"
    ),
    "eval": Subcommand(
        "runtime_tests.cli_eval", "Perplexity and lm_eval tasks of a checkpoint or an export.", "l4q-eval"
    ),
    "parity": Subcommand("runtime_tests.cli", "Compare exports in their runtimes with the checkpoint.", "l4q-parity"),
    "env": Subcommand("l4q.cli_env", "Print versions, runtimes and the machine, for a bug report."),
    "completion": Subcommand("l4q.cli_completion", "Print the shell's completion script for all commands."),
}


class LazyGroup(click.Group):
    """A group whose help and completion need none of its subcommands' imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in `SUBCOMMANDS`."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand's module and return its `command`."""
        found = SUBCOMMANDS.get(cmd_name)
        if found is None:
            return None
        subcommand: click.Command = import_module(found.module).command
        return subcommand

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; an unknown word is answered with the nearest command."""
        if args[0] not in SUBCOMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'.{did_you_mean(args[0], list(SUBCOMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.help) for name, subcommand in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup, name="l4q", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="l4q")
def command() -> None:
    """LoRA-aware quantization: train, export, and compare runtimes."""


def main() -> None:
    """Entry point of the `l4q` script."""
    run(command)
