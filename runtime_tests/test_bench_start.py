"""The benchmark of start-up: it times exports that happen, and the last line has its shape."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporters.cli import FORMATS
from tools import bench_start


def test_the_last_line_is_one_json_object(tmp_path: Path, smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One format, once; nothing is left on the disk."""
    monkeypatch.setattr(bench_start, "FORMATS", ("gptq",))
    arguments = ["--repetitions", "1", "--tokenizer", str(smollm2_dir), "--scratch", str(tmp_path)]
    done = CliRunner().invoke(bench_start.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"seconds_besides_torch", "help"}
    assert set(figures["seconds_besides_torch"]) == {"gptq"}
    assert figures["help"] > 0
    assert not any(tmp_path.iterdir())


def test_every_format_is_timed_and_a_failure_ends_it(tmp_path: Path) -> None:
    """A process that fails has no time worth reporting."""
    arguments = bench_start.processes(tmp_path / "nowhere", tmp_path / "out")
    assert set(FORMATS) < set(arguments)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        bench_start.seconds(arguments["gguf"])
    assert b"nowhere" in failed.value.stderr
