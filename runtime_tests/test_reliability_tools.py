"""The table of docs/reliability.md and the oldest versions: made from what was recorded, refused where nothing was."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime_tests.reliability import record
from tools.minimum import PACKAGES, TESTS, lower_bounds, oldest
from tools.minimum import main as minimum
from tools.reliability import BEGIN, DOCUMENT, END, insert, read_rows, render
from tools.reliability import main as reliability

PROJECT = Path(__file__).resolve().parent.parent


def test_the_table_sums_what_was_recorded(tmp_path: Path) -> None:
    """Faults of one area and outcome share a row; of two reports on a fault the one with more tries counts."""
    first, second = tmp_path / "faults.json", tmp_path / "long run.json"
    record("export", "SIGKILL", 50, "resumed", report=first)
    record("export", "disk full", 3, "resumed", report=first)
    record("export", "a | b", 1, "refused", report=first)
    record("export", "SIGKILL", 400, "resumed", report=second)
    table = render(read_rows([first, second])).splitlines()
    assert table[2:] == [
        "| export | SIGKILL; disk full | 403 | resumed |",
        "| export | a \\| b | 1 | refused |",
        "",
        "404 injections in 3 kinds.",
    ]


def test_the_document_is_written_between_its_marks(tmp_path: Path) -> None:
    """Twice is the same as once, and the real document has the marks."""
    report, page = tmp_path / "faults.json", tmp_path / "page.md"
    record("export", "SIGKILL", 50, "resumed", report=report)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        result = CliRunner().invoke(reliability, [str(report), "--write", str(page)], catch_exceptions=False)
        assert result.exit_code == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"before\n{BEGIN}\n\n| where |")
    assert written.endswith(f"1 kinds.\n\n{END}\nafter\n")
    assert "old" not in written
    assert insert(DOCUMENT.read_text(encoding="utf-8"), "table").count("table") >= 1
    assert CliRunner().invoke(reliability, [str(report)]).output.startswith("| where |")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is no list of faults"), ("[{}]", "is no list of faults"), ("[]", "no faults are")]
)
def test_reports_that_are_none_are_refused(content: str, message: str, tmp_path: Path) -> None:
    """Garbage and an empty report end in exit code 2; a document without marks too."""
    report = tmp_path / "faults.json"
    report.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(reliability, [str(report)])
    assert result.exit_code == 2
    assert message in result.output
    report.write_text(json.dumps([{"area": "a", "injected": "b", "count": 1, "outcome": "c"}]), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("no marks", encoding="utf-8")
    assert "has no section between" in CliRunner().invoke(reliability, [str(report), "--write", str(page)]).output


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    """Every package of the list has a lower bound, every test a file; a package without a bound is named."""
    bounds = lower_bounds(tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    assert oldest(PACKAGES) == [f"{name}=={bounds[name]}" for name in PACKAGES]
    assert lower_bounds({"dependencies": ["a>=1.2,<2"], "optional-dependencies": {"x": ["b==3", "c >= 4; y"]}}) == {
        "a": "1.2",
        "c": "4",
    }
    assert all((PROJECT / "runtime_tests" / name).is_file() for name in TESTS)
    shown = CliRunner().invoke(minimum, ["--list", "numpy"])
    assert shown.output == f"numpy=={bounds['numpy']}\n"
    assert "no lower bound for nothing" in CliRunner().invoke(minimum, ["--list", "nothing"]).output
