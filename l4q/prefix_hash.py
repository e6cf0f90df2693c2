"""The hash of a file that is still being written, and an early start of its way to the disk.

Whoever writes the file says how far its bytes are final; another thread reads them back, from the page cache, and asks
the system to begin writing them out. When the file is complete, little is left to hash and to wait for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from l4q.durable import start_writeback
from l4q.file_table import FileFacts

_STEP_BYTES = 16 << 20
"""Bytes that are handed to the thread at a time."""
_BLOCK_BYTES = 1 << 20
"""Bytes that are read at a time: they stay in the processor's cache."""


class PrefixHash:
    """SHA-256 of a growing file.

    Args:
        path: The file; it may be renamed while it is open here.
        submit: Runs tasks one after another, in another thread.
    """

    def __init__(self, path: Path, submit: Callable[[Callable[[], None]], None]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._submit = submit
        self._digest = hashlib.sha256()
        self._asked = 0
        self._done = 0

    def advance(self, end: int) -> None:
        """Say that the bytes before `end` are written and stay as they are."""
        if end - self._asked >= _STEP_BYTES:
            self._asked = end
            self._submit(lambda: self._read_to(end))

    def facts(self) -> FileFacts:
        """Size and hash of the file, which is complete; call it where the tasks run."""
        size = os.fstat(self._file.fileno()).st_size
        self._read_to(size)
        self.close()
        return FileFacts(sha256=self._digest.hexdigest(), size=size)

    def close(self) -> None:
        """Close the file; safe to call again."""
        self._file.close()

    def _read_to(self, end: int) -> None:
        """Go on from where the last call ended, also if it failed."""
        start, block = self._done, memoryview(bytearray(_BLOCK_BYTES))
        while self._done < end:
            count = os.preadv(self._file.fileno(), [block[: end - self._done]], self._done)
            if not count:
                raise OSError(f"{self._file.name} became shorter while it was hashed")
            self._digest.update(block[:count])
            self._done += count
        start_writeback(self._file.fileno(), start, end - start)
