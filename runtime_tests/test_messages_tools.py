"""What l4q-verify, l4q-parity, l4q-eval, servers and the browser say when they refuse, message by message."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.cli_verify import command as verify_command
from exporters.driver import export
from l4q.config import QuantConfig
from l4q.errors import UsageError, VerificationError
from runtime_tests.attacks.entries import ENTRIES
from runtime_tests.browser import Browser
from runtime_tests.cli_curves import parse_reference
from runtime_tests.import_sources import flip
from runtime_tests.lm_tasks import TaskOptions, evaluate_tasks
from runtime_tests.run import check_context
from runtime_tests.serving import server
from runtime_tests.serving.server import HOST, Server, ServerError, free_port, group_members
from runtime_tests.tiny_llama import tiny_checkpoint

# A browser that hears one byte and ends.
MUTE = "#!/bin/sh\nhead -c 1 <&3 >/dev/null\nexit 7\n"
# A server that is healthy and ends on SIGTERM, and its child, which does not.
PARENT = """
import http.server, subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE).stdout.readline()
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def test_an_export_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped bit: l4q-verify names the file, foreign decoders the module; as written, both are content."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # entries replace it
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32))
    export(checkpoint, "gptq", tmp_path / "gptq", check="none")
    bases, folder = {"none": checkpoint.path}, shutil.copytree(tmp_path / "gptq", tmp_path / "changed")
    flip(folder)
    for path, code in ((tmp_path / "gptq", 0), (folder, VerificationError.exit_code)):
        assert ENTRIES["verify gptq"](path, bases, tmp_path) == code
        found = CliRunner().invoke(verify_command, [str(path)]).exception
        assert isinstance(found, VerificationError) == bool(code)
    assert "error: the export is not the checkpoint's" in capsys.readouterr().err
    assert str(found).startswith(f"the folder is not what was written\n  where: {folder}\n  got: see the list above")


def test_references_and_contexts(tmp_path: Path) -> None:
    """A reference line needs a label and a number; windows must fit the model."""
    assert parse_reference("16-bit=25.9") == ("16-bit", 25.9)
    for text in ("25.9", "=25.9", "16-bit=much", "16-bit=-1"):
        with pytest.raises(UsageError, match=rf"--reference takes LABEL=PERPLEXITY\n  got: {text}\n  expected: for ex"):
            parse_reference(text)
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32))
    check_context(checkpoint, 512, 480)
    for window, new_tokens, option in ((513, 0, "--window"), (512, 481, "--new-tokens")):
        with pytest.raises(
            UsageError, match=rf"the model's context is too short\n  where: {option}\n  got: 513 tokens"
        ):
            check_context(checkpoint, window, new_tokens)


def test_a_task_nobody_knows(glassllm_dir: Path) -> None:
    """lm_eval's own complaint stands in ours."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(glassllm_dir), AutoTokenizer.from_pretrained(glassllm_dir)
    with pytest.raises(
        UsageError, match=r"lm_eval could not run the tasks\n  where: no_such_task\n(?s:.*)no_such_task"
    ):
        evaluate_tasks(model, tokenizer, ["no_such_task"], TaskOptions())


def test_a_browser_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silence is an error at once, not after the timeout."""
    program = tmp_path / "browser"
    program.write_text(MUTE)
    program.chmod(0o755)
    monkeypatch.setenv("L4Q_BROWSER", str(program))
    with pytest.raises(UsageError, match="the browser does not answer\n  got: exit status"):
        Browser(tmp_path / "profile")


def test_a_process_that_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of a server that the system does not end, as one that waits for a dead disk, is reported."""
    end, refused = os.killpg, []

    def ignore(group: int, number: int) -> None:
        refused.append(number)

    port = free_port()
    started = Server(
        [sys.executable, "-S", "-c", PARENT, str(port)],
        url=f"http://{HOST}:{port}",
        environment={"PATH": os.environ["PATH"]},
        timeout_s=60,
    )
    assert len(group_members(started.group)) == 2
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.3)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "killpg", lambda group, number: ignore(group, number) if number else end(group, 0))
            with pytest.raises(
                ServerError, match=f"a server left processes behind\n  where: process group {started.group}"
            ):
                started.stop(timeout_s=0.3)
        assert refused == [signal.SIGKILL]
    finally:
        end(started.group, signal.SIGKILL)
