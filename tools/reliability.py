"""The tables of docs/reliability.md: python -m tools.reliability [--coverage FILE] [--write FILE] [REPORT ...]."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from runtime_tests.reliability import FUZZED, REPORT, Fault
from tools.coverage_table import coverage_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: python -m tools.reliability --write -->", "<!-- end of faults -->"
MARKS = {
    "faults": (BEGIN, END),
    "coverage": (
        "<!-- coverage: python -m tools.reliability --coverage .coverage --write -->",
        "<!-- end of coverage -->",
    ),
}


def read_rows(files: Iterable[Path]) -> list[Fault]:
    """The rows of several reports, by area and fault; of two rows on the same fault the one with more tries counts.

    Raises:
        UsageError: A file is no list of faults.
    """
    best: dict[tuple[str, str], Fault] = {}
    for file in files:
        try:
            for row in json.loads(file.read_text(encoding="utf-8")):
                fault = Fault(
                    area=str(row["area"]),
                    injected=str(row["injected"]),
                    count=int(row["count"]),
                    outcome=str(row["outcome"]),
                    commit=str(row.get("commit", "")),
                )
                key = (fault["area"], fault["injected"])
                if key not in best or best[key]["count"] < fault["count"]:
                    best[key] = fault
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise click.UsageError(f"{file} is no list of faults: {type(error).__name__} {error}") from error
    return [best[key] for key in sorted(best)]


def render(rows: Sequence[Fault]) -> str:
    """A Markdown table: a row per area and outcome with its faults, how often, and of which commits that is."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for row in rows:
        groups.setdefault((row["area"], row["outcome"]), []).append(row)
    lines = ["| where | what was injected | how often | what happened, each time | commit |", "|---|---|---|---|---|"]
    for (area, outcome), faults in groups.items():
        injected = "; ".join(fault["injected"] for fault in faults)
        count = sum(fault["count"] for fault in faults)
        commits = ", ".join(sorted({fault["commit"] or "not recorded" for fault in faults}))
        lines.append(f"| {_cell(area)} | {_cell(injected)} | {count:,} | {_cell(outcome)} | {commits} |")
    total = sum(row["count"] for row in rows)
    return "\n".join([*lines, "", f"{total:,} injections in {len(rows)} kinds."])


def insert(document: str, table: str, section: str = "faults") -> str:
    """The document with the table between the marks of a section.

    Raises:
        UsageError: The marks are missing.
    """
    first, last = MARKS[section]
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise click.UsageError(f"the document has no section between {first} and {last}")
    return f"{head}{first}\n\n{table}\n\n{last}{tail}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--coverage", type=click.Path(path_type=Path, exists=True), help="The coverage data, in place of faults.")
@click.option(
    "--write", type=click.Path(path_type=Path), is_flag=False, flag_value=DOCUMENT,
    help="Replace the table in this document.  [default: docs/reliability.md]",
)  # fmt: skip
def main(reports: tuple[Path, ...], coverage: Path | None, write: Path | None) -> None:
    """Print the table of the fault reports, which the suite leaves in build/reliability, or write it.

    The recorded runs of `make fuzz` (docs/results/fuzz.json) belong to it.
    """
    if coverage is not None:
        section, table, what = "coverage", coverage_table(coverage), "packages"
    else:
        made = sorted(REPORT.parent.glob("*.json"))
        rows = read_rows(reports or [*made, *([FUZZED] if made and FUZZED.exists() else [])])
        if not rows:
            raise click.UsageError(f"no faults are recorded in {REPORT.parent}: run the tests first")
        section, table, what = "faults", render(rows), f"{len(rows)} kinds of faults"
    if write is None:
        click.echo(table)
        return
    write.write_text(insert(write.read_text(encoding="utf-8"), table, section), encoding="utf-8")
    click.echo(f"{write}: {what}")


if __name__ == "__main__":
    main()
