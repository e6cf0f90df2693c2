"""Known vulnerabilities of the pinned packages, without a network: python -m tools.audit ADVISORIES.

ADVISORIES is a clone of https://github.com/pypa/advisory-database, the data behind pip-audit: one YAML file in the OSV
schema (https://ossf.github.io/osv-schema/) per advisory, in vulns/PACKAGE/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """A pinned version that an advisory names."""

    package: str
    version: str
    advisory: str
    fixed: str
    """The first version without it, or ""."""


def pins(requirements: Path) -> dict[str, str]:
    """Version by normalized name."""
    found = PIN.findall(requirements.read_text(encoding="utf-8"))
    return {str(canonicalize_name(name)): version for name, version in found}


def advisories(folder: Path, package: str) -> Iterator[dict[str, Any]]:
    """Every advisory about a package that was not withdrawn."""
    for file in sorted((folder / "vulns" / package).glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not content.get("withdrawn"):
            yield content


def findings(folder: Path, pinned: Mapping[str, str]) -> list[Finding]:
    """What the advisories say about these versions."""
    found = []
    for package, version in pinned.items():
        for advisory in advisories(folder, package):
            affected = [part for part in advisory["affected"] if canonicalize_name(part["package"]["name"]) == package]
            for part in affected:
                ranges = [entry["events"] for entry in part.get("ranges", ()) if entry["type"] == "ECOSYSTEM"]
                if version in part.get("versions", ()) or any(_holds(events, version) for events in ranges):
                    fixed = [event["fixed"] for events in ranges for event in events if "fixed" in event]
                    found.append(Finding(package, version, advisory["id"], fixed[-1] if fixed else ""))
                    break
    return found


def _holds(events: list[dict[str, str]], version: str) -> bool:
    """Whether a version lies between "introduced" and "fixed" or "last_affected" of a range's events, in order."""
    inside, asked = False, Version(version)
    for event in events:
        if "introduced" in event:
            inside = inside or event["introduced"] == "0" or Version(event["introduced"]) <= asked
        elif "fixed" in event:
            inside = inside and Version(event["fixed"]) > asked
        elif "last_affected" in event:
            inside = inside and Version(event["last_affected"]) >= asked
    return inside


@click.command()
@click.argument("database", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--requirements", type=click.Path(path_type=Path, exists=True), default=LOCK, help="Pins to look up.")
def main(database: Path, requirements: Path) -> None:
    """Print the advisories of DATABASE that apply to the pinned versions; exit code 1 if there are any."""
    if not (database / "vulns").is_dir():
        raise click.UsageError(f"{database} has no folder vulns: give a clone of pypa/advisory-database")
    pinned = pins(requirements)
    known = sum(1 for package in pinned for _ in advisories(database, package))
    found = findings(database, pinned)
    for finding in found:
        remedy = f"fixed in {finding.fixed}" if finding.fixed else "not fixed"
        click.echo(f"{finding.package} {finding.version}: {finding.advisory}, {remedy}")
    click.echo(
        f"{len(pinned)} pins, {known} advisories about these packages, {len(found)} of them about these versions"
    )
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
