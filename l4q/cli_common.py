"""What every command line shares: one clear message on stderr and the exit codes 0, 2, 3, 4."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import click

from l4q.errors import L4QError

INTERRUPTED = 130


def run(command: click.Command) -> NoReturn:
    """Run a command and end the process: 0 ok, 2 usage, 3 unsupported or inexact, 4 verification failed, 130 Ctrl-C."""
    sys.exit(status(command))


def status(command: click.Command) -> int:
    """Run a command on sys.argv and return its exit code; errors become one message on stderr."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("l4q").setLevel(logging.INFO)
    try:
        result = command.main(standalone_mode=False)
    except L4QError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    # With standalone_mode off, --help and --version return click's exit code instead of raising it.
    return result if isinstance(result, int) else 0
