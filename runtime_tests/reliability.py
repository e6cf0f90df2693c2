"""The fault report: what tests injected, how often, and what came of it.

One JSON list of {"area", "injected", "count", "outcome", "commit"} in build/reliability/faults.json, from which the
table of docs/reliability.md is made. A row is added after its assertions held, so a row's presence means it passed.
Rows that take hours to make are kept in the repository, in docs/results/fuzz.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypedDict

PROJECT = Path(__file__).resolve().parent.parent
REPORT = PROJECT / "build" / "reliability" / "faults.json"
FUZZED = PROJECT / "docs" / "results" / "fuzz.json"
"""Finished runs of `make fuzz`."""


class Fault(TypedDict):
    """One row of the report."""

    area: str
    """What was attacked: "export", "train", "safetensors header", ..."""
    injected: str
    """The fault: "SIGKILL at a random system call", "disk full", ..."""
    count: int
    """How many times it was injected, or how many examples were tried."""
    outcome: str
    """What happened each time: "resumed, bytes equal to an undisturbed run's", ..."""
    commit: str
    """Of what code, see `commit`."""


@cache
def commit() -> str:
    """The short hash of the commit checked out, with + where the code differs from it; "" outside of a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "l4q", "exporters", "runtime_tests", "tools"
        )
        return git("rev-parse", "--short=7", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def record(area: str, injected: str, count: int, outcome: str, *, report: Path = REPORT) -> None:
    """Put a row into the report; a row of the same area and fault is replaced. Safe between processes."""
    row = Fault(area=area, injected=injected, count=count, outcome=outcome, commit=commit())
    with _locked(report):
        kept = [old for old in rows(report) if (old["area"], old["injected"]) != (area, injected)]
        ordered = sorted([*kept, row], key=lambda fault: (fault["area"], fault["injected"]))
        temporary = report.with_name(f".{report.name}.part")
        temporary.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, report)


def rows(report: Path = REPORT) -> list[Fault]:
    """The rows recorded so far, by area and fault."""
    if not report.exists():
        return []
    found: list[Fault] = json.loads(report.read_text(encoding="utf-8"))
    return found


@contextmanager
def _locked(report: Path) -> Iterator[None]:
    report.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(report.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
