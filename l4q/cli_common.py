"""How every command line ends: one clear message on stderr, and one of `EXIT_CODES`.

A signal unwinds the command as Ctrl-C does, so that it cleans up first.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import IO, Any, NoReturn

import click

from l4q.errors import L4QError, OutputError, PeerError, UsageError

EXIT_CODES = {
    0: "done; for `l4q-parity`: every runtime is within its bounds",
    2: "bad usage or bad input: an unknown option, a value out of range, a missing or damaged file",
    3: "unsupported or inexact: an architecture, format or runtime that cannot hold it; or training diverged",
    4: "verification or parity failed",
    74: "the output could not be written",
    75: "another process is writing the same output",
    129: "ended because the terminal was closed (SIGHUP)",
    130: "interrupted by Ctrl-C (SIGINT)",
    143: "ended by SIGTERM",
}
NOTHING_LEFT = "nothing half-written was left"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command after it has cleaned up."""
UNEXPECTED = 70
"""sysexits' EX_SOFTWARE: a defect, or not enough memory."""
DEBUG_VARIABLE = "L4Q_DEBUG"
"""Environment variable: let unexpected errors end in a traceback."""


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


def run(command: click.Command) -> NoReturn:
    """Run a command and end the process with one of `EXIT_CODES`."""
    sys.exit(status(command))


def status(command: click.Command) -> int:
    """Run a command on sys.argv and return its exit code; errors become one message on stderr.

    Of the processes of a distributed run only the first reports; another one speaks up when it fails alone.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[_CurrentStderr()], format="%(message)s")
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
    except (click.Abort, KeyboardInterrupt) as error:
        number = received[0] if received else signal.SIGINT
        said = str(error.__cause__ or "") or NOTHING_LEFT  # click makes Abort out of KeyboardInterrupt
        click.echo(f"interrupted by {number.name}; {said}", err=True)
        return 128 + number
    except Exception as error:
        return _unexpected(error)
    # With standalone_mode off, --help and --version return click's exit code instead of raising it.
    return result if isinstance(result, int) else 0


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to what sys.stderr is at the moment: a live display puts itself there, and lines then appear above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> IO[str]:
        return sys.stderr


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
    elif isinstance(error, ImportError):
        click.echo(f"error: {_not_importable(error)}", err=True)
    else:
        text = UsageError(
            f"unexpected {type(error).__name__}",
            got=str(error) or None,
            remedy=f"this is a defect of l4q: please report it with the output of a run with {DEBUG_VARIABLE}=1",
        )
        click.echo(f"error: {text}", err=True)
    return UNEXPECTED


def _not_importable(error: ImportError) -> UsageError:
    """What to say of a package that is missing or broken: the error at the bottom of the chain."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return UsageError(
        "a package that is needed cannot be imported",
        got=f"{type(root).__name__}: {root}",
        remedy="install what is missing; if it names torchvision: text models need none, and one of another build than "
        "torch breaks transformers: pip uninstall torchvision torchaudio torchcodec",
    )


def _everywhere(error: L4QError) -> bool:
    """Whether the first process of this machine reports the same error."""
    return isinstance(error, PeerError) or (isinstance(error, UsageError) and os.environ.get("LOCAL_RANK") != "0")
