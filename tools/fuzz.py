"""Feed a parser damaged inputs for as long as asked: `python -m tools.fuzz --parser gguf --examples 100000`.

Example number i of a seed is always the same bytes, so that a run can be continued and a failure repeated. Batches run
in forked processes with bounded memory and time: an exception that is no `L4QError`, a signal, a second and more of
processor time is a failure, and its input is kept under build/fuzz/PARSER.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from l4q.cli_common import run
from l4q.errors import L4QError, UsageError, VerificationError
from runtime_tests.reliability import FUZZED, record
from tools.fuzz_mutate import mutate
from tools.fuzz_targets import TARGETS, Target, scratch

OUT = Path("build/fuzz")
BATCH = 2000
MEMORY = 1 << 30
"""Bytes of address space beyond what a batch begins with."""
SECONDS = 10.0
"""Processor time of one example."""
COUNTS = struct.Struct("<QQQQ")
"""In shared memory: examples begun, accepted, refused, failed."""


@dataclass
class State:
    """How far a run has come; PARSER/state.json."""

    parser: str
    seed: int
    done: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


def example(target_seeds: Sequence[bytes], parser: str, seed: int, number: int) -> bytes:
    """Input `number` of a run."""
    rng = random.Random(f"{seed}:{parser}:{number}")  # noqa: S311 - it shall repeat
    return mutate(rng.choice(target_seeds), target_seeds, rng)


def judge(target: Target, content: bytes) -> str:
    """Read one input; the verdict is "accepted", "refused", or what went wrong."""
    try:
        target.read(content)
    except L4QError:
        return "refused"
    except BaseException as error:  # a panic of a Rust extension is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "accepted"


def fuzz(parser: str, examples: int, *, seed: int, minutes: float | None, out: Path) -> State:
    """Continue or begin a run until `examples` are done or the time is over.

    Raises:
        VerificationError: The target refuses one of its own valid inputs.
    """
    target = TARGETS[parser]
    seeds = target.seeds()
    for number, content in enumerate(seeds):
        verdict = judge(target, content)
        if verdict != "accepted":
            raise VerificationError("a valid input is not accepted", where=f"{parser}, seed {number}", got=verdict)
    state = _load(out, parser, seed)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    while state.done < examples and (deadline is None or time.monotonic() < deadline):
        _batch(state, target, seeds, min(BATCH, examples - state.done), out)
        _save(out, state)
    return state


def _batch(state: State, target: Target, seeds: Sequence[bytes], count: int, out: Path) -> None:
    """Run examples in a forked process; one that dies costs one example, and the batch ends there."""
    with mmap.mmap(-1, COUNTS.size) as shared:
        child = os.fork()
        if child == 0:
            _child(state, target, seeds, count, shared, out)
        _, status = os.waitpid(child, 0)
        begun, accepted, refused, _ = COUNTS.unpack(shared[:])
    state.accepted += accepted
    state.refused += refused
    code = os.waitstatus_to_exitcode(status)
    if code:
        number = state.done + begun - 1
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        _keep(out, state.parser, number, example(seeds, state.parser, state.seed, number), cause)
    state.done += begun if code else count
    state.failures = _failures(out, state.parser)


def _child(state: State, target: Target, seeds: Sequence[bytes], count: int, shared: mmap.mmap, out: Path) -> None:
    faulthandler.disable()  # the parent tells of a crash
    size = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    counts = {"accepted": 0, "refused": 0, "failed": 0}
    try:
        for index in range(count):
            shared[:] = COUNTS.pack(index + 1, *counts.values())
            number = state.done + index
            content = example(seeds, state.parser, state.seed, number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # unanswered, it ends the process
            verdict = judge(target, content)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if verdict not in counts:
                _keep(out, state.parser, number, content, verdict)
                verdict = "failed"
            counts[verdict] += 1
        shared[:] = COUNTS.pack(count, *counts.values())
        os._exit(0)
    finally:
        os._exit(70)


def _keep(out: Path, parser: str, number: int, content: bytes, cause: str) -> None:
    folder = out / parser
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.input").write_bytes(content)
    (folder / f"{number}.json").write_text(json.dumps({"number": number, "cause": cause}))


def _failures(out: Path, parser: str) -> list[dict[str, Any]]:
    files = (out / parser).glob("[0-9]*.json") if (out / parser).is_dir() else ()
    return sorted((json.loads(file.read_text()) for file in files), key=lambda failure: int(failure["number"]))


def _load(out: Path, parser: str, seed: int) -> State:
    path = out / parser / "state.json"
    if path.is_file():
        state = State(**json.loads(path.read_text()))
        if state.seed != seed:
            raise UsageError(
                "the folder holds a run of another seed",
                where=path,
                got=state.seed,
                expected=seed,
                remedy="choose another --out",
            )
        return state
    (out / parser).mkdir(parents=True, exist_ok=True)
    return State(parser=parser, seed=seed)


def _save(out: Path, state: State) -> None:
    path = out / state.parser / "state.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(state), indent=1))
    part.replace(path)


def _address_space() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize:"))


@click.command(name="fuzz")
@click.option("--parser", "parsers", type=click.Choice(list(TARGETS)), multiple=True, help="[default: all]")
@click.option("--examples", type=click.IntRange(1), default=100_000, show_default=True, help="In all, per parser.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every example.")
@click.option("--minutes", type=float, help="Stop after this time, per parser; the same command continues.")
@click.option("--record", "recorded", is_flag=True, help="Put finished runs into docs/results/fuzz.json.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Where failures are kept.")
def command(
    parsers: tuple[str, ...], examples: int, seed: int, minutes: float | None, recorded: bool, out: Path
) -> None:
    """Damage valid inputs of each PARSER and watch that l4q refuses them or reads them, and nothing else."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: threads do not survive a fork
    failed = 0
    try:
        for parser in parsers or TARGETS:
            began = time.monotonic()
            state = fuzz(parser, examples, seed=seed, minutes=minutes, out=out)
            failed += len(state.failures)
            click.echo(
                f"{parser}: {state.done:,} examples, {state.accepted:,} accepted, {state.refused:,} refused, "
                f"{len(state.failures)} failures, {time.monotonic() - began:.0f} s"
            )
            sys.stdout.flush()
            if recorded and state.done >= examples and not state.failures:
                outcome = f"{state.refused:,} refused, {state.accepted:,} read, nothing else"
                record("hostile input", f"fuzz, {parser}, recorded run", state.done, outcome, report=FUZZED)
    finally:
        shutil.rmtree(scratch(), ignore_errors=True)
    if failed:
        raise VerificationError("inputs ended in something other than an L4QError", where=out, got=f"{failed} inputs")


if __name__ == "__main__":
    run(command)
