"""What a stage already holds: files that are complete, with their hashes, so that a killed job can go on.

One JSON object per line. The first says which work the files belong to; a file follows once it is complete and on the
disk; {"written": true} says that none is missing. A line that a killed process left unfinished does not count, and a
file counts only if it still has the recorded size and hash. Hashing runs in a thread beside the work; a file that is
followed is hashed while it is being written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from l4q.durable import sync_folder
from l4q.file_table import FileFacts, FileTable, file_facts, list_files, read_table
from l4q.prefix_hash import Advance, PrefixHash

JOURNAL_NAME = ".l4q_journal.jsonl"
_PART_NAME = ".l4q_journal.part"
JOURNAL_FILES = (JOURNAL_NAME, _PART_NAME)
"""What the journal itself brings to the disk, in its own time."""


class Journal:
    """The record of one stage; `open` it, `add` files as they are completed, `close` it before the stage is renamed."""

    def __init__(self, folder: Path, table: FileTable, *, written: bool) -> None:
        """Use `open`."""
        self._path = folder / JOURNAL_NAME
        self._table = table
        self._written = written
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="l4q-journal")
        self._tasks: list[Future[None]] = []
        self._followed: dict[str, PrefixHash] = {}

    @classmethod
    def open(cls, folder: Path, identity: Callable[[], Mapping[str, str]]) -> Journal:
        """Go on with a stage's journal if it is of the same work, else begin anew.

        Files that the journal does not vouch for are deleted, and folders that hold nothing then.

        Args:
            folder: The stage.
            identity: Says what decides the files' bytes (plan, source, versions); asked at once if there is something
                to go on with, else beside the work.
        """
        recorded = _read(folder / JOURNAL_NAME)
        table: FileTable = {}
        written = False
        if recorded and recorded[0] == {"identity": dict(identity())}:
            table, written = _trusted(folder, recorded[1:])
        for name, path in _all_files(folder).items():
            if name not in table:
                path.unlink()
        _remove_empty(folder)
        journal = cls(folder, table, written=written)
        if table:
            journal._rewrite(recorded[0])
        else:
            journal._submit(lambda: journal._rewrite({"identity": dict(identity())}))
        return journal

    @property
    def written(self) -> bool:
        """Whether an earlier process had completed every file."""
        return self._written

    def finished(self, name: str) -> bool:
        """Whether an earlier process had completed this file."""
        return name in self._table

    def follow(self, part: Path, name: str) -> Advance:
        """Hash a file while it is being written.

        Args:
            part: The file, which exists.
            name: The name under which it will be added.

        Returns:
            To be called with the end of what is written and will not change any more, as often as one likes, and with
            the last of it.
        """
        if name in self._followed:
            self._followed[name].close()
        self._followed[name] = PrefixHash(part, self._submit)
        return self._followed[name].advance

    def add(self, path: Path) -> None:
        """Record a complete file that is on the disk; the file must not change afterwards."""
        self._submit(lambda: self._record(path))

    def add_rest(self, folder: Path) -> None:
        """Record all files that are not recorded yet, and that none is missing."""
        self._submit(lambda: self._record_rest(folder))

    def table(self) -> FileTable:
        """Sizes and hashes of all recorded files; waits for those under way.

        Raises:
            OSError: The journal or a file could not be read or written.
            L4QError: What `identity` raised.
        """
        for task in self._tasks:
            task.result()
        return dict(self._table)

    def close(self) -> None:
        """Delete the journal: the stage is complete."""
        self.table()
        self.stop()
        self._path.unlink()

    def stop(self) -> None:
        """Let the thread end; safe to call again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for followed in self._followed.values():
            followed.close()

    def _submit(self, task: Callable[[], None]) -> Future[None]:
        self._tasks.append(self._pool.submit(task))
        return self._tasks[-1]

    def _record(self, path: Path) -> None:
        name = path.name
        followed = self._followed.get(name)
        self._table[name] = file_facts(path) if followed is None else followed.facts()
        self._append({"name": name, **self._table[name]})

    def _record_rest(self, folder: Path) -> None:
        for name, path in list_files(folder).items():
            if name not in self._table:
                self._table[name] = file_facts(path)
                self._append({"name": name, **self._table[name]})
        self._append({"written": True})

    def _rewrite(self, header: Mapping[str, Any]) -> None:
        """Begin the file anew with what is trusted: a torn line must not stand before new ones."""
        entries: list[Mapping[str, Any]] = [header, *({"name": name, **facts} for name, facts in self._table.items())]
        if self._written:
            entries.append({"written": True})
        part = self._path.with_name(_PART_NAME)
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
        sync_folder(self._path.parent)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _remove_empty(folder: Path) -> None:
    """Remove the folders below that hold no file: libraries put a file in the making into one of their own."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none if there is no journal."""
    entries: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def _trusted(folder: Path, entries: list[dict[str, Any]]) -> tuple[FileTable, bool]:
    """The recorded files that are still as recorded, and whether they are all there should be."""
    claimed = read_table({entry["name"]: entry for entry in entries if isinstance(entry.get("name"), str)}) or {}
    found = list_files(folder)
    table = {name: facts for name, facts in claimed.items() if name in found and _same(found[name], facts)}
    return table, len(table) == len(claimed) and {"written": True} in entries


def _same(path: Path, facts: FileFacts) -> bool:
    return path.stat().st_size == facts["size"] and file_facts(path) == facts


def _all_files(folder: Path) -> dict[str, Path]:
    """Every file of the stage but the journal, hidden ones too."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths if path.name != JOURNAL_NAME}
