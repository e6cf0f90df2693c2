"""Where other people's code reads a file: whatever it raises becomes one `L4QError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from l4q.errors import L4QError, UsageError

PANIC = "PanicException"
"""What Rust extensions (tokenizers, safetensors) raise when they give up; it derives from BaseException."""


@contextmanager
def foreign(
    what: str,
    *,
    where: object = None,
    expected: object = None,
    remedy: str | None = "the file is damaged or was made to mislead: get it again from its source",
    kind: type[L4QError] = UsageError,
    passed: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Translate every exception of the block, except ours and those that end the process.

    A parser that was not written for hostile input fails in ways nobody lists (IndexError, RecursionError, MemoryError,
    a panic in Rust), so there is no list here.

    Args:
        what: One sentence for the user.
        where: File, or file and tensor.
        expected: What would have been accepted.
        remedy: What the user can do.
        kind: Class of the error raised.
        passed: Classes that the caller translates itself.

    Raises:
        L4QError: Of class `kind`, with the foreign exception as its cause.
    """
    try:
        yield
    except L4QError:
        raise
    except Exception as error:
        if isinstance(error, passed):
            raise
        raise kind(what, where=where, got=first_line(error), expected=expected, remedy=remedy) from error
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise kind(what, where=where, got=first_line(error), expected=expected, remedy=remedy) from error


def first_line(error: BaseException) -> str:
    """Class and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
