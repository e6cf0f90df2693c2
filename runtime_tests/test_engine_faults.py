"""Engines that crash, hang, run out of memory or answer garbage: one failed row each, and nothing keeps running."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from exporters.driver import export
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import VerificationError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.host import EngineError, RemoteEngine
from runtime_tests.engines.strays import MARKER, marked
from runtime_tests.parity_runs import (
    Oracle,
    ParityOptions,
    ParityReport,
    ParityRow,
    assert_parity,
    run_oracle,
    run_target,
)
from runtime_tests.reliability import record
from runtime_tests.targets import ParityTarget, detect

WINDOW = list(range(3, 43))

# An engine whose fault is real: it dies, hangs or exhausts its own memory. Before that it starts one child in its own
# group and one in a session of its own.
FAULTY = """
import ctypes, json, os, resource, signal, subprocess, sys, time
import numpy as np

def reply(line):
    for fd in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                os.write(fd, line)
        except OSError:
            pass

def exhaust():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    np.ones(1 << 32)

FAULTS = {
    "segmentation fault": lambda: ctypes.string_at(8),
    "abort": lambda: ctypes.CDLL(None).abort(),
    "killed as by the kernel when memory runs out": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory exhausted": exhaust,
    "hang": lambda: time.sleep(3600),
    "exit": lambda: os._exit(0),
    "line that is no JSON": lambda: reply(b"\\xff\\x00 garbage\\n"),
    "nesting without end": lambda: reply(b"[" * 100000 + b"\\n"),
    "line without end": lambda: [reply(b"x" * (1 << 16)) for _ in range(100)],
    "reply to another request": lambda: reply(b'{"id": 77, "ok": true, "result": 1}\\n'),
}

class Engine:
    def __init__(self, model, fault):
        self.fault = fault
        print("about to suffer:", fault)
        self.children = [
            subprocess.Popen(["sleep", "3600"]),
            subprocess.Popen(["sleep", "3600"], start_new_session=True),
        ]

    def prompt_logprobs(self, token_ids):
        FAULTS.get(self.fault, lambda: None)()
        columns = 7 if self.fault == "another vocabulary" else 1024
        rows = np.full((len(token_ids), columns), -np.log(columns), dtype=np.float32)
        if self.fault == "NaN":
            rows[2:] = np.nan
        if self.fault == "infinity":
            rows[2:] = np.inf
        return rows

    def generate(self, token_ids, max_new_tokens):
        if self.fault == "garbage for tokens":
            reply(b'{"id": 3, "ok": true, "result": {"tokens": "none"}}\\n')
        return [1] * max_new_tokens, 1.0

    def info(self):
        if self.fault == "garbage for facts":
            reply(b'{"id": 4, "ok": true, "result": 17}\\n')
        return {"pid": os.getpid(), "children": [child.pid for child in self.children]}

    def close(self):
        if self.fault == "hang while closing":
            time.sleep(3600)
