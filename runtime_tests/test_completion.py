"""`l4q completion`: what the shells are told, and what they get when a key is pressed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from l4q.cli import SUBCOMMANDS
from l4q.cli_completion import command
from l4q.errors import UsageError


def bash(script: str) -> str:
    """What a script prints in bash, with the commands of this environment on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_completion_works_in_bash() -> None:
    """After `eval "$(l4q completion bash)"` bash completes commands, options and choices."""
    cases = {
        "l4q ex": "export",
        "l4q-train m --zero": "--zero-point",
        "l4q-export c --to gp": "gptq",
        "l4q export c --gguf-type Q5": "Q5_0",
        "l4q-export c --to gptq gg": "gguf",
        "l4q export c --to gptq --dry-run gg": "",
    }
    lines = ['eval "$(l4q completion bash)"']
    for words in cases:
        name = words.split()[0]
        lines.append(f"COMPREPLY=(); COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}")
        lines.append(f'_{name.replace("-", "_")}_completion {name}; echo "${{COMPREPLY[*]}}"')
    assert bash("\n".join(lines)).splitlines() == list(cases.values())


@pytest.mark.parametrize(("shell", "expected"), [("zsh", "plain\ngptq\n"), ("fish", "plain,gptq")])
def test_completion_answers_other_shells(shell: str, expected: str) -> None:
    """The scripts for zsh and fish name every command, and the command answers in these shells' protocols."""
    script = CliRunner().invoke(command, [shell]).stdout
    assert all(found.script in script for found in SUBCOMMANDS.values() if found.script)
    words = f"COMP_WORDS='l4q-export c --to gp' COMP_CWORD={'3' if shell == 'zsh' else 'gp'}"
    assert bash(f"{words} _L4Q_EXPORT_COMPLETE={shell}_complete l4q-export").startswith(expected)


def test_completion_refuses_other_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument $SHELL decides; one that has no completion is named."""
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(UsageError, match=r"(?s)no completion for this shell.*tcsh.*bash, zsh, fish"):
        CliRunner().invoke(command, [], catch_exceptions=False)
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert "complete --no-files --command l4q-train" in CliRunner().invoke(command, []).stdout
