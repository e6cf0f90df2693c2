"""Writing that survives a power cut: flushed files and folders, replaced whole, and errors that say what to do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from l4q.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place; nothing half-written was left",
    errno.EDQUOT: "your quota is used up: free some space, or choose another place",
    errno.EFBIG: "the file system or a limit (ulimit -f) refuses files of this size",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may write, or change its permissions",
    errno.EPERM: "choose a place that you may write, or change its permissions",
    errno.ENOENT: "the folder was removed or renamed while it was being written: run the command again",
    errno.EIO: "the disk reports an error: check it, or choose another place",
    errno.ENOTDIR: "choose an --out whose parents are folders",
}
_ALWAYS_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)  # some network and FUSE file systems
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_RANGE_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file that is either old or new, never half, also after a power cut or beside another writer.

    Raises:
        OutputError: It cannot be written; an older file is as it was.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.part")
    with output_errors(path):
        descriptor = _open_alone(part)
        try:
            os.ftruncate(descriptor, 0)
            _write_all(descriptor, data)
            os.fsync(descriptor)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, start: int, length: int) -> None:
    """Let the system begin to write a range of a file to the disk, without waiting, where it can (Linux).

    It promises nothing: `sync_file` still has to wait for the rest.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, start, length, _RANGE_WRITE)


def sync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk, where the file system knows how."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_tree(folder: Path, *, leave: Collection[str] = ()) -> None:
    """Wait until every file and folder below is on the disk, but for files named in `leave`, which may come and go."""
    for parent, _, names in os.walk(folder):
        for name in sorted(set(names) - set(leave)):
            sync_file(Path(parent, name))
        sync_folder(Path(parent))


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change names in one step; False where system or file system cannot."""
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn the system's errors about writing `target` and what stands beside it into `OutputError`.

    Errors about other files, such as a source that cannot be read, pass unchanged.

    Raises:
        OutputError: The output could not be written.
    """
    try:
        yield
    except OSError as error:
        if not _concerns_output(error, target):
            raise
        raise OutputError(
            "the output could not be written",
            where=error.filename or target,
            got=error.strerror or error,
            remedy=_REMEDIES.get(error.errno or 0, "check the disk, or choose another place"),
        ) from error


def _concerns_output(error: OSError, target: Path) -> bool:
    # NumPy's tofile reports a short write without an error number.
    if error.errno in _ALWAYS_OUTPUT or error.errno is None:
        return True
    if error.filename is None:
        return error.errno == errno.EIO
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    staged = str(target.with_name(f".{target.name}."))
    # Parents that cannot be made, the target itself, and whatever carries its name: stage, lock, part.
    return name.startswith((staged, str(target))) or Path(name) in target.parents


def _open_alone(part: Path) -> int:
    """Open a temporary file for this process only; another writer of the same file is waited for."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), part.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the writer before has given the file its name


def _write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until nothing is left: one call may write less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@cache
def _sync_file_range() -> Any:
    """The C library's sync_file_range (Linux), or None."""
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


@cache
def _renameat2() -> Any:
    """The C library's renameat2 (Linux), or None."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function
