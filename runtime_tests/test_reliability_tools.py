"""The tables of docs/reliability.md and the oldest versions: made from what was recorded, refused where nothing was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime_tests.reliability import FUZZED, commit, record, rows
from tools.coverage_table import coverage_table
from tools.fuzz_targets import TARGETS
from tools.minimum import PACKAGES, TESTS, lower_bounds, oldest
from tools.minimum import main as minimum
from tools.mutants_table import main as mutants
from tools.reliability import BEGIN, DOCUMENT, END, MARKS, insert, read_rows, render
from tools.reliability import main as reliability

PROJECT = Path(__file__).resolve().parent.parent


def test_the_table_sums_what_was_recorded(tmp_path: Path) -> None:
    """Faults of one area and outcome share a row; of two reports on a fault the one with more tries counts."""
    first, second = tmp_path / "faults.json", tmp_path / "long run.json"
    record("export", "SIGKILL", 50, "resumed", report=first)
    record("export", "disk full", 3, "resumed", report=first)
    record("export", "a | b", 1, "refused", report=first)
    record("export", "SIGKILL", 400, "resumed", report=second)
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|", commit())
    table = render(read_rows([first, second])).splitlines()
    assert table[2:] == [
        f"| export | SIGKILL; disk full | 403 | resumed | {commit()} |",
        f"| export | a \\| b | 1 | refused | {commit()} |",
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


def test_recorded_fuzz_runs_are_kept() -> None:
    """One per parser in the repository, of a commit that it names, so that the table needs no hours of fuzzing."""
    found = {row["injected"]: row for row in rows(FUZZED)}
    assert sorted(found) == sorted(f"fuzz, {parser}, recorded run" for parser in TARGETS)
    assert all(row["count"] >= 100_000 and row["commit"] for row in found.values())
    page = DOCUMENT.read_text(encoding="utf-8")
    assert all(
        f"| {row['injected']} | {row['count']:,} | {row['outcome']} | {row['commit']} |" in page
        for row in found.values()
    )


def test_coverage_is_summed_by_package(tmp_path: Path) -> None:
    """Lines and branches of a run over two packages, child process included; what is no such data is refused."""
    code = {"a/one.py": "def f(x):\n    if x:\n        return 1\n    return 2\nf(1)\n", "b/two.py": "y = 1\n"}
    for name, content in code.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    (tmp_path / "run.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, 'a/one.py'])\nimport b.two\n"
    )
    settings = ("[tool.coverage.run]", "branch = true", "parallel = true", "relative_files = true")
    lists = ("source = ['a', 'b']", "patch = ['subprocess']", "")
    (tmp_path / "pyproject.toml").write_text("\n".join([*settings, *lists]))
    own = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}  # those of make coverage
    for words in (["run", "run.py"], ["combine", "--quiet"]):
        subprocess.run([sys.executable, "-m", "coverage", *words], cwd=tmp_path, env=own, check=True)
    data = tmp_path / ".coverage"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        table = coverage_table(data).splitlines()
        page = tmp_path / "page.md"
        page.write_text("\n".join(MARKS["coverage"]))
        done = CliRunner().invoke(reliability, ["--coverage", str(data), "--write", str(page)], catch_exceptions=False)
    assert table[2:5] == [
        "| a | 5 | 80.0 % | 2 | 50.0 % |",
        "| b | 1 | 100.0 % | 0 | – |",
        "| **all** | **6** | **83.3 %** | **2** | **50.0 %** |",
    ]
    assert table[-1] == f"Commit {commit()}."
    assert done.exit_code == 0
    assert "\n".join(table) in page.read_text(encoding="utf-8")
    data.write_text("none")
    assert "is no coverage data" in CliRunner().invoke(reliability, ["--coverage", str(data)]).output
    assert all(mark in DOCUMENT.read_text(encoding="utf-8") for marks in MARKS.values() for mark in marks)


def test_mutants_are_counted_by_module(tmp_path: Path) -> None:
    """Killed by a test or by its time, survived, without tests, not run; and the survivors' names."""
    assert "no mutants in" in CliRunner().invoke(mutants, [str(tmp_path)]).output
    (tmp_path / "l4q").mkdir()
    codes = {"x_1": 1, "x_2": 0, "x_3": -24, "x_4": 33, "x_5": None, "x_6": 1}
    (tmp_path / "l4q" / "quant.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    (tmp_path / "l4q" / "none.py.meta").write_text(json.dumps({"exit_code_by_key": {}}))
    lines = CliRunner().invoke(mutants, [str(tmp_path)]).output.splitlines()
    assert lines[2] == "| l4q/quant.py | 6 | 4 | 3 (75.0 %) | 1 |"
    assert lines[3] == "| **all of these** | **6** | **4** | **3 (75.0 %)** | **1** |"
    assert CliRunner().invoke(mutants, [str(tmp_path), "--survivors"]).output == "x_2\n"
