"""Reads training files into records: one (kind, fields, place) per text, prompt pair, instruction or conversation.

The kind of a JSON record follows from its exact set of keys (`RECORD_KINDS`): a file may mix kinds, a record may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from l4q.errors import UsageError

RecordKind = Literal["text", "prompt", "instruction", "chat"]

RECORD_KINDS: dict[frozenset[str], RecordKind] = {
    frozenset({"text"}): "text",
    frozenset({"prompt", "completion"}): "prompt",
    frozenset({"instruction", "output"}): "instruction",
    frozenset({"instruction", "input", "output"}): "instruction",
    frozenset({"messages"}): "chat",
}
CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training record, checked for keys and types."""

    kind: RecordKind
    fields: dict[str, Any]
    """Strings by key; "messages" holds a list of {"role", "content"} dicts instead."""
    where: str
    """File and line (or list index), for error messages."""


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one .txt, .jsonl or .json file.

    Raises:
        UsageError: The file is missing, empty, not UTF-8, of another suffix, or holds a record that is not one of
            `RECORD_KINDS`; the message names file and line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            "this kind of training file is not known", where=path, got=path.suffix or "no suffix", expected=[*READERS]
        )
    text = _read_text(path)
    if not text.strip():
        raise UsageError("the training file is empty", where=path, expected="at least one text or record")
    yield from reader(path, text)


def hash_files(paths: Sequence[Path]) -> str:
    """sha256 over the sha256 of every file, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise _unreadable(path, error) from error
    return total.hexdigest()


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UsageError("the training file is not a file", where=path, expected="a readable file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "the training file is not UTF-8 text", where=path, got=f"byte {error.start}: {error.reason}"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        "the training file cannot be read",
        where=path,
        got=error.strerror,
        expected="a readable file",
        remedy="check --data",
    )


def _read_plain(path: Path, text: str) -> Iterator[Record]:
    yield Record(kind="text", fields={"text": text}, where=str(path))


def _read_json_lines(path: Path, text: str) -> Iterator[Record]:
    # Only \n ends a record: str.splitlines would also cut at U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _check_record(_parse_json(line, where), where)


def _read_json_list(path: Path, text: str) -> Iterator[Record]:
    values = _parse_json(text, str(path))
    if not isinstance(values, list):
        raise UsageError(
            "a .json training file must hold a list of records",
            where=path,
            got=type(values).__name__,
            expected="[{...}, {...}]",
            remedy="name the file .jsonl if it has one record per line",
        )
    for index, value in enumerate(values):
        where = f"{path}, record {index + 1}"
        yield _check_record(value, where)


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_plain,
    ".jsonl": _read_json_lines,
    ".json": _read_json_list,
}


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an integer of 5000 digits
        place = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(
            "the training record is not valid JSON",
            where=where,
            got=f"{error.msg if isinstance(error, json.JSONDecodeError) else error}{place}",
            expected="one JSON object per line (.jsonl) or one list of objects (.json)",
        ) from error


def _check_record(value: Any, where: str) -> Record:
    keys = frozenset(value) if isinstance(value, dict) else None
    kind = RECORD_KINDS.get(keys) if keys is not None else None
    if kind is None:
        raise UsageError(
            "the training record has no known format",
            where=where,
            got=f"keys {sorted(keys)}" if keys is not None else type(value).__name__,
            expected="exactly " + ", or ".join("{" + ", ".join(sorted(known)) + "}" for known in RECORD_KINDS),
            remedy="rename or drop keys so that the record has one format",
        )
    if kind == "chat":
        _check_messages(value["messages"], where)
    else:
        for key, text in value.items():
            _check_string(text, f"{where}, key {key!r}")
    return Record(kind=kind, fields=value, where=where)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(
            "a chat record needs a non-empty list of messages", where=where, got=repr(messages)[:80], expected="a list"
        )
    for index, message in enumerate(messages):
        place = f"{where}, message {index + 1}"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            got = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise UsageError("a chat message is malformed", where=place, got=got, expected=["content", "role"])
        if message["role"] not in CHAT_ROLES:
            raise UsageError(
                "a chat message has an unknown role", where=place, got=repr(message["role"]), expected=CHAT_ROLES
            )
        _check_string(message["content"], f"{place}, key 'content'")
    if all(message["role"] != "assistant" for message in messages):
        raise UsageError(
            "a chat record has no assistant message to learn from",
            where=where,
            got=[message["role"] for message in messages],
            expected="at least one 'assistant'",
        )


def _check_string(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise UsageError("a training text is not a string", where=where, got=type(text).__name__, expected="str")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UsageError(
            "a training text is no Unicode text",
            where=where,
            got=f"{error.reason} at character {error.start}",
            expected="text that UTF-8 can hold",
        ) from error
