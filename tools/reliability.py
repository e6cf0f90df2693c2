"""Put what the suite injected into docs/reliability.md: python -m tools.reliability [--write FILE] [REPORT ...]."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from runtime_tests.reliability import REPORT, Fault

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: python -m tools.reliability --write -->", "<!-- end of faults -->"


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
                )
                key = (fault["area"], fault["injected"])
                if key not in best or best[key]["count"] < fault["count"]:
                    best[key] = fault
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise click.UsageError(f"{file} is no list of faults: {type(error).__name__} {error}") from error
    return [best[key] for key in sorted(best)]


def render(rows: Sequence[Fault]) -> str:
    """A Markdown table: a row per area and outcome with its faults, and the number of injections of each area."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for row in rows:
        groups.setdefault((row["area"], row["outcome"]), []).append(row)
    lines = ["| where | what was injected | how often | what happened, each time |", "|---|---|---|---|"]
    for (area, outcome), faults in groups.items():
        injected = "; ".join(fault["injected"] for fault in faults)
        count = sum(fault["count"] for fault in faults)
        lines.append(f"| {_cell(area)} | {_cell(injected)} | {count:,} | {_cell(outcome)} |")
    total = sum(row["count"] for row in rows)
    return "\n".join([*lines, "", f"{total:,} injections in {len(rows)} kinds."])


def insert(document: str, table: str) -> str:
    """The document with the table between its marks.

    Raises:
        UsageError: The marks are missing.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise click.UsageError(f"the document has no section between {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--write", type=click.Path(path_type=Path), is_flag=False, flag_value=DOCUMENT,
    help="Replace the table in this document.  [default: docs/reliability.md]",
)  # fmt: skip
def main(reports: tuple[Path, ...], write: Path | None) -> None:
    """Print the table of the fault reports, which the suite leaves in build/reliability, or write it."""
    rows = read_rows(reports or sorted(REPORT.parent.glob("*.json")))
    if not rows:
        raise click.UsageError(f"no faults are recorded in {REPORT.parent}: run the tests first")
    if write is None:
        click.echo(render(rows))
        return
    write.write_text(insert(write.read_text(encoding="utf-8"), render(rows)), encoding="utf-8")
    click.echo(f"{write}: {len(rows)} kinds of faults")


if __name__ == "__main__":
    main()
