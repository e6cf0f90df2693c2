"""JSON from files nobody vouches for: bounded in size and depth, and every way to be wrong is a `UsageError`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from l4q.errors import UsageError

MOST_BYTES = 1 << 25
"""32 MiB: configs and shard indexes of the largest models have a few."""
TOKENIZER_BYTES = 1 << 27
"""128 MiB for a tokenizer.json; the largest known ones have 40 MB."""
MOST_LEVELS = 64
"""Objects and arrays inside one another."""


def read_json(path: Path, what: str, *, most_bytes: int = MOST_BYTES, remedy: str | None = None) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        what: Its name in messages: "config.json", "the shard index".
        most_bytes: A larger file is refused unread.
        remedy: For messages.

    Raises:
        UsageError: It is missing, no plain file, too large, not UTF-8, not JSON, or too deeply nested.
    """
    try:
        if not path.is_file():
            kind = "a folder or a device" if path.exists() else "no such file"
            raise UsageError(f"{what} not found", where=path, got=kind, expected="a file", remedy=remedy)
        size = path.stat().st_size
        if size > most_bytes:
            raise UsageError(f"{what} is too large", where=path, got=f"{size:,} bytes", expected=f"<= {most_bytes:,}")
        return parse_json(path.read_bytes(), what, where=path, remedy=remedy)
    except OSError as error:
        raise UsageError(f"{what} cannot be read", where=path, got=error, remedy=remedy) from error


def read_object(path: Path, what: str, *, most_bytes: int = MOST_BYTES, remedy: str | None = None) -> dict[str, Any]:
    """As `read_json`, for files that must hold an object.

    Raises:
        UsageError: See `read_json`; or the file holds something else.
    """
    content = read_json(path, what, most_bytes=most_bytes, remedy=remedy)
    if not isinstance(content, dict):
        raise UsageError(f"{what} is not a JSON object", where=path, got=type(content).__name__, remedy=remedy)
    return content


def check_json_files(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths themselves, once those that end in .json hold objects: exports carry copies of them.

    Raises:
        UsageError: One does not.
    """
    for path in paths:
        if path.suffix == ".json":
            _check_object(path, file_stamp(path))
    return paths


def file_stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does, so that what was read of it can be kept: place, size and times; () if missing."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=64)
def _check_object(path: Path, stamp: tuple[int, ...]) -> None:
    """Check a file once as long as its stamp is the same; what fails is not kept."""
    read_object(path, path.name, most_bytes=TOKENIZER_BYTES, remedy="copy the tokenizer files again")


def parse_json(text: bytes | str, what: str, *, where: object, remedy: str | None = None) -> Any:
    """Parse JSON.

    Raises:
        UsageError: It is not UTF-8, not JSON, or nested deeper than `MOST_LEVELS`.
    """
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, an integer of 5000 digits
        raise UsageError(
            f"{what} cannot be read", where=where, got=error, expected="JSON in UTF-8", remedy=remedy
        ) from error
    if _levels_exceed(content, MOST_LEVELS):
        raise UsageError(
            f"{what} is nested too deeply", where=where, expected=f"at most {MOST_LEVELS} levels", remedy=remedy
        )
    return content


def _levels_exceed(content: Any, most: int) -> bool:
    """Whether objects and arrays lie in one another deeper than `most`, found level by level, without recursion."""
    level = [content]
    for _ in range(most + 1):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
