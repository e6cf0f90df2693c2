"""The fault report: what tests injected, how often, and what came of it.

One JSON list of {"area", "injected", "count", "outcome"} in build/reliability/faults.json, from which the table of
docs/reliability.md is made. A row is added after its assertions held, so a row's presence means it passed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

REPORT = Path(__file__).resolve().parent.parent / "build" / "reliability" / "faults.json"


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


def record(area: str, injected: str, count: int, outcome: str, *, report: Path = REPORT) -> None:
    """Put a row into the report; a row of the same area and fault is replaced. Safe between processes."""
    row = Fault(area=area, injected=injected, count=count, outcome=outcome)
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
    with report.with_name(f".{report.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
