"""Servers as processes, and the judge of answers: what goes wrong is reported, and nothing keeps running."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l4q.errors import UnsupportedError, UsageError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.serving.client import Answer
from runtime_tests.serving.judge import Expected, compare_answer, expect, prompt_problems, same_answer
from runtime_tests.serving.runtimes import ServeOptions, serve
from runtime_tests.serving.server import HOST, Server, ServerError, free_port, group_members
from tools.serve_check import command

# A server that is healthy, ignores SIGTERM and has a child that nobody told to stop.
STUBBORN = """
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def start(program: str, *arguments: str, timeout_s: float = 30.0) -> Server:
    """A small program as a server on a free port, which is its first argument."""
    port = free_port()
    command = [sys.executable, "-S", "-c", program, str(port), *arguments]
    url = f"http://{HOST}:{port}"
    return Server(command, url=url, environment={"PATH": os.environ["PATH"]}, timeout_s=timeout_s)


def test_a_server_that_ignores_sigterm_is_killed_with_its_children() -> None:
    """After stop, no process of its group runs; `killed` says that it took force."""
    server = start(STUBBORN)
    assert len(group_members(server.group)) == 2
    server.stop(timeout_s=0.5)
    assert server.killed
    assert group_members(server.group) == []
    server.stop()  # twice is no harm


def test_a_server_that_ends_shows_its_log() -> None:
    """The error has the exit code and the end of stderr, at once, not after the timeout."""
    with pytest.raises(
        ServerError, match=r"the server ended with exit code 3 before it was healthy(.|\n)*no such model: x"
    ):
        start("import sys; print('no such model: x', file=sys.stderr); sys.exit(3)")


def test_a_server_that_never_answers_is_stopped() -> None:
    """The wait has an end, and so has the process."""
    with pytest.raises(ServerError, match=r"was not healthy within 1 s(.|\n)*still loading: (\d+)") as raised:
        start("import os, time; print('still loading:', os.getpid(), flush=True); time.sleep(600)", timeout_s=1.0)
    assert group_members(int(str(raised.value).rpartition("still loading: ")[2].split()[0])) == []


def test_llama_cpp_refuses_a_broken_file_with_its_own_words(tmp_path: Path) -> None:
    """A truncated GGUF: the server's log is in the message."""
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ServerError, match=r"exit code(.|\n)*model-Q4_0\.gguf"):
        serve(tmp_path)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    """Before anything starts."""
    with pytest.raises(UsageError, match="none of the formats"):
        serve(tmp_path)


def test_serve_check_needs_a_chat_template(glass_checkpoint: CheckpointMaker) -> None:
    """The oracle refuses before any server starts, and says where a template goes."""
    with pytest.raises(UnsupportedError, match="the checkpoint has no chat template") as raised:
        expect(glass_checkpoint("none"), 4)
    assert "chat_template.jinja" in str(raised.value)


