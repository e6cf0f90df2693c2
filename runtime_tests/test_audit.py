"""Advisories against pins: versions inside and outside of ranges, lists, withdrawn ones, and the real lock file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.audit import LOCK, main, pins

RANGES = """
id: PYSEC-1
affected:
- package: {name: Some_Package, ecosystem: PyPI}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events:
      [{introduced: "0"}, {fixed: 1.2.3},
       {introduced: 2.0rc1}, {fixed: "2.10"}, {introduced: "3"}, {last_affected: "3.4"}]
- package: {name: other, ecosystem: PyPI}
  ranges:
  - type: ECOSYSTEM
    events: [{introduced: "0"}]
"""
LISTED = """
id: PYSEC-2
affected:
- package: {name: some-package, ecosystem: PyPI}
  versions: [5.0.post1]
"""
WITHDRAWN = LISTED.replace("PYSEC-2", "PYSEC-3").replace("5.0.post1", "9.9") + "withdrawn: 2020-01-01T00:00:00Z\n"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Three advisories."""
    folder = tmp_path / "database" / "vulns" / "some-package"
    folder.mkdir(parents=True)
    for name, content in (("PYSEC-1", RANGES), ("PYSEC-2", LISTED), ("PYSEC-3", WITHDRAWN)):
        (folder / f"{name}.yaml").write_text(content)
    return tmp_path / "database"


@pytest.mark.parametrize(
    ("version", "advisory"),
    [
        ("0.1", "PYSEC-1"), ("1.2.2", "PYSEC-1"), ("1.2.3", ""), ("1.9", ""), ("2.0", "PYSEC-1"), ("2.9", "PYSEC-1"),
        ("2.10", ""), ("3.4", "PYSEC-1"), ("3.5", ""), ("5.0.post1", "PYSEC-2"), ("9.9", ""),
    ],
)  # fmt: skip
def test_versions_inside_an_advisory_are_found(version: str, advisory: str, database: Path) -> None:
    """Names are normalized, versions compared as versions; exit code 1 where something is found."""
    lock = database / "lock"
    lock.write_text(f"# comment==1\nSome.Package[extra]=={version} ; python_version > '3'\nother-one==1\n")
    done = CliRunner().invoke(main, [str(database), "--requirements", str(lock)], catch_exceptions=False)
    assert done.exit_code == bool(advisory)
    assert done.output.splitlines()[-1] == (
        f"2 pins, 2 advisories about these packages, {int(bool(advisory))} of them about these versions"
    )
    remedy = {"PYSEC-1": "fixed in 2.10", "PYSEC-2": "not fixed"}
    assert (f"some-package {version}: {advisory}, {remedy.get(advisory)}" in done.output) == bool(advisory)


def test_the_lock_file_is_read_whole(tmp_path: Path) -> None:
    """Every requirement of the lock is a pin; a folder that is no database is refused."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(pins(LOCK)) == len(lines) > 100
    assert "has no folder vulns" in CliRunner().invoke(main, [str(tmp_path)]).output
