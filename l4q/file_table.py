"""Which files a folder holds, with sizes and hashes: the part of a manifest that can be checked again.

Names are relative paths with "/", sorted. Files and folders whose names begin with a dot (.git, .cache) belong to
other tools and do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


class FileFacts(TypedDict):
    """What a manifest says of one file."""

    sha256: str
    size: int
    """Bytes."""


FileTable = dict[str, FileFacts]


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """How a folder differs from its table; every field lists file names."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Files that the table does not know."""
    truncated: tuple[str, ...] = ()
    """Shorter than recorded."""
    changed: tuple[str, ...] = ()
    """Longer, or of the recorded size with other bytes."""

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.extra or self.truncated or self.changed)

    def lines(self) -> list[str]:
        """One line per file that differs: "missing: model.safetensors"."""
        return [f"{kind}: {name}" for kind, names in vars(self).items() for name in names]


def list_files(folder: Path) -> dict[str, Path]:
    """The files of a folder and its folders by relative name, hidden ones aside."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))}


def file_facts(path: Path) -> FileFacts:
    """Size and hash of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(sha256=digest, size=file.tell())


def check_files(folder: Path, table: Mapping[str, FileFacts], *, skip: tuple[str, ...] = ()) -> FolderCheck:
    """Compare a folder with a table.

    Args:
        folder: An existing folder.
        table: What it should hold.
        skip: Names that are not expected in the table: the manifest itself.
    """
    found = {name: path for name, path in list_files(folder).items() if name not in skip}
    differing: dict[str, list[str]] = {"truncated": [], "changed": []}
    for name in sorted(table.keys() & found.keys()):
        size = found[name].stat().st_size
        if size < table[name]["size"]:
            differing["truncated"].append(name)
        elif size != table[name]["size"] or file_facts(found[name]) != table[name]:
            differing["changed"].append(name)
    return FolderCheck(
        missing=tuple(sorted(table.keys() - found.keys())),
        extra=tuple(sorted(found.keys() - table.keys())),
        truncated=tuple(differing["truncated"]),
        changed=tuple(differing["changed"]),
    )


def table_digest(table: Mapping[str, FileFacts]) -> str:
    """One hash for all files of a table: that of "<sha256>  <name>" lines, as `sha256sum` prints them."""
    lines = (f"{table[name]['sha256']}  {name}\n" for name in sorted(table))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_table(value: object) -> FileTable | None:
    """A manifest's "files" entry, or None if it is not a table."""
    if not isinstance(value, dict):
        return None
    table: FileTable = {}
    for name, facts in value.items():
        if not isinstance(facts, dict):
            return None
        digest, size = facts.get("sha256"), facts.get("size")
        if not isinstance(digest, str) or type(size) is not int:
            return None
        table[name] = FileFacts(sha256=digest, size=size)
    return table


def json_digest(value: object) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
