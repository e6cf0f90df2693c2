"""Exports that are killed, starved and interrupted: complete or absent, and the next run ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporters.check_folder import check_folder
from runtime_tests.fault_checks import ROUNDS, hidden, moments, tree
from runtime_tests.fault_exports import Exports
from runtime_tests.fault_hooks import Fault
from runtime_tests.reliability import record

# format -> kills
KILLS = {"gptq": 14, "awq": 8, "compressed-tensors": 8, "gguf": 7, "onnx": 7}
TIMED_KILLS = 6


@pytest.mark.parametrize("name", KILLS)
def test_killed_export_is_complete_or_absent(name: str, exports: Exports, tmp_path: Path) -> None:
    """After SIGKILL before any change, the target is what it was or complete; the next run ends with the same bytes.

    By turns into a new folder and over an old one, and continued with --resume and without.
    """
    whole, count = exports.whole(name), KILLS[name] * ROUNDS
    for number, moment in enumerate(moments(f"export {name}", exports.changes(name), count)):
        out, options = tmp_path / str(number), ["--overwrite"] if number % 2 else []
        before = exports.old(name, out) if number % 2 else {}
        killed = exports.run(name, out, *options, fault=Fault(at=moment))
        assert killed.status == -9, killed.text
        assert tree(out / name) in (before, whole), f"half-written after a kill at change {moment}"
        again = exports.run(name, out, "--overwrite", *(["--resume"] if number % 4 < 2 else []))
        assert again.status == 0, again.text
        assert tree(out / name) == whole
        assert not hidden(out)
        shutil.rmtree(out)
    outcome = "target as it was or complete; the next run's bytes equal an undisturbed one's; nothing left over"
    record(f"export to {name}", "SIGKILL before the n-th change of its folder", count, outcome)


def test_export_killed_at_any_time(exports: Exports, tmp_path: Path) -> None:
    """As above, but at random times, which also fall inside of writes that libraries make in C."""
    generator, kills, names = random.Random("any time"), 0, ("gguf", "onnx", "gptq")
    while kills < TIMED_KILLS * ROUNDS:
        name = names[kills % len(names)]
        whole, began = exports.whole(name), time.monotonic()
        before = exports.old(name, tmp_path)
        assert exports.run(name, tmp_path, "--overwrite").status == 0
        seconds = time.monotonic() - began
        shutil.rmtree(tmp_path / name)
        shutil.copytree(exports.folder / "old" / name, tmp_path / name)
        started = exports.worker.start(exports.argv(name, tmp_path, "--overwrite"), tmp_path)
        time.sleep(generator.random() * seconds)
        killed = exports.worker.kill(started)
        kills += killed.status == -9
        assert tree(tmp_path / name) in (before, whole)
        assert exports.run(name, tmp_path, "--overwrite", "--resume").status == 0
        assert tree(tmp_path / name) == whole
        assert not hidden(tmp_path)
        shutil.rmtree(tmp_path / name)
    outcome = "target as it was or complete; resumed, bytes equal an undisturbed run's; nothing left over"
    record("export to GGUF, ONNX and GPTQ", "SIGKILL at a random time", kills, outcome)


def test_the_comparison_notices_other_bytes(exports: Exports, tmp_path: Path) -> None:
    """The twin: an export of another checkpoint, and one with a flipped bit, are not the undisturbed one."""
    assert exports.old("gptq", tmp_path) != exports.whole("gptq")
    shutil.copytree(exports.folder / "whole" / "gptq", tmp_path / "copy")
    flip(next((tmp_path / "copy").glob("*.safetensors")))
    assert tree(tmp_path / "copy") != exports.whole("gptq")


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("action", "status", "word"), [
    ("interrupt", 130, "SIGINT"), ("terminate", 143, "SIGTERM"), ("hang up", 129, "SIGHUP"),
    ("disk full", 74, "No space left"), ("io error", 74, "Input/output error"),
])  # fmt: skip
def test_failing_export_cleans_up_at_once(
    action: str, status: int, word: str, exports: Exports, tmp_path: Path
) -> None:
    """A signal or failing call at any moment: its exit code, one message, nothing left over, the old folder intact."""
    count = 4 * ROUNDS
    for name in ("gptq", "gguf"):
        # The first only finds that OUT exists. The last come after the new folder has its name, and are not taken back.
        for moment in moments(f"{action} {name}", exports.changes(name) - 12, count, first=2):
            out = tmp_path / f"{name}-{moment}"
            before = exports.old(name, out)
            failed = exports.run(name, out, "--overwrite", fault=Fault(at=moment, action=action))
            assert (failed.status, "Traceback" in failed.text) == (status, False), failed.text
            assert word in failed.text
            assert tree(out / name) == before
            assert not hidden(out)
    record("export", f"{action} before the n-th change of its folder", 2 * count,
           f"exit code {status}, one message, old folder intact, nothing left over")  # fmt: skip


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_real_command(number: signal.Signals, status: int, exports: Exports, tmp_path: Path) -> None:
    """The command in a process of its own, interrupted within a format or between two, leaves nothing half-written."""
    argv = [str(exports.source), "--to", *KILLS, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", "from exporters.cli import main; main()", *argv], stderr=subprocess.PIPE, text=True
    )
    while not hidden(tmp_path / "out"):  # the first of five formats has begun
        assert process.poll() is None, "ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(number)
    text = process.communicate(timeout=120)[1]
    assert (process.returncode, "Traceback" in text, f"interrupted by {number.name}" in text) == (status, False, True)
    assert not hidden(tmp_path / "out")
    assert all(check_folder(folder).passed for folder in (tmp_path / "out").iterdir())
    record("export", f"{number.name} to the real command", 1, f"exit code {status}, one message, nothing left over")


def test_failing_fsync_is_noticed(exports: Exports, tmp_path: Path) -> None:
    """Whichever fsync fails, the export fails: what may not be on the disk is not reported as written."""
    exports.old("gguf", tmp_path)
    calls = exports.run("gguf", tmp_path, "--overwrite", fault=Fault(only="fsync")).changes
    count = 6 * ROUNDS
    for number, moment in enumerate(moments("fsync", calls, count)):
        out = tmp_path / str(number)
        before = exports.old("gguf", out)
        failed = exports.run("gguf", out, "--overwrite", fault=Fault(only="fsync", at=moment, action="io error"))
        assert (failed.status, "Traceback" in failed.text) == (74, False), failed.text
        assert tree(out / "gguf") in (before, exports.whole("gguf"))
        assert not hidden(out)
    record("export", "fsync error, any of those it makes", count, "exit code 74, one message, a whole folder")


def test_vanishing_target_is_one_message(exports: Exports, tmp_path: Path) -> None:
    """A folder that is removed while it is written ends with exit code 74 and no traceback."""
    count = 4 * ROUNDS
    for moment in moments("vanish", exports.changes("gptq") - 12, count):
        failed = exports.run("gptq", tmp_path / str(moment), fault=Fault(at=moment, action="vanish"))
        assert (failed.status, "Traceback" in failed.text) == (74, False), failed.text
        assert "could not be written" in failed.text
    record("export", "output folder removed while it is written", count, "exit code 74, one message")


def test_short_writes_are_completed(exports: Exports, tmp_path: Path) -> None:
    """With every write taking half of its bytes, the files are the same."""
    for name in ("gptq", "gguf"):
        assert exports.run(name, tmp_path, fault=Fault(short=True)).status == 0
        assert tree(tmp_path / name) == exports.whole(name)
    record("export", "every write takes half of its bytes", 2, "bytes equal to an undisturbed run's")


@pytest.mark.parametrize("name", KILLS)
def test_file_size_limit_is_one_message(name: str, exports: Exports, tmp_path: Path) -> None:
    """Where a file may not grow (ulimit -f), the kernel cuts writes short wherever they are made, in C too."""
    before = exports.old(name, tmp_path)
    largest = max((exports.folder / "whole" / name / file).stat().st_size for file in exports.whole(name))
    for limit in (largest // 2, 4000):
        failed = exports.run(name, tmp_path, "--overwrite", fault=Fault(limit=limit))
        assert (failed.status, "Traceback" in failed.text) == (74, False), failed.text
        assert tree(tmp_path / name) == before
        assert not hidden(tmp_path)
    record(f"export to {name}", "file size limit: writes cut short by the kernel", 2,
           "exit code 74, one message, old folder intact, nothing left over")  # fmt: skip


def test_full_disk_is_one_message(exports: Exports, tmp_path: Path) -> None:
    """On a real disk too small for the new folder beside the old one, the old one stays and nothing is left over."""
    mounted = []
    for name in KILLS:
        out = tmp_path / name
        before = {f"{name}/{file}": digest for file, digest in exports.old(name, out).items()}
        used = sum(path.stat().st_size for path in (out / name).iterdir())
        for spare in (20_000, used // 2):
            failed = exports.run(name, out, "--overwrite", fault=Fault(disk=used + 40_000 + spare))
            assert (failed.status, "Traceback" in failed.text) == (74, False), failed.text
            assert failed.left == before
            mounted.append(failed.mounted)
    disk = "tmpfs" if all(mounted) else "file size limit (nothing may be mounted here)"
    record(
        "export", f"disk full: {disk}", len(mounted), "exit code 74, one message, old folder intact, nothing left over"
    )


def test_read_only_target_is_one_message(exports: Exports, tmp_path: Path) -> None:
    """On a disk that is mounted read-only, new and old targets end with exit code 74 and one message."""
    before = {f"gptq/{file}": digest for file, digest in exports.old("gptq", tmp_path).items()}
    for name in ("gptq", "gguf"):
        failed = exports.run(name, tmp_path, "--overwrite", fault=Fault(disk=8_000_000, read_only=True))
        assert (failed.status, "Traceback" in failed.text) == (74, False), failed.text
        assert "Read-only file system" in failed.text
        assert failed.left == before
    record("export", "read-only target", 2, "exit code 74, one message, old folder intact")
