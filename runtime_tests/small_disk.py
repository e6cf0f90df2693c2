"""A disk of a few hundred kilobytes for one command, where the system allows it: a tmpfs in a namespace of its own."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE, _MS_REMOUNT, _MS_RDONLY = 0x4000, 0x40000, 0x20, 0x1


class NoSmallDisk(Exception):
    """The system lets this process mount nothing: neither as root nor in a user namespace."""


def mount_small_disk(folder: Path, size: int) -> None:
    """Put a tmpfs of `size` bytes on `folder`, seen by this process and its children alone and gone with them.

    Raises:
        NoSmallDisk: Not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        _become_root_of_a_namespace(libc)
    libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise NoSmallDisk(os.strerror(ctypes.get_errno()))


def _become_root_of_a_namespace(libc: ctypes.CDLL) -> None:
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS | _NEW_USER):
        raise NoSmallDisk(os.strerror(ctypes.get_errno()))
    try:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    except OSError as error:
        raise NoSmallDisk(str(error)) from error


def make_read_only(folder: Path) -> None:
    """Let nothing on the disk at `folder` be written any more.

    Raises:
        NoSmallDisk: Not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(folder), None, _MS_REMOUNT | _MS_RDONLY, None):
        raise NoSmallDisk(os.strerror(ctypes.get_errno()))
