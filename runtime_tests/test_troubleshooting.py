"""docs/troubleshooting.md has every error the code can raise, and the tests name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import troubleshooting
from tools.error_messages import Message, error_classes, is_named, literal_parts, messages, source_files, untested

CLASSES = """
class L4QError(Exception):
    exit_code = 3
class UsageError(L4QError):
    exit_code = 2
"""
SAMPLE = """
from l4q.errors import UsageError
_REMEDY = "look it up"
def f(name, bad):
    raise UsageError(f"no file called {name}", where=name, expected="a file" if bad else "a folder", remedy=_REMEDY)
def g(bad):
    return UsageError("too " + ("large" if bad else "small"))
"""
RELAYS = """
from l4q.errors import L4QError, UsageError
def guard(where, what, *, remedy="look again", kind: type[L4QError] = UsageError):
    raise kind(what, where=where, remedy=remedy)
def inner(what):
    with guard("here", what):
        raise L4QError(f"not the {what} itself")
"""
CALLS = """
from l4q.errors import L4QError
from l4q.relays import guard, inner
NAMED = "a named text"
def use():
    guard("there", "a text")
    guard("there", what=NAMED, remedy="do this", kind=L4QError)
    inner("a third text")
def guarded(guard):
    guard.other("no message")
"""


def test_the_page_is_fresh() -> None:
    """What the tool would write today is what is there; if this fails, run python -m tools.troubleshooting."""
    assert troubleshooting.PAGE.read_text(encoding="utf-8") == troubleshooting.page()


def test_the_page_has_every_raise() -> None:
    """Counted by another reader: each text a line of code opens an error with stands on the page."""
    page = re.sub(r"\\(.)", r"\1", troubleshooting.PAGE.read_text(encoding="utf-8"))
    names = "|".join(error_classes())
    opening = re.compile(rf'\b(?:{names})\(\s*f?"([^"{{\\]*)')
    starts = [text for path in source_files() for text in opening.findall(path.read_text(encoding="utf-8"))]
    assert len(starts) > 240
    assert [text for text in starts if " ".join(text.split()) not in page] == []


def test_every_class_has_its_meaning() -> None:
    """The table of exit codes explains all of them."""
    assert set(troubleshooting.MEANINGS) == set(error_classes())


def test_a_new_message_is_found(tmp_path: Path) -> None:
    """Placeholders, constants, both branches of a condition: all become rows."""
    (tmp_path / "l4q").mkdir()
    (tmp_path / "l4q" / "errors.py").write_text(CLASSES)
    (tmp_path / "l4q" / "sample.py").write_text(SAMPLE)
    found = messages(tmp_path)
    assert [message.what for message in found] == ["no file called {name}", "too large", "too small"]
    assert found[0].expected == "a file / a folder"
    assert found[0].remedy == "look it up"
    assert error_classes(tmp_path)["UsageError"] == 2
    assert [message.what for message in untested(tmp_path)] == [message.what for message in found]


def test_a_message_that_a_caller_chooses_is_found(tmp_path: Path) -> None:
    """A function that raises what it is told: its calls are the messages, with its remedy unless they have one."""
    (tmp_path / "l4q").mkdir()
    for name, text in (("errors", CLASSES), ("relays", RELAYS), ("calls", CALLS)):
        (tmp_path / "l4q" / f"{name}.py").write_text(text)
    found = {message.what: (message.kind, message.module, message.remedy) for message in messages(tmp_path)}
    assert found == {
        "a text": ("UsageError", "l4q/calls.py", "look again"),
        "a named text": ("L4QError", "l4q/calls.py", "do this"),
        "a third text": ("UsageError", "l4q/calls.py", "look again"),
        "not the {what} itself": ("L4QError", "l4q/relays.py", ""),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no module called model.layers.0.up_proj here", True),
        ("called up_proj", False),
        ("module called", True),
        ("module", False),
        ("another module", False),
    ],
)
def test_when_a_test_names_a_message(text: str, named: bool) -> None:
    """Two words of its fixed part do, or a text that contains the fixed part; a lone word does not."""
    message = Message(what="no module called {name}", kind="UsageError", module="l4q/model.py", line=1)
    assert literal_parts(message.what) == ["no module called"]
    assert is_named(message, [text]) == named


def test_the_tests_name_the_messages() -> None:
    """Every one; `python -m tools.troubleshooting --untested` lists what needs a test with match=."""
    missing = untested()
    assert missing == [], troubleshooting.report(missing)
