"""The GitHub Action and its script: the step that the action runs passes on a good export and fails on a bad one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime_tests.conftest import ASSETS
from runtime_tests.report_runs import Reports

ACTION = Path(__file__).resolve().parent.parent / ".github" / "actions" / "parity"
EXPRESSION = re.compile(r"\$\{\{ *(?:inputs\.(\w+)|github\.(\w+)) *\}\}")


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    """action.yml."""
    content: dict[str, Any] = yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))
    return content


def steps(action: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps by name."""
    return {step["name"]: step for step in action["runs"]["steps"]}


def test_every_input_is_used_and_every_value_is_an_input(action: dict[str, Any]) -> None:
    """Inputs and references agree, each input is described, and the script reads what the step hands it."""
    text = json.dumps(action["runs"])
    named = {match[1] for match in EXPRESSION.finditer(text) if match[1]} | set(re.findall(r"inputs\.(\w+) !=", text))
    assert named == set(action["inputs"])
    assert all(
        entry["description"] and ("default" in entry or entry["required"]) for entry in action["inputs"].values()
    )
    handed = set(steps(action)["Export and compare"]["env"]) - {"ACTION"}
    assert handed == set(re.findall(r"\$\{([A-Z]+):[-?]", (ACTION / "parity.sh").read_text()))


def test_composite_with_the_report_attached_whatever_happens(action: dict[str, Any]) -> None:
    """Every command names its shell, as composite actions must; the upload follows also after a failure."""
    assert action["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in action["runs"]["steps"] if "run" in step)
    last = action["runs"]["steps"][-1]
    assert last["if"] == "always()"
    assert last["uses"].startswith("actions/upload-artifact@")
    assert last["with"]["path"] == steps(action)["Export and compare"]["env"]["REPORT"]


def run_step(action: dict[str, Any], folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run the step's own command in bash, with its environment filled in as the runner does."""
    values = {name: entry.get("default") for name, entry in action["inputs"].items()} | inputs
    step = steps(action)["Export and compare"]

    def value(match: re.Match[str]) -> str:
        return str(values[match[1]] if match[1] else {"action_path": ACTION}[match[2]])

    own = {name: EXPRESSION.sub(value, text) for name, text in step["env"].items()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **own, "PATH": path, "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    return subprocess.run(
        ["bash", "-e", "-c", step["run"]], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def inputs(reports: Reports) -> dict[str, str]:
    """A checkpoint, a text, and a small comparison in ONNX Runtime."""
    text = str(ASSETS / "text" / "wiki_demo.txt")
    return {"checkpoint": str(reports.source), "text": text, "formats": "onnx", "windows": "2", "window": "100"}


def test_step_exports_and_passes(action: dict[str, Any], inputs: dict[str, str], tmp_path: Path) -> None:
    """From the checkpoint alone: exported, compared, exit code 0, report written and summarized."""
    finished = run_step(action, tmp_path, **inputs)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "l4q-parity" / "report.json").read_text())
    assert report["passed"] is True
    assert "<html" in (tmp_path / "l4q-parity" / "report.html").read_text()
    assert "onnx" in (tmp_path / "summary.md").read_text()


def test_step_fails_with_the_report(
    action: dict[str, Any], inputs: dict[str, str], reports: Reports, tmp_path: Path
) -> None:
    """An export of other weights fails the step with code 4, and the report is there to be attached."""
    exports = tmp_path / "exports"
    exports.mkdir()
    (exports / "onnx").symlink_to(reports.bad.parent / "bad-onnx")
    finished = run_step(action, tmp_path, **inputs, exports=str(exports))
    assert finished.returncode == 4
    assert "parity failed" in finished.stderr
    assert json.loads((tmp_path / "l4q-parity" / "report.json").read_text())["passed"] is False


def test_step_refuses_a_missing_checkpoint(action: dict[str, Any], inputs: dict[str, str], tmp_path: Path) -> None:
    """A checkpoint that is not there fails the step with l4q-export's own message and code."""
    finished = run_step(action, tmp_path, **{**inputs, "checkpoint": "nowhere"})
    assert finished.returncode == 2
    assert "config.json not found" in finished.stderr