"""

# fault -> what its row says, as a pattern
FAULTS = {
    "segmentation fault": "died in prompt_logprobs .signal SIGSEGV",
    "abort": "died in prompt_logprobs .signal SIGABRT",
    "killed as by the kernel when memory runs out": "died in prompt_logprobs .signal SIGKILL",
    "memory exhausted": "MemoryError|Unable to allocate",
    "hang": "did not answer prompt_logprobs within 3 s and was killed",
    "exit": "died in prompt_logprobs .exit code 0",
    "line that is no JSON": r"answered prompt_logprobs with garbage: b'\\xff",
    "nesting without end": r"answered prompt_logprobs with garbage: b'\[\[",
    "line without end": "a line without end, b'xxx",
    "reply to another request": "answered prompt_logprobs with garbage: .*77",
    "another vocabulary": "log-probabilities have the wrong shape",
    "NaN": "the runtime answered NaN",
    "garbage for tokens": "answered generate with garbage: .*none",
    "garbage for facts": "answered info with garbage: 17",
}


class Runs(NamedTuple):
    """What the rows here are compared with."""

    checkpoint: L4QCheckpoint
    oracle: Oracle
    faulty: Path


@pytest.fixture(scope="module")
def runs(glass_checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The oracle's answers for one window, computed once."""
    source = glass_checkpoint("none", group_size=32)
    faulty = tmp_path_factory.mktemp("faulty") / "faulty.py"
    faulty.write_text(FAULTY)
    oracle = run_oracle(source, [WINDOW], ParityOptions(prompt=WINDOW[:4], new_tokens=2, threads=1))
    return Runs(L4QCheckpoint.open(source), oracle, faulty)


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """Scratch folders go into one place; the answer is every process that still carries the marker of one in it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield lambda: _of_folder(scratch)
    assert list(scratch.iterdir()) == []


def _of_folder(scratch: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARKER}={scratch}/".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def run_faulty(runs: Runs, fault: str, timeout_s: float = 60.0) -> ParityRow:
    """The row of an engine with that fault."""
    target = ParityTarget(format="gptq", engine=str(runs.faulty), variant="", folder=runs.checkpoint.path)
    target.options["fault"] = fault
    options = ParityOptions(prompt=WINDOW[:4], new_tokens=2, threads=1, timeout_s=timeout_s, check_bits=False)
    return run_target(runs.checkpoint, target, runs.oracle, options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_row_and_nothing_is_left(runs: Runs, fault: str, nothing_left: Callable[[], list[int]]) -> None:
    """The row says what happened, with the log's tail; the worker and both its children are gone."""
    row = run_faulty(runs, fault, timeout_s=3.0 if fault == "hang" else 60.0)
    assert not row.passed
    assert row.error is not None
    assert re.search(FAULTS[fault], row.error), row.error
    assert row.error.startswith(("log-probabilities", "the runtime answered NaN")) or "about to suffer" in row.error
    assert nothing_left() == []
    record("parity engine", fault, 1, "one failed row that names it; none of its processes is left")


def test_infinite_answers_break_the_bounds(runs: Runs) -> None:
    """A runtime that answers infinity is within no bound, and every bound that takes part fails."""
    row = run_faulty(runs, "infinity")
    assert row.error is None
    assert not any(check.passed for check in row.checks)


def test_an_engine_that_hangs_while_closing_is_ended(runs: Runs, nothing_left: Callable[[], list[int]]) -> None:
    """The row keeps its figures; the worker and its children are gone after the time limit."""
    row = run_faulty(runs, "hang while closing", timeout_s=3.0)
    assert (row.error, row.stats is None) == (None, False)
    assert nothing_left() == []
    record("parity engine", "hang while closing", 1, "the row keeps its figures; none of its processes is left")


def test_the_others_continue(runs: Runs, tmp_path: Path) -> None:
    """After a crash the next runtime gets its row; the report fails and names the crash alone."""
    onnx = detect(export(runs.checkpoint, "onnx", tmp_path / "onnx").folder)[0]
    broken = run_faulty(runs, "segmentation fault")
    good = run_target(runs.checkpoint, onnx, runs.oracle, ParityOptions(threads=1))
    assert good.passed
    rows = (broken, good)
    report = ParityReport(
        checkpoint=runs.checkpoint.path, tokens=39, oracle_perplexity=1.0, oracle_tokens_per_s=None, rows=rows
    )
    with pytest.raises(VerificationError, match=r"(?s)^parity failed.*gptq: the .*SIGSEGV") as caught:
        assert_parity(report)
    assert "onnx" not in str(caught.value).replace("onnxruntime", "")


def test_the_marker_finds_what_left_the_group(runs: Runs) -> None:
    """Three processes carry it while the engine runs, one of them in another session; none does afterwards."""
    remote = RemoteEngine(str(runs.faulty), runs.checkpoint.path, timeout_s=60, fault="none")
    facts, scratch = remote.info(), remote._scratch
    assert sorted(marked(scratch)) == sorted([facts["pid"], *facts["children"]])
    assert os.getsid(facts["children"][1]) != os.getsid(facts["pid"])
    remote.close()
    assert marked(scratch) == []
    with pytest.raises(EngineError, match="is closed"):
        remote.info()
