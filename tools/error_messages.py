"""Every error message the code can raise, read from its syntax tree, and which of them the tests name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("l4q", "exporters", "runtime_tests")
BASE = "L4QError"
ERRORS_MODULE = "l4q/errors.py"
# A test's text names a message if it holds this many characters of it: less occurs by chance.
LEAST = 8
HOLE = "\0"


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
    found: list[Message] = []
    for path in source_files(root):
        module = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        found += (
            message
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and _name(call.func) in kinds
            for message in _of_call(call, module, constants)
        )
    return sorted(found, key=lambda message: (message.module, message.line, message.what))


def _of_call(call: ast.Call, module: str, constants: dict[str, str]) -> Iterator[Message]:
    if _name(call.func) == "PeerError":  # says nothing of its own: the message is that of process 0
        return
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    first = call.args[0] if call.args else given.get("what")
    for what in _texts(first, constants):
        yield Message(
            what=what,
            kind=_name(call.func),
            module=module,
            line=call.lineno,
            expected=" / ".join(_texts(given.get("expected"), constants)),
            remedy=" / ".join(_texts(given.get("remedy"), constants)),
        )


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives a name to."""
    return {
        statement.targets[0].id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


def _texts(node: ast.expr | None, constants: dict[str, str]) -> list[str]:
    """What an expression can say: its text, the texts of both branches, or {…} where only a run would tell."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name) and node.id in constants:
        return [constants[node.id]]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, constants), *_texts(node.orelse, constants)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_piece(value) for value in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        ends = _texts(node.right, constants)
        return [left + right for left in _texts(node.left, constants) for right in ends]
    return [_hole(node)]


def _piece(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return _hole(node.value if isinstance(node, ast.FormattedValue) else node)


def _hole(node: ast.expr) -> str:
    return "{" + (_name(node) or "…") + "}"


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
            for part in re.split(r"\.[*+]\??|\||\n", re.sub(r"\\(\W)", r"\1", node.value))
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


def untested(root: Path = PROJECT) -> list[Message]:
    """The messages that no test names."""
    texts = texts_of_tests(root)
    return [message for message in messages(root) if not is_named(message, texts)]
