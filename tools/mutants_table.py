"""Mutants by module, from what `make mutation` left: python -m tools.mutants_table [--survivors] [FOLDER]."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from runtime_tests.reliability import commit

FOLDER = Path("mutants")
VERDICTS = {0: "survived", 1: "killed", 3: "killed", 33: "no tests", 5: "no tests", None: "not run"}
"""pytest's exit code for a mutant, or mutmut's own; any other is a signal or a limit of time, which kills it too."""


def results(folder: Path) -> dict[str, dict[str, str]]:
    """Verdict by mutant, by module."""
    found = {}
    for file in sorted(folder.glob("**/*.py.meta")):
        codes = json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
        module = str(file.relative_to(folder)).removesuffix(".meta")
        found[module] = {name: VERDICTS.get(code, "killed by time") for name, code in codes.items()}
    return {module: verdicts for module, verdicts in found.items() if verdicts}


def table(found: dict[str, dict[str, str]]) -> str:
    """A Markdown table of the counts, and the commit that is checked out."""
    lines = ["| module | mutants | run | killed | survived |", "|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for module, verdicts in found.items():
        counts = Counter(verdicts.values())
        total += counts
        lines.append(_row(module, counts))
    bold = "|".join(f" **{cell.strip()}** " for cell in _row("all of these", total).strip("|").split("|"))
    return "\n".join([*lines, f"|{bold}|", "", f"Commit {commit() or 'unknown'}."])


def _row(name: str, counts: Counter[str]) -> str:
    run = counts.total() - counts["not run"] - counts["no tests"]
    killed = counts["killed"] + counts["killed by time"]
    share = f" ({100 * killed / run:.1f} %)" if run else ""
    return f"| {name} | {counts.total():,} | {run:,} | {killed:,}{share} | {counts['survived']:,} |"


@click.command()
@click.argument("folder", default=FOLDER, type=click.Path(path_type=Path))
@click.option("--survivors", is_flag=True, help="Print the names of those that live, for mutmut show and mutmut run.")
def main(folder: Path, survivors: bool) -> None:
    """Print how many mutants there are, ran, were killed and survived, by module."""
    found = results(folder)
    if not found:
        raise click.UsageError(f"no mutants in {folder}: run make mutation first")
    if survivors:
        names = [name for verdicts in found.values() for name, verdict in verdicts.items() if verdict == "survived"]
        click.echo("\n".join(names))
        return
    click.echo(table(found))


if __name__ == "__main__":
    main()
