"""Command lines: result on stdout, log on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from l4q.checkpoint import L4QCheckpoint
from l4q.cli_train import command as train_command
from runtime_tests.train_runs import (
    write_pairs,
)


@pytest.fixture(scope="module")
def corpus(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training file."""
    return write_pairs(glassllm_dir, tmp_path_factory.mktemp("corpus") / "pairs.jsonl")


def test_command_prints_json_alone_on_stdout(glassllm_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """`l4q train --json`, as a process: exit code 0, stdout is the result, stderr has progress with loss and rate."""
    arguments = ["train", str(glassllm_dir), "--data", str(corpus), "--out", str(tmp_path / "run"), "--leave-dense"]
    arguments += ["--steps", "3", "--batch-size", "2", "--zero-point", "integer", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "from l4q.cli import main; main()", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert L4QCheckpoint.open(result["checkpoint"]).quant.zero_point == "integer"
    assert "loss=" in done.stderr
    assert "lr=" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["train", "model", "--out", "RUN"], 2, "--data"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--bits", "5"], 2, "--bits"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--group-size", "48"], 2, "group_size"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--steps", "0"], 2, "steps"),
        (["bake"], 2, "bake"),
    ],
)
def test_exit_codes_without_heavy_imports(
    corpus: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    """Help and usage errors end with their exit code and one message on stderr, before torch is imported."""
    program = (
        "import atexit, sys; from l4q.cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); main()"
    )
    places = {"DATA": str(corpus), "RUN": str(tmp_path / "run")}
    arguments = [places.get(argument, argument) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("False False\n")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_end_with_their_exit_code(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An L4QError inside the command becomes its exit code and its message, without a traceback."""
    from l4q.cli_common import status

    monkeypatch.setattr(
        sys, "argv", ["l4q-train", "/no/such/model", "--data", str(corpus), "--out", str(tmp_path / "r")]
    )
    assert status(train_command) == 2


def test_help_lists_every_option() -> None:
    """Every option of the command has a help text."""
    text = CliRunner().invoke(train_command, ["--help"]).output
    options = [parameter for parameter in train_command.params if isinstance(parameter, click.Option)]
    assert len(options) > 30
    assert all(option.help and option.opts[0] in text for option in options)
