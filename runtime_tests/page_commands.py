"""The commands that README.md and the pages of docs/ tell readers to type, taken apart for the tests."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import Counter
from importlib import import_module
from pathlib import Path

import click

PROJECT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:l4q-[a-z]+|python -m (?:tools|runtime_tests|l4q)\.)[^`]*)`")
OURS = re.compile(r"\b(?:(l4q-[a-z]+)|-m ((?:tools|runtime_tests|l4q|exporters)\.[\w.]+))(?=[\s)]|$)([^\n]*)")
TARGET = re.compile(r"""\]\(([^)\s#]+)[^)]*\)|\b(?:src|srcset)="([^"#]+)""")
# First words of lines that are commands; a block without a language is one of commands if all its lines start so.
PROGRAMS = ("make", "pip", "python", "python3.11", "cat", "cp", "export", ".", "git", "cd", "torchrun", "accelerate")


def blocks(page: Path) -> list[str]:
    """The texts of a page's command blocks: those marked bash, and unmarked ones that hold nothing else."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language == "bash" or (not language and _is_commands(text))]


def _is_commands(text: str) -> bool:
    words = [line.split()[0] for line in joined(text) if not line.startswith("#")]
    return bool(words) and all(word in PROGRAMS or word.startswith("l4q-") for word in words)


def joined(text: str) -> list[str]:
    """Lines with their continuations, empty ones dropped."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def commands(page: Path) -> list[str]:
    """Every command of a page's blocks, comments removed, in order."""
    lines = (line for text in blocks(page) for line in joined(text))
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in lines) if line]


def invocations(page: Path) -> list[tuple[str, list[str]]]:
    """Every use of a command of ours on a page, in blocks and in running text: (program or module, its options)."""
    text = page.read_text(encoding="utf-8")
    pieces = [line for _, block in FENCE.findall(text) for line in joined(block)]
    pieces += INLINE.findall(FENCE.sub("", text))
    found = []
    for piece in pieces:
        for script, module, rest in OURS.findall(piece):
            own = re.split(r"\s#\s|&&|\||;", rest)[0]
            found.append((script or module, re.findall(r"(?<![\w-])(--[a-z][\w-]*)", own)))
    return found


def relative_targets(page: Path) -> list[str]:
    """Where a page's links and pictures lead, without anchors; links to other hosts are left out."""
    found = ["".join(groups) for groups in TARGET.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    return [target for target in found if "://" not in target]


def scripts() -> dict[str, str]:
    """Module of each of our commands, from pyproject.toml."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: str(target).partition(":")[0] for name, target in project["scripts"].items()}


def command_of(program: str) -> click.Command | None:
    """The click command behind a script or module; None for a module that parses its arguments otherwise.

    Raises:
        KeyError: No such script.
        ModuleNotFoundError: No such module.
    """
    module = scripts()[program] if program.startswith("l4q-") else program
    found = getattr(import_module(module), "command", None)
    return found if isinstance(found, click.Command) else None


def unknown_options(program: str, options: list[str]) -> list[str]:
    """Those of the options that the command does not have."""
    command = command_of(program)
    if command is None:
        return []
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [option for option in options if option not in known | {"--help"}]


def make_targets() -> set[str]:
    """The Makefile's targets."""
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", text, flags=re.MULTILINE))


def extras() -> set[str]:
    """The optional dependencies' names."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def is_part_of(command: str, other: str) -> bool:
    """Whether running `other` also does what `command` says: the same program, and every word of it."""
    mine, theirs = shlex.split(command), shlex.split(other)
    return mine[0] == theirs[0] and not Counter(mine) - Counter(theirs)