def test_another_interpreter_serves(tmp_path: Path) -> None:
    """--python is used for its runtime only, and a wrong form is refused."""
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho another interpreter got $2 >&2\nexit 5\n")
    other.chmod(0o755)
    with pytest.raises(ServerError, match=r"exit code 5(.|\n)*another interpreter got runtime_tests.serving.llamacpp"):
        serve(tmp_path, ServeOptions(pythons={"llamacpp": str(other), "vllm": "/nowhere"}))
    with pytest.raises(UsageError, match="--python takes ENGINE=PATH"):
        command.main(["checkpoint", str(tmp_path), "--python", "vllm"], standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--new-tokens", "0"], "new-tokens"), (["--context", "0"], "context"), (["--threads", "0"], "threads")],
)
def test_serve_check_refuses_sizes_of_zero(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Click's own message and exit code 2."""
    with pytest.raises(SystemExit) as raised:
        command.main(["checkpoint", "export", *words])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


NOISE = 0.1
WANTED = Expected(
    messages=[{"role": "user", "content": "?"}],
    prompt_ids=(1, 5, 6),
    token_ids=(10, 11, 12, 2),
    text="a b c",
    candidates=({10: -0.1, 99: -3.1}, {11: -0.2, 99: -2.2}, {12: -0.6, 77: -0.75, 99: -0.85}, {2: -0.4, 8: -4.4}),
)
GOOD = Answer(text="a b c", token_ids=(10, 11, 12, 2), logprobs=(-0.15, -0.18, -0.61, -0.4), stopped=True)


def judged(**changes: Any) -> list[str]:
    """The problems of a changed answer."""
    return compare_answer(WANTED, replace(GOOD, **changes), NOISE)[0]


def test_the_rule_of_greedy_text() -> None:
    """Equal passes; another token must be within twice the noise of the best, and its logprob within the noise."""
    problems, agreed, worst = compare_answer(WANTED, GOOD, NOISE)
    assert (problems, agreed) == ([], 4)
    assert worst == pytest.approx(0.05)
    near = replace(GOOD, text="a b d", token_ids=(10, 11, 77, 78), logprobs=(-0.1, -0.2, -0.7, -9.0), stopped=False)
    assert compare_answer(WANTED, near, NOISE)[:2] == ([], 2)
    near = replace(near, logprobs=(-0.1, -0.2, -0.5, -9.0))
    assert compare_answer(WANTED, near, NOISE)[0] == ["logprob of token 2 differs by 0.25, allowed 0.1"]
    assert judged(token_ids=(10, 11, 99, 2))[0] == "token 2 is 99, expected 12, which leads it by 0.25 nats"
    assert judged(token_ids=(10, 55, 12, 2)) == ["token 1 is 55, expected 11, which leads it by inf nats"]
    assert judged(token_ids=(10, 11, 12), logprobs=GOOD.logprobs[:3]) == ["token 3 is missing, expected 2"]
    assert judged(token_ids=(10, 11, 12, 2, 8), logprobs=(*GOOD.logprobs, -1.0)) == ["token 4 is 8, expected the end"]


def test_wrong_numbers_and_texts_are_noticed() -> None:
    """A logprob outside the noise, NaN, a missing logprob, other text for the same ids, other prompt ids."""
    assert judged(logprobs=(-0.1, -0.35, -0.6, -0.4)) == ["logprob of token 1 differs by 0.15, allowed 0.1"]
    assert "differs by nan" in judged(logprobs=(-0.1, float("nan"), -0.6, -0.4))[0]
    assert judged(logprobs=(-0.1,)) == ["1 logprobs for 4 tokens"]
    assert judged(text="a b  c") == ["text 'a b  c', expected 'a b c'"]
    assert prompt_problems(WANTED, [1, 5, 6]) == []
    assert prompt_problems(WANTED, [1, 1, 5, 6]) == ["the prompt's 4 token ids differ from transformers' 3"]


def test_two_answers_of_one_server_must_be_equal() -> None:
    """Streamed, or among others: the same ids and text, but for a stop token that is not streamed."""
    assert same_answer(WANTED, GOOD, GOOD, NOISE) == []
    assert same_answer(WANTED, GOOD, replace(GOOD, token_ids=(10, 11, 12)), NOISE) == []
    assert same_answer(WANTED, GOOD, replace(GOOD, text="a bc"), NOISE) == ["text 'a bc', expected 'a b c'"]
    assert same_answer(WANTED, GOOD, replace(GOOD, token_ids=(10, 12, 12, 2)), NOISE)
    assert same_answer(WANTED, GOOD, replace(GOOD, token_ids=(10, 11, 99, 9)), NOISE)
    assert same_answer(WANTED, GOOD, replace(GOOD, token_ids=(10, 11, 77, 9)), NOISE) == []
    assert same_answer(WANTED, GOOD, replace(GOOD, token_ids=(10, 11, 12), stopped=False), NOISE)
