"""Every error message the code can raise, read from its syntax tree, and which of them the tests name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.error_relays import Call, error_calls, find_relays
from tools.error_syntax import constants_of, name_of, texts_of

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("l4q", "exporters", "runtime_tests")
BASE = "L4QError"
ERRORS_MODULE = "l4q/errors.py"
# A test's text names a message if it holds this many characters of it: less occurs by chance.
LEAST = 8
HOLE = "\0"
FLAGS = re.compile(r"\(\?[aimsx]+[:)]")
"""Flags of a match= pattern, or of a group in it."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of one raise."""

    what: str
    """The first line, with {name} for what is filled in, and {…} for an expression."""
    kind: str
    """Name of the error class."""
    module: str
    """Path of the source file, relative to the project."""
    line: int
    expected: str = ""
    remedy: str = ""


def source_files(root: Path = PROJECT) -> list[Path]:
    """The modules of the packages, tests excluded, sorted."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return sorted(path for path in files if not path.name.startswith(("test_", "conftest")))


def error_classes(root: Path = PROJECT) -> dict[str, int]:
    """Exit code of every error class derived from `L4QError`, found by the bases named in the sources."""
    classes = [
        node
        for path in source_files(root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    known = {node.name: _exit_code(node, 3) for node in classes if node.name == BASE}
    while True:
        fresh = {
            node.name: _exit_code(node, known[base.id])
            for node in classes
            for base in node.bases
            if isinstance(base, ast.Name) and base.id in known and node.name not in known
        }
        if not fresh:
            return known
        known |= fresh


def _exit_code(node: ast.ClassDef, inherited: int) -> int:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "exit_code":
            return int(ast.literal_eval(statement.value))
    return inherited


def messages(root: Path = PROJECT) -> list[Message]:
    """All messages, in the order of files and lines; a conditional text is one message per branch."""
    kinds = error_classes(root)
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in source_files(root)
    }
    relays = find_relays(trees, kinds)
    found = [
        message
        for module, tree in trees.items()
        for call in error_calls(module, tree, kinds, relays)
        if not call.is_relayed
        for message in _of_call(call, module, constants_of(tree))
    ]
    return sorted(found, key=lambda message: (message.module, message.line, message.what))


def _of_call(call: Call, module: str, constants: dict[str, str]) -> Iterator[Message]:
    kind = call.relay.kind if call.relay else name_of(call.node.func)
    if kind == "PeerError":  # says nothing of its own: the message is that of process 0
        return
    given = {keyword.arg: keyword.value for keyword in call.node.keywords if keyword.arg}
    if call.relay and call.relay.kind_parameter in given:
        kind = name_of(given[call.relay.kind_parameter])

    def field(name: str) -> str:
        if call.relay and name not in given:
            return str(getattr(call.relay, name))
        return " / ".join(texts_of(given.get(name), constants))

    for what in texts_of(call.what, constants):
        yield Message(
            what=what,
            kind=kind,
            module=module,
            line=call.node.lineno,
            expected=field("expected"),
            remedy=field("remedy"),
        )


def literal_parts(what: str) -> list[str]:
    """The words of a message that are the same every time."""
    return [part.strip() for part in re.sub(r"\{[^{}]*\}", HOLE, what).split(HOLE) if part.strip()]


def texts_of_tests(root: Path = PROJECT) -> list[str]:
    """Every text in the tests, docstrings aside; of match= patterns, the text without escapes."""
    found: list[str] = []
    for path in sorted((root / "runtime_tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += (
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
            for part in re.split(r"\.[*+]\??|\||\n", re.sub(r"\\(\W)", r"\1", FLAGS.sub("", node.value)))
        )
    return sorted({text.strip() for text in found if len(text.strip()) >= LEAST})


def is_named(message: Message, texts: Iterable[str]) -> bool:
    """Whether a test's text is part of the message, or is it filled in, or holds its longest part that never changes.

    A text of one word counts only if it is the whole message: words such as "checkpoint" occur everywhere.
    """
    parts = literal_parts(message.what)
    longest = max(parts, key=len, default="")
    whole = re.compile(".+".join(map(re.escape, re.split(r"\{[^{}]*\}", message.what)))) if parts else None
    for text in texts:
        if any(text in part and (" " in text or text == part) for part in parts):
            return True
        if (len(longest) >= LEAST and longest in text) or (whole is not None and whole.fullmatch(text)):
            return True
    return False


def telling(texts: Iterable[str], found: Iterable[Message]) -> list[str]:
    """The texts that tell messages apart: not those that are a piece of several, such as "cannot be read"."""
    parts = {message.what: literal_parts(message.what) for message in found}
    whole = {part for several in parts.values() for part in several}
    return [text for text in texts if text in whole or sum(any(text in p for p in own) for own in parts.values()) < 2]


def untested(root: Path = PROJECT) -> list[Message]:
    """The messages that no test names."""
    found = messages(root)
    texts = telling(texts_of_tests(root), found)
    return [message for message in found if not is_named(message, texts)]
