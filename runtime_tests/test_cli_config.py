"""Options out of YAML and TOML files: the same values as on the command line, which wins; nothing unknown passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporters.cli import command as export_command
from l4q.cli_command import CommandLine
from l4q.cli_refreeze import command as freeze_command
from l4q.cli_train import command as train_command
from l4q.cli_train import parse_options
from l4q.errors import UsageError
from l4q.train_options import TrainOptions

YAML = """
model: m
data: [{data}]
out: run
bits: 3
group_size: 32          # underscores are dashes
lr: 2e-3                # text in YAML 1.1, a number here
train-scales: false
leave-dense: true
target-modules: ["*.q_proj", "*.v_proj"]
scale-lr: null          # as if it were not there
"""
TOML = """
[export]
to = ["gguf"]
[train]
model = "m"
data = "{data}"
out = "run"
bits = 3
group-size = 32
lr = 2e-3
train-scales = false
leave-dense = true
target-modules = ["*.q_proj", "*.v_proj"]
"""


def params(command: CommandLine, *words: str) -> dict[str, Any]:
    """The values a command would run with."""
    return command.make_context(str(command.name), list(words)).params


def training(*words: str) -> TrainOptions:
    """The options `l4q-train WORDS` would train with."""
    values = params(train_command, *words)
    del values["as_json"]
    return parse_options(values)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file that exists."""
    path = tmp_path / "data.txt"
    path.write_text("text", encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.yml", YAML), ("run.toml", TOML)])
def test_files_give_what_the_command_line_gives(data: Path, tmp_path: Path, name: str, text: str) -> None:
    """A file's options equal the same ones on the command line, and those on the command line win."""
    path = tmp_path / name
    path.write_text(text.format(data=data), encoding="utf-8")
    same = ["m", "--data", str(data), "--out", "run", "--bits", "3", "--group-size", "32", "--lr", "0.002"]
    same += ["--no-train-scales", "--leave-dense", "--target-modules", "*.q_proj", "--target-modules", "*.v_proj"]
    assert training("--config", str(path)) == training(*same)
    assert training("--config", str(path)) != training(*same, "--seed", "1")
    override = ["--bits", "4", "--train-scales", "--seed", "1"]
    assert training(*override, "--config", str(path)) == training(*same, *override)
    assert training("other", "--config", str(path)).model == "other"


WRONG = {
    "a key with a typo": (
        "bit: 3",
        r"(?s)does not have.*run.yaml.*got: bit\. Did you mean 'bits'\?.*expected: .*alpha",
    ),
    "a key of another command": ("gguf-type: Q4_0", r"(?s)does not have.*got: gguf-type"),
    "the file itself": ("config: run.yaml", r"does not have"),
    "a table": ("model: m\nbits: {value: 3}", r"(?s)no plain value.*run.yaml, bits.*got: .*value"),
    "several values for one": ("bits: [3, 4]", r"(?s)no plain value.*bits.*\[3, 4\]"),
    "a table of an unknown command": ("trian: {bits: 3}", r"(?s)unknown command.*trian\. Did you mean 'train'\?"),
    "no options": ("- bits", r"(?s)does not hold options.*got: list"),
    "broken YAML": ("bits: [3", r"(?s)cannot be read.*run.yaml.*got"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_understood_is_refused(tmp_path: Path, case: str) -> None:
    """Unknown keys and values of a wrong shape end with one error that names them, before anything runs."""
    text, message = WRONG[case]
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as raised:
        params(train_command, "--config", str(path))
    assert raised.value.exit_code == 2


def test_wrong_kinds_of_files_are_refused(tmp_path: Path) -> None:
    """An unknown suffix and broken TOML are refused; an empty file gives nothing."""
    (tmp_path / "run.ini").write_text("bits = 3", encoding="utf-8")
    (tmp_path / "run.toml").write_text("bits = ", encoding="utf-8")
    (tmp_path / "run.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s)kind of the configuration file is unknown.*\.ini.*\.toml"):
        params(train_command, "--config", str(tmp_path / "run.ini"))
    with pytest.raises(UsageError, match=r"(?s)cannot be read.*run.toml"):
        params(train_command, "--config", str(tmp_path / "run.toml"))
    empty = CliRunner().invoke(train_command, ["--config", str(tmp_path / "run.yaml"), "--out", "run"])
    assert empty.exit_code == 2
    assert "Missing argument 'MODEL'" in empty.stderr


def test_values_are_checked_as_on_the_command_line(data: Path, tmp_path: Path) -> None:
    """A choice that does not exist is refused with the nearest one, wherever it comes from."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\nout: run\ndata: {data}\nzero-point: intger\n", encoding="utf-8")
    refused = CliRunner().invoke(train_command, ["--config", str(path)])
    assert refused.exit_code == 2
    assert "Did you mean 'integer'?" in " ".join(refused.stderr.split())


def test_arguments_have_the_name_of_the_help(tmp_path: Path) -> None:
    """RUN is `run`; a repeatable option takes one value or a list; --json and --quiet can stand in a file too."""
    path = tmp_path / "all.toml"
    path.write_text(
        f'[freeze]\nrun = "{tmp_path}"\nout = "c"\njson = true\nquiet = true\n[export]\nto = "gguf"\ncheckpoint = "c"\n'
        'out = "e"\n',
        encoding="utf-8",
    )
    frozen, exported = params(freeze_command, "--config", str(path)), params(export_command, "--config", str(path))
    assert (frozen["run_folder"], frozen["out"], frozen["as_json"]) == (tmp_path, Path("c"), True)
    assert (exported["formats"], exported["checkpoint"]) == (("gguf",), Path("c"))
