"""What every command line shares: one clear message on stderr, and exit codes.

0 ok, 2 usage, 3 unsupported or inexact, 4 verification failed, 74 the output could not be written, 75 another process
is writing it; 128 + n when ended by signal n: 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal. A signal unwinds the
command as Ctrl-C does, so that it cleans up first.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

import click

from l4q.errors import L4QError, OutputError, PeerError, UsageError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command after it has cleaned up."""
UNEXPECTED = 70
"""sysexits' EX_SOFTWARE: a defect, or not enough memory."""
DEBUG_VARIABLE = "L4Q_DEBUG"
"""Environment variable: let unexpected errors end in a traceback."""


class SpreadCommand(click.Command):
    """A command whose repeatable options also take several values at once: `--to gptq gguf` is `--to gptq --to gguf`.

    Only words that the option accepts belong to it (a choice it offers, or a file that exists), so that an argument
    after them is not swallowed.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each further value, then parse as usual."""
        spread = {name: p for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        words: list[str] = []
        current: str | None = None
        for word in args:
            if word.startswith("-"):
                current = word if word in spread else None
            elif current is not None and words[-1] != current:
                if _accepts(spread[current], word):
                    words.append(current)
                else:
                    current = None
            words.append(word)
        return super().parse_args(ctx, words)


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes, as 1234, 500MB (decimal) or 2GiB (binary)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; a value that is a number already passes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*(?:([KMGT])(i?)B|B)?", str(value).strip(), re.IGNORECASE)
        if match is None or int(match.group(1)) == 0:
            self.fail(f"{value!r} is not a size like 500MB or 2GiB", param, ctx)
        size = int(match.group(1))
        for _ in range(" KMGT".index((match.group(2) or " ").upper())):
            size *= 1024 if match.group(3) else 1000
        return size


def _accepts(option: click.Option, word: str) -> bool:
    if isinstance(option.type, click.Choice):
        return word in option.type.choices
    return isinstance(option.type, click.Path) and Path(word).is_file()


def run(command: click.Command) -> NoReturn:
    """Run a command and end the process with its exit code."""
    sys.exit(status(command))


def status(command: click.Command) -> int:
    """Run a command on sys.argv and return its exit code; errors become one message on stderr.

    Of the processes of a distributed run only the first reports; another one speaks up when it fails alone.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    rank = int(os.environ.get("RANK", "0"))
    logging.getLogger("l4q").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    with _unwinding() as received:
        return _status(command, rank, received)


def _status(command: click.Command, rank: int, received: list[signal.Signals]) -> int:
    try:
        result = command.main(standalone_mode=False)
    except L4QError as error:
        if rank == 0 or not _everywhere(error):
            click.echo(f"{'' if rank == 0 else f'process {rank}: '}error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        if rank == 0:
            error.show()
        return error.exit_code
    except OSError as error:
        click.echo(f"error: the system refuses: {error}", err=True)
        return OutputError.exit_code
    except (click.Abort, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        click.echo(f"interrupted by {number.name}; nothing half-written was left", err=True)
        return 128 + number
    except Exception as error:
        return _unexpected(error)
    # With standalone_mode off, --help and --version return click's exit code instead of raising it.
    return result if isinstance(result, int) else 0


@contextmanager
def _unwinding() -> Iterator[list[signal.Signals]]:
    """Let the signals of `ENDING` raise KeyboardInterrupt within the block; yields those that came."""
    received: list[signal.Signals] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    # What is ignored (nohup) stays ignored; only the main thread may ask at all.
    asked = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    former = {number: signal.signal(number, interrupt) for number in asked if current_thread() is main_thread()}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _unexpected(error: Exception) -> int:
    """Report what nobody foresaw in one line; the traceback is for who asks for it.

    Raises:
        Exception: The error itself, if L4Q_DEBUG is set.
    """
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    if isinstance(error, MemoryError):
        click.echo("error: out of memory\n  do: use a machine with more, or a smaller model", err=True)
    else:
        text = UsageError(
            f"unexpected {type(error).__name__}",
            got=str(error) or None,
            remedy=f"this is a defect of l4q: please report it with the output of a run with {DEBUG_VARIABLE}=1",
        )
        click.echo(f"error: {text}", err=True)
    return UNEXPECTED


def _everywhere(error: L4QError) -> bool:
    """Whether the first process of this machine reports the same error."""
    return isinstance(error, PeerError) or (isinstance(error, UsageError) and os.environ.get("LOCAL_RANK") != "0")
