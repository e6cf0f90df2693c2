"""The view of a running training: what it shows on a terminal and elsewhere, how Ctrl-C ends it, --quiet, NO_COLOR."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from exporters.inspect.cli import command as inspect_command
from l4q.errors import UsageError
from l4q.train_view import Lines, Nothing, Panel, choose_view, sparkline
from runtime_tests.train_runs import write_pairs

COLOURS = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-7]|9[0-7]|38;)[0-9;]*m")
PROGRAM = "from l4q.cli_train import main; main()"


def figures(step: int, **more: float) -> dict[str, Any]:
    """Figures of a step, as in metrics.jsonl."""
    return {
        "step": step, "loss": 5.0 - step / 100, "lr_lora": 1e-3, "lr_scales": 5e-5, "grad_norm": 1.25,
        "tokens_per_s": 321.4, "memory_mb": 812.3, "eta_s": 3671.2, **more,
    }  # fmt: skip


def console(**settings: Any) -> Console:
    """A console that keeps what it prints."""
    return Console(file=io.StringIO(), width=80, **settings)


def printed(shown: Console) -> str:
    """What it printed."""
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_lines_are_plain_and_few() -> None:
    """Off a terminal: whole lines without control characters, a hundredth of the steps and every held-out value."""
    shown = console()
    view = choose_view(shown)
    assert isinstance(view, Lines)
    for step in range(1, 1001):
        view.show(figures(step, **({"held_out_perplexity": 33.3} if step == 555 else {})), 1000)
    view.close()
    lines = printed(shown).splitlines()
    assert len(lines) == 102  # the first, every tenth, and step 555
    assert lines[0] == "step 1/1000 loss=4.9900 lr=1.0e-03/5.0e-05 grad=1.25 tok/s=321 mem=812MB eta=1:01:11"
    assert [line for line in lines if "ppl=33.300" in line] == [line for line in lines if line.startswith("step 555/")]
    assert "\x1b" not in printed(shown)


def test_panel_shows_every_figure() -> None:
    """On a terminal: one panel redrawn in place, 80 columns wide, with the last held-out value, and the cursor back."""
    shown = console(force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    view = choose_view(shown)
    assert isinstance(view, Panel)
    view.show(figures(1, held_out_perplexity=31.5), 40)
    view.show(figures(2, scale_drift=0.0123, clipped=0.004, zero_point_moves=0.25), 40)
    view.close()
    text = printed(shown)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rsplit("step 2/40", 1)[1])
    for word in ("4.9800", "31.500 (step 1)", "1.0e-03/5.0e-05", "1.23%", "0.40%", "25.00%", "812MB", "1:01:11", "321"):
        assert word in last, word
    assert max(map(len, last.splitlines())) <= 80
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert COLOURS.search(text)


def test_colour_and_quiet_are_respected() -> None:
    """NO_COLOR takes the colour out of the same panel; a quiet console, and a terminal that is dumb, get no panel."""
    plain = console(force_terminal=True, _environ={"TERM": "xterm", "NO_COLOR": "1"})
    view = choose_view(plain)
    view.show(figures(1), 40)
    view.close()
    assert "4.9900" in printed(plain)
    assert not COLOURS.search(printed(plain))
    assert isinstance(choose_view(console(quiet=True)), Nothing)
    assert isinstance(choose_view(console(force_terminal=True, _environ={"TERM": "dumb"})), Lines)


def test_sparkline() -> None:
    """From the lowest to the highest block; equal values are all lowest."""
    assert sparkline([0.0, 3.5, 7.0]) == "▁▄█"
    assert sparkline([2.0, 2.0]) == "▁▁"


def arguments(glassllm_dir: Path, folder: Path, steps: int) -> list[str]:
    """A small training."""
    data = write_pairs(glassllm_dir, folder / "pairs.jsonl")
    words = [
        str(glassllm_dir),
        "--data",
        str(data),
        "--out",
        str(folder / "run"),
        "--leave-dense",
        "--max-length",
        "64",
    ]
    return [sys.executable, "-c", PROGRAM, *words, "--steps", str(steps)]


def test_ctrl_c_on_a_terminal(glassllm_dir: Path, tmp_path: Path) -> None:
    """The panel appears; ^C ends the run with one line that says how to go on, exit code 130, and the cursor back."""
    parent, child = pty.openpty()
    words = arguments(glassllm_dir, tmp_path, 100_000)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", BECOME_FOREGROUND, *words], stdin=child, stdout=child, stderr=child, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(child)
    seen = read_until(parent, process, "step 3/100000")
    os.write(parent, b"\x03")
    seen += read_until(parent, process, None)
    os.close(parent)
    assert process.wait(60) == 130
    assert "scale drift" in seen
    assert "Traceback" not in seen
    after = seen[seen.rindex("\x1b[?25h") :]
    assert after.count("interrupted by SIGINT; --resume continues from the newest saved state") == 1
    assert not COLOURS.search(seen)
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/checkpoint").exists()


# Makes the pseudo-terminal the controlling one, so that the byte ^C becomes SIGINT as it does for a person.
BECOME_FOREGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def read_until(terminal: int, process: subprocess.Popen[bytes], text: str | None) -> str:
    """What a terminal shows until a text appears, or until the process is gone."""
    seen, deadline = "", time.monotonic() + 300
    while text is None or text not in seen:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        try:
            data = os.read(terminal, 1 << 16) if ready else b""
        except OSError:  # the other end is closed
            data = b""
            ready = [terminal]
        if ready and not data:
            break
        seen += data.decode(errors="replace")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{text} did not appear in {seen[-2000:]}")
    return seen


def test_quiet_json_and_config(glassllm_dir: Path, tmp_path: Path) -> None:
    """With --quiet nothing is on stderr; with --json, here out of a file, stdout is the result alone."""
    config = tmp_path / "run.yaml"
    config.write_text("json: true\nsteps: 2\n", encoding="utf-8")
    words = arguments(glassllm_dir, tmp_path, 2)
    done = subprocess.run([*words[:-2], "--quiet", "--config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr == ""


def test_verbose_says_where_an_error_came_from(tmp_path: Path) -> None:
    """--verbose adds a traceback to the message; without it there is none; with --quiet it is refused."""
    plain, verbose = (CliRunner().invoke(inspect_command, [str(tmp_path), *more]) for more in ([], ["--verbose"]))
    assert isinstance(verbose.exception, UsageError)
    assert str(verbose.exception) == str(plain.exception)
    assert "Traceback" in verbose.stderr
    assert "Traceback" not in plain.stderr
    both = CliRunner().invoke(inspect_command, [str(tmp_path), "-q", "-v"])
    assert both.exit_code == 2
    assert "exclude each other" in both.stderr
