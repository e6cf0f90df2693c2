"""Every parser takes damaged inputs: an `L4QError` or a result, never anything else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4q.errors import UsageError, VerificationError
from runtime_tests.reliability import record
from tools import fuzz
from tools.fuzz_mutate import EDITS, mutate
from tools.fuzz_targets import TARGETS, Target

EXAMPLES = 40
POSITIONS = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=0, max_size=9)), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    """The content with bytes overwritten; an empty piece cuts."""
    data = bytearray(content)
    for at, piece in edits:
        place = at % (len(data) + 1)
        data[place : place + max(1, len(piece))] = piece
    return bytes(data)


@pytest.mark.parametrize("parser", TARGETS)
def test_damaged_inputs_are_refused_or_read(parser: str) -> None:
    """Hypothesis chooses what to overwrite, and which of the mutator's damages to do."""
    target = TARGETS[parser]
    seeds = target.seeds()
    assert [fuzz.judge(target, seed) for seed in seeds] == ["accepted"] * len(seeds)
    verdicts: list[str] = []

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(seeds) - 1), POSITIONS, st.integers(0, 1 << 32), st.booleans())
    def feed(which: int, edits: list[tuple[int, bytes]], seed: int, mutated: bool) -> None:
        content = mutate(seeds[which], seeds, random.Random(seed)) if mutated else edited(seeds[which], edits)
        verdict = fuzz.judge(target, content)
        assert verdict in ("accepted", "refused"), verdict
        verdicts.append(verdict)

    feed()
    assert "refused" in verdicts
    record("hostile input", f"fuzz, {parser}, in the suite", len(verdicts), "refused or read")


def test_the_fuzzer_finds_planted_defects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: an exception, a hang and a crash in a parser are found, kept and repeatable, and the run goes on."""

    def read(content: bytes) -> None:
        if len(content) % 7 == 1:
            raise KeyError("planted")
        if len(content) % 31 == 2:
            import ctypes

            ctypes.string_at(0)
        if len(content) % 31 == 3:
            while True:
                pass
        if content != b"valid input":
            raise UsageError("refused")

    monkeypatch.setitem(TARGETS, "planted", Target(seeds=lambda: (b"valid input",), read=read))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    state = fuzz.fuzz("planted", 60, seed=0, minutes=None, out=tmp_path)
    causes = " ".join(failure["cause"] for failure in state.failures)
    assert state.done == 60
    assert "KeyError" in causes
    assert "SIGSEGV" in causes
    assert "SIGPROF" in causes
    assert state.accepted + state.refused + len(state.failures) == 60
    again = fuzz.example((b"valid input",), "planted", 0, state.failures[0]["number"])
    assert (tmp_path / "planted" / f"{state.failures[0]['number']}.input").read_bytes() == again


def test_a_run_continues_where_it_stopped(tmp_path: Path) -> None:
    """Two halves count as one run, and another seed is refused."""
    halves = [fuzz.fuzz("rules", count, seed=3, minutes=None, out=tmp_path / "a") for count in (30, 60)]
    whole = fuzz.fuzz("rules", 60, seed=3, minutes=None, out=tmp_path / "b")
    assert halves[1] == whole
    assert (whole.done, whole.failures) == (60, [])
    with pytest.raises(UsageError, match="another seed"):
        fuzz.fuzz("rules", 60, seed=4, minutes=None, out=tmp_path / "a")


def test_a_target_that_refuses_valid_input_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise everything would be refused, and prove nothing."""
    target = Target(seeds=lambda: (b"{",), read=TARGETS["json"].read)
    monkeypatch.setitem(TARGETS, "planted", target)
    with pytest.raises(VerificationError, match="valid input is not accepted"):
        fuzz.fuzz("planted", 1, seed=0, minutes=None, out=tmp_path)


def test_the_command_reports_counts(tmp_path: Path) -> None:
    """One line per parser, and the state beside the failures."""
    arguments = ["--parser", "rules", "--examples", "20", "--out", str(tmp_path)]
    result = CliRunner().invoke(fuzz.command, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("rules: 20 examples, ")
    assert json.loads((tmp_path / "rules" / "state.json").read_text())["done"] == 20


def test_every_edit_changes_something() -> None:
    """Each damage of the mutator differs from its input for most seeds."""
    for edit in EDITS:
        changed = 0
        for seed in range(20):
            data = bytearray(range(100))
            edit(data, (b"other content",), random.Random(seed))
            changed += bytes(data) != bytes(range(100))
        assert changed > 10, edit.__name__
