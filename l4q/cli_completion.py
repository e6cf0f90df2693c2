"""`l4q completion`: the shell's completion script for `l4q` and all `l4q-...` commands, from click itself."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from l4q.cli_command import command_line, print_json
from l4q.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@command_line(
    "completion",
    examples=(
        'eval "$(l4q completion bash)"    # a line for ~/.bashrc; ~/.zshrc: zsh',
        "l4q completion fish > ~/.config/fish/conf.d/l4q.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def command(as_json: bool, shell: str | None) -> None:
    """Print the completion script of SHELL, by default of $SHELL.

    It completes options, their values, files and subcommands of l4q and of every l4q-... command.
    """
    chosen = shell or Path(os.environ.get("SHELL", "")).name
    script = completion_script(chosen)
    if as_json:
        print_json({"shell": chosen, "script": script})
    else:
        click.echo(script)


def completion_script(shell: str) -> str:
    """The script for all commands.

    Raises:
        UsageError: The shell is not one of `SHELLS`, or bash is older than 4.4.
    """
    from l4q.cli import SUBCOMMANDS

    kind = get_completion_class(shell)
    if kind is None or shell not in SHELLS:
        raise UsageError(
            "there is no completion for this shell",
            got=shell or "no shell in $SHELL",
            expected=f"one of {', '.join(SHELLS)}",
            remedy="name it: l4q completion bash",
        )
    names = ["l4q", *(found.script for found in SUBCOMMANDS.values() if found.script)]
    return "\n".join(
        kind(click.Command(name), {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE").source() for name in names
    )
