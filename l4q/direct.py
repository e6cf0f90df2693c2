"""Writing large files past the page cache, and reading them so, where the system lets us.

What is written the usual way is copied into pages that the system has to find first, and has to be brought to the disk
from there before `fsync` returns. O_DIRECT hands the bytes to the disk at once: no pages, nothing left to wait for. It
takes whole blocks only, from memory that begins at a block's border, so the bytes go through a small buffer that does,
and the ends of a piece that fill no block are written as usual. Blocks and ends never share a page.

Files that are soon read again by somebody else are better off in the page cache: `LEAST_BYTES` leaves small ones there.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

Data = npt.NDArray[np.uint8]

LEAST_BYTES = 256 << 20
"""Smaller files are written the usual way: copying them is no work, and the page cache keeps them for their reader."""
BLOCK = 4096
"""No disk in use asks for larger blocks; also a page, which must not be written both ways."""
_BUFFER_BYTES = 1 << 20
_LEAST_PIECE = 128 << 10
"""Waiting for the disk takes longer than copying fewer bytes."""
_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectFile:
    """Pieces of a file that somebody else has open, written at their places.

    Args:
        path: The file, which exists.
        nbytes: How large it will be, as far as that is known.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._usual = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._direct = _open_direct(path) if nbytes >= LEAST_BYTES else None
        self._open = [self._usual] if self._direct is None else [self._usual, self._direct]
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES), dtype=np.uint8)  # begins at a page's border

    def write(self, data: Data, position: int) -> None:
        """Write all bytes at a position of the file; once this returns, whoever reads the file finds them there."""
        first = done = 0
        if self._direct is not None and data.nbytes >= _LEAST_PIECE:
            first = -position % BLOCK
            last = first + (data.nbytes - first) // BLOCK * BLOCK
            done = first + self._write_blocks(self._direct, data[first:last], position + first)
        write_at(self._usual, data[:first], position)
        write_at(self._usual, data[done:], position + done)

    def close(self) -> None:
        """Close the file; safe to call again."""
        descriptors, self._open = self._open, []
        for descriptor in descriptors:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write_blocks(self, direct: int, data: Data, position: int) -> int:
        """How many of these bytes, which fill blocks, went past the page cache: all, or what the system took."""
        done = 0
        while done < data.nbytes:
            lent = self._buffer[: min(_BUFFER_BYTES, data.nbytes - done)]
            np.copyto(lent, data[done : done + lent.nbytes])
            try:
                count = os.pwrite(direct, lent.data, position + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                count = 0
            done += count // BLOCK * BLOCK
            if count % BLOCK or not count:  # the file system has thought better of it
                self._direct = None
                break
        return done


def read_blocks(path: Path) -> Iterator[Data]:
    """A whole file, piece by piece, each valid until the next; a large one past the page cache, as it was written.

    Args:
        path: A file that nobody writes to.
    """
    buffer = mmap.mmap(-1, _BUFFER_BYTES)
    descriptor = _open_direct(path, os.O_RDONLY) if path.stat().st_size >= LEAST_BYTES else None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
    position = 0
    try:
        while True:
            try:
                count = os.preadv(descriptor, [buffer], position)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                os.close(descriptor)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                continue
            if not count:
                return
            yield np.frombuffer(buffer, dtype=np.uint8, count=count)
            position += count  # behind the last block, which a file rarely fills, only the usual way goes on
    finally:
        os.close(descriptor)


def append(file: BinaryIO, data: Data, target: DirectFile) -> int:
    """Write where `file` stands, by `target`, which is the same file; returns where it stands then, behind the data."""
    file.flush()
    start = file.tell()
    target.write(data, start)
    return file.seek(start + data.nbytes)


def write_at(file: int, data: Data, position: int) -> None:
    """Write all bytes at a position of an open file (the system may take fewer at once)."""
    view = data.data
    while view.nbytes:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count


def _open_direct(path: Path, mode: int = os.O_WRONLY) -> int | None:
    """A second descriptor that goes past the page cache; None where there is no such thing."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, mode | os.O_CLOEXEC | _DIRECT)
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise
