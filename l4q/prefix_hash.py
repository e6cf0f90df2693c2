"""The hash of a file that is still being written, and an early start of its way to the disk.

Whoever writes the file says how far its bytes are final, and may hand over the last of them; another thread hashes
these, reads the others back from the page cache, and asks the system to begin writing them out. When the file is
complete, little is left to hash and to wait for.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from l4q.durable import start_writeback
from l4q.file_table import FileFacts

Data = npt.NDArray[np.uint8]

_STEP_BYTES = 2 << 20
"""Bytes that are handed to the thread at a time."""
_BLOCK_BYTES = 1 << 20
"""Bytes that are read at a time: they stay in the processor's cache."""
_HELD_BYTES = 6 << 20
"""Bytes that may wait in memory for the thread."""
_PATIENCE = 0.2
"""Seconds in which the thread must begin with the file to be given more than it can hold."""


class Advance(Protocol):
    """Told of a growing file, as often as one likes, how far it is final."""

    def __call__(self, end: int, start: int = 0, data: Data | None = None, /) -> None:
        """The bytes before `end` are written and stay as they are; `data`, which nobody changes, stands at `start`."""


def ignore(end: int, start: int = 0, data: Data | None = None, /) -> None:
    """An `Advance` of which nobody wants to know."""


class PrefixHash:
    """SHA-256 of a growing file.

    Args:
        path: The file; it may be renamed while it is open here.
        submit: Runs tasks one after another, in another thread.
    """

    def __init__(self, path: Path, submit: Callable[[Callable[[], None]], Future[None]]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        if hasattr(os, "posix_fadvise"):  # reading ahead would keep pages of what is not written yet
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._submit = submit
        self._digest = hashlib.sha256()
        self._pieces: list[tuple[int, Data]] = []
        self._held: deque[tuple[Future[None], int]] = deque()
        self._told = 0
        self._asked = 0
        self._done = 0
        self._behind = False

    def advance(self, end: int, start: int = 0, data: Data | None = None, /) -> None:
        """See `Advance`."""
        if data is not None and start >= self._told and start + data.nbytes <= end and not self._behind:
            self._pieces.append((start, data))
        self._told = end
        if end - self._asked >= _STEP_BYTES:
            self._make_room()
            pieces, size = self._take()
            self._asked = end
            self._held.append((self._submit(lambda: self._hash(pieces, end)), size))

    def facts(self) -> FileFacts:
        """Size and hash of the file, which is complete; call it where the tasks run."""
        size = os.fstat(self._file.fileno()).st_size
        self._hash(self._take()[0], size)
        self.close()
        return FileFacts(sha256=self._digest.hexdigest(), size=size)

    def close(self) -> None:
        """Close the file; safe to call again."""
        self._file.close()

    def _take(self) -> tuple[list[tuple[int, Data]], int]:
        pieces, self._pieces = self._pieces, []
        return pieces, sum(data.nbytes for _, data in pieces)

    def _make_room(self) -> None:
        """Let the thread catch up; if it is busy with something else, it shall read the rest of this file back."""
        while self._held and (self._held[0][0].done() or sum(size for _, size in self._held) > _HELD_BYTES):
            future, _ = self._held[0]
            if not self._done and not wait([future], _PATIENCE).done:
                self._behind = True
                self._pieces.clear()
                return
            wait([future])
            self._held.popleft()

    def _hash(self, pieces: list[tuple[int, Data]], end: int) -> None:
        """Go on from where the last call ended, also if it failed."""
        first = self._done
        for start, data in pieces:
            self._read_to(start)
            self._digest.update(data.data)
            self._done += data.nbytes
        self._read_to(end)
        start_writeback(self._file.fileno(), first, end - first)

    def _read_to(self, end: int) -> None:
        if self._done >= end:
            return
        block = memoryview(bytearray(min(_BLOCK_BYTES, end - self._done)))
        while self._done < end:
            count = os.preadv(self._file.fileno(), [block[: end - self._done]], self._done)
            if not count:
                raise OSError(f"{self._file.name} became shorter while it was hashed")
            self._digest.update(block[:count])
            self._done += count
