"""Parity reports of real runs, made once for all tests that look at reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from exporters.driver import export
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import VerificationError
from runtime_tests.cli import command


class Reports(NamedTuple):
    """Folders with report.json and report.html of a faithful and of a foreign export."""

    source: Path
    good: Path
    bad: Path

    def data(self, name: str) -> dict[str, Any]:
        """A fresh copy of report.json."""
        content: dict[str, Any] = json.loads((getattr(self, name) / "report.json").read_text(encoding="utf-8"))
        return content

    def page(self, name: str) -> str:
        """report.html."""
        return str((getattr(self, name) / "report.html").read_text(encoding="utf-8"))


def make_reports(source: Path, other: Path, text: Path, base: Path) -> Reports:
    """Run the command on two ONNX exports of which only one is `source`'s, with 2 windows of 100 tokens."""
    counts = ("--text", text, "--windows", 2, "--window", 100, "--new-tokens", 8, "--threads", 1, "--no-card")
    for name, exported in (("good", source), ("bad", other)):
        onnx = export(L4QCheckpoint.open(exported), "onnx", base / f"{name}-onnx").folder
        words = [str(word) for word in (source, onnx, *counts, "--report", base / name)]
        result = CliRunner().invoke(command, words)
        assert isinstance(result.exception, VerificationError) == (name == "bad"), result.output
        assert (result.exit_code == 0) == (name == "good")
    return Reports(source, base / "good", base / "bad")
