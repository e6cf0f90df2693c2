"""One writer per output: a lock file beside the target, which the kernel gives back when its process dies.

`.NAME.lock` stands beside NAME while a process writes NAME, and says which process that is. What counts is the flock on
it, not its presence: a file left behind by a killed process is taken over. On NFS, Linux carries flock to the server,
so the lock also holds between machines; where a file system has no locks at all, a warning is given and none is held.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from l4q.errors import BusyError

log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_path(target: Path) -> Path:
    """The lock file of an output folder."""
    return target.with_name(f".{target.name}.lock")


class FolderLock:
    """A held lock: `acquire` it, and `release` it; both may be used as `exclusive` instead."""

    def __init__(self, target: Path, descriptor: int) -> None:
        """Use `acquire`."""
        self._target = target
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, target: Path, *, wait: bool = False) -> FolderLock:
        """Take the lock of an output folder, whose parent must exist.

        Args:
            target: The folder; it need not exist.
            wait: Wait for another writer to finish, instead of refusing.

        Raises:
            BusyError: Another process holds it.
        """
        path = lock_path(target)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor, target, wait=wait)
                if _is_current(descriptor, path):
                    _write_owner(descriptor)
                    return cls(target, descriptor)
            except BaseException:
                _let_go(descriptor, path)
                raise
            os.close(descriptor)  # its last holder has removed the file meanwhile

    def release(self) -> None:
        """Remove the lock file and let go; safe to call again."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _let_go(descriptor, lock_path(self._target))


@contextmanager
def exclusive(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder.

    Raises:
        BusyError: Another process holds it, and `wait` is false.
    """
    lock = FolderLock.acquire(target, wait=wait)
    try:
        yield
    finally:
        lock.release()


def owner(target: Path) -> str:
    """Who wrote the lock file of a folder, in words."""
    try:
        record = json.loads(lock_path(target).read_text(encoding="utf-8"))
        return f"process {record['pid']} on {record['host']} ({record['command']}), since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not given its name yet"


def _lock(descriptor: int, target: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        holder = owner(target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s: no file locks here; nothing stops another process from writing it too", target)
        return
    if not wait:
        raise BusyError(
            "another process is writing this folder",
            where=target,
            got=holder,
            remedy="wait for it (l4q-export --wait does), end it, or choose another --out",
        )
    log.info("waiting for %s", holder)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _let_go(descriptor: int, path: Path) -> None:
    """Close a lock file, and remove it unless another process holds it."""
    with suppress(OSError):  # held by another, or gone with the folder it stood in
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_current(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    record = {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "command": Path(sys.argv[0]).name or "python",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)
