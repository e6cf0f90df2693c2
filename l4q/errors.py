"""The errors l4q raises for bad input, unsupported requests and failed checks.

Every message answers five questions: what went wrong, where, what was found, what was expected, what to do next.
Library code raises; only the command lines turn ``exit_code`` into a process status.
"""

from __future__ import annotations


class L4QError(Exception):
    """Base class of every error l4q raises on purpose.

    Args:
        what: One sentence that names the problem.
        where: File, tensor, module or option it was found in.
        got: The offending value.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        details = (("where", where), ("got", got), ("expected", expected), ("do", remedy))
        lines = [what, *(f"  {label}: {value}" for label, value in details if value is not None)]
        super().__init__("\n".join(lines))
        self.what = what


class UsageError(L4QError):
    """A bad option or bad input: missing or corrupt file, wrong shape, NaN scale, group size that does not divide."""

    exit_code = 2


class UnsupportedError(L4QError):
    """An architecture, format or runtime that cannot hold what was asked of it."""

    exit_code = 3


class InexactError(L4QError):
    """An export that would have to round trained values although rounding was not allowed."""

    exit_code = 3


class VerificationError(L4QError):
    """Exported bytes, or a runtime's answers, that do not match the checkpoint."""

    exit_code = 4


class OutputError(L4QError):
    """An output that could not be written: disk full, read-only or vanished target, an I/O error."""

    exit_code = 74  # EX_IOERR of sysexits.h


class BusyError(L4QError):
    """An output that another process is writing."""

    exit_code = 75  # EX_TEMPFAIL: the same command may work later


class PeerError(L4QError):
    """Process 0 of a distributed run failed and says why; the others end with its exit code and no message."""

    def __init__(self, exit_code: int) -> None:
        """Take over the exit code of process 0."""
        super().__init__("process 0 failed", remedy="see its message")
        self.exit_code = exit_code
