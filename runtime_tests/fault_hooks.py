"""Faults at chosen moments: a process counts its changes to a folder, and at the n-th something happens to it.

A change is an audited event of the interpreter (a file opened for writing, renamed, removed, a folder made or removed)
or a call of os.write, os.pwrite, os.fsync or l4q's exchange of two folders. What libraries write in C shows as the
opening of their files, and is hit by kills at random times instead.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from l4q import durable, files
from runtime_tests.small_disk import NoSmallDisk, make_read_only, mount_small_disk

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What shall happen; by default nothing, and changes are only counted."""

    at: int = 0
    """The change before which it happens, counted from 1; 0 is never."""
    only: str = ""
    """Count only changes of this name: "fsync", "os.rename", ..."""
    action: str = "kill"
    """A key of `ACTIONS`."""
    limit: int = 0
    """Largest file the process may write, in bytes; 0 is no limit."""
    disk: int = 0
    """Put the folder on a disk of this many bytes; `limit` it instead where nothing can be mounted."""
    read_only: bool = False
    """Make that disk read-only; refuse the second change instead where nothing can be mounted."""
    short: bool = False
    """Let every os.write and os.pwrite take half of what it is given."""


class Counter:
    """A number that a forked process and its parent share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def increase(self) -> int:
        """Add one and return the result."""
        value = self.value + 1
        self._memory[:8] = value.to_bytes(8, "little")
        return value

    @property
    def value(self) -> int:
        """The number."""
        return int.from_bytes(self._memory[:8], "little")


def prepare(fault: Fault, root: Path) -> Fault:
    """Put the folder on the disk the fault asks for, with what it holds; returns what is left to inject."""
    if not fault.disk:
        return fault
    with TemporaryDirectory() as scratch:
        shutil.copytree(root, scratch, dirs_exist_ok=True)
        try:
            mount_small_disk(root, fault.disk)
            shutil.copytree(scratch, root, dirs_exist_ok=True)
            if fault.read_only:
                make_read_only(root)
        except NoSmallDisk:
            return replace(fault, at=2, action="read only") if fault.read_only else replace(fault, limit=4000)
    return fault


def install(fault: Fault, root: Path, counter: Counter) -> None:
    """Count changes below `root` in this process, and let the fault happen; cannot be undone."""
    state = {"busy": False}
    base = os.path.realpath(root)

    def step(call: str) -> None:
        if call.startswith(fault.only) and counter.increase() == fault.at:
            state["busy"] = True  # what the action itself changes is not counted
            try:
                ACTIONS[fault.action](root, call)
            finally:
                state["busy"] = False

    def below(name: object) -> bool:
        if isinstance(name, int):
            name = os.readlink(f"/proc/self/fd/{name}")
        return isinstance(name, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(name)).startswith(base)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or state["busy"]:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        if below(arguments[0]):
            step(event)

    def counted(function: Callable[..., Any], call: str) -> Callable[..., Any]:
        def replacement(target: Any, *rest: Any) -> Any:
            if not state["busy"] and below(target):
                step(call)
                if fault.short and rest:
                    view = memoryview(rest[0])
                    return function(target, view[: (len(view) + 1) // 2], *rest[1:])
            return function(target, *rest)

        return replacement

    for name in ("write", "pwrite", "fsync"):
        setattr(os, name, counted(getattr(os, name), name))
    files.exchange = counted(durable.exchange, "exchange")  # type: ignore[attr-defined]
    sys.addaudithook(audit)
    if fault.limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, fault.limit))


def _send(number: signal.Signals) -> Callable[[Path, str], None]:
    return lambda root, call: os.kill(os.getpid(), number)


def _refuse(number: int) -> Callable[[Path, str], None]:
    def fail(root: Path, call: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _vanish(root: Path, call: str) -> None:
    while root.exists():  # a thread of the process may be putting a file there
        shutil.rmtree(root, ignore_errors=True)


ACTIONS: dict[str, Callable[[Path, str], None]] = {
    "kill": _send(signal.SIGKILL),
    "stop": _send(signal.SIGSTOP),
    "interrupt": _send(signal.SIGINT),
    "terminate": _send(signal.SIGTERM),
    "hang up": _send(signal.SIGHUP),
    "io error": _refuse(errno.EIO),
    "read only": _refuse(errno.EROFS),
    "disk full": _refuse(errno.ENOSPC),
    "vanish": _vanish,
}
"""Called with the folder and the name of the change, in the process, before the change."""
