"""Lines and branches by package, from what `make coverage` measured."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from coverage import Coverage
from coverage.exceptions import CoverageException

from runtime_tests.reliability import commit

COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")
"""As coverage's JSON report names them: lines, covered ones, branches, covered ones."""


def coverage_table(data: Path) -> str:
    """A Markdown table: lines and branches of every package and how many were covered, and of which commit that is.

    Raises:
        UsageError: There is no coverage data in the file.
    """
    packages: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for file, found in _measured(data).items():
        for number, key in enumerate(COUNTS):
            packages[str(Path(file).parent)][number] += int(found[key])
    rows = [_row(name, counts) for name, counts in sorted(packages.items())]
    total = [sum(counts[number] for counts in packages.values()) for number in range(len(COUNTS))]
    bold = "|".join(f" **{cell.strip()}** " for cell in _row("all", total).strip("|").split("|"))
    head = ["| package | lines | covered | branches | covered |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, f"|{bold}|", "", f"Commit {commit() or 'unknown'}."])


def _measured(data: Path) -> dict[str, dict[str, int]]:
    """Counts by file."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        try:
            measured = Coverage(data_file=str(data))
            measured.load()
            measured.json_report(outfile=str(report))
        except CoverageException as error:
            raise click.UsageError(f"{data} is no coverage data: {error}") from error
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    return {file: found["summary"] for file, found in files.items()}


def _row(name: str, counts: list[int]) -> str:
    lines, covered, branches, taken = counts
    return f"| {name} | {lines:,} | {_share(covered, lines)} | {branches:,} | {_share(taken, branches)} |"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"
