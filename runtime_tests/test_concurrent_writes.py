"""Two writers of one folder, a reader of a folder that is replaced, and what is left of processes that are gone."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from exporters.driver import export
from l4q import durable, files
from l4q.checkpoint import L4QCheckpoint
from l4q.durable import exchange, output_errors, write_atomic
from l4q.errors import BusyError, OutputError, UsageError
from l4q.files import clean_leftovers, retired_path, stage_path, staged_folder
from l4q.journal import JOURNAL_NAME, Journal
from l4q.locks import exclusive, lock_path
from runtime_tests.fault_checks import hidden, tree
from runtime_tests.fault_exports import Exports
from runtime_tests.fault_hooks import Fault
from runtime_tests.fault_worker import wait_until_stopped
from runtime_tests.reliability import record


def test_second_export_is_refused_or_waits(exports: Exports, tmp_path: Path) -> None:
    """While one export writes, another into the same folder is refused with its process id, or waits with --wait."""
    first = exports.worker.start(exports.argv("gptq", tmp_path), tmp_path, Fault(at=15, action="stop"))
    wait_until_stopped(first[0])
    refused = exports.run("gptq", tmp_path, "--overwrite")
    assert refused.status == 75, refused.text
    assert f"process {first[0]} on {os.uname().nodename} (l4q-export)" in refused.text
    argv = exports.argv("gptq", tmp_path, "--overwrite", "--wait", source=exports.other)
    waiting = exports.worker.start(argv, tmp_path)
    exports.worker.go_on(first)
    assert exports.worker.wait(first).status == 0
    assert exports.worker.wait(waiting).status == 0
    assert tree(tmp_path / "gptq") == exports.old("gptq", tmp_path / "expected")
    assert not hidden(tmp_path)
    record("export", "second export into the same folder", 2, "refused with exit code 75, or waits; both folders whole")


def test_simultaneous_exports_leave_one_whole_folder(exports: Exports, tmp_path: Path) -> None:
    """Of three exports started at once, those that do not win are refused, and the folder is whole."""
    whole = exports.whole("gguf")
    for number in range(3):
        out = tmp_path / str(number)
        started = [exports.worker.start(exports.argv("gguf", out), out) for _ in range(3)]
        codes = sorted(exports.worker.wait(one).status for one in started)
        assert codes[0] == 0
        assert set(codes[1:]) <= {2, 75}  # already there, or being written
        assert tree(out / "gguf") == whole
        assert not hidden(out)
    record("export", "three exports into one folder at once", 3, "one wins, the others end with exit code 2 or 75")


def test_checkpoint_replaced_during_export(exports: Exports, tmp_path: Path) -> None:
    """An export whose checkpoint is replaced by a training that ends meanwhile is given up, never mixed."""
    source, other = tmp_path / "checkpoint", tmp_path / "newer"
    shutil.copytree(exports.source, source)
    shutil.copytree(exports.other, other)
    out = tmp_path / "out"
    argv = exports.argv("awq", out, source=source)
    started = exports.worker.start(argv, out, Fault(at=15, action="stop"))
    wait_until_stopped(started[0])
    assert exchange(source, other)
    exports.worker.go_on(started)
    ended = exports.worker.wait(started)
    assert ended.status == 2, ended.text
    assert "was replaced while it was being exported" in ended.text
    assert not (out / "awq").exists()
    assert not hidden(out)
    record("export", "checkpoint replaced while it is exported", 1, "given up with exit code 2, nothing left over")


def test_finished_shards_are_kept_and_damaged_ones_are_not(exports: Exports, tmp_path: Path) -> None:
    """--resume redoes nothing that is whole, everything that is not, and begins anew for another plan."""
    whole = exports.whole("gptq")
    killed = exports.run("gptq", tmp_path, fault=Fault(at=exports.changes("gptq") - 16))
    assert killed.status == -9, killed.text
    stage = stage_path(tmp_path / "gptq")
    entries = [json.loads(line) for line in (stage / JOURNAL_NAME).read_text().splitlines()]
    shards = [entry["name"] for entry in entries if entry.get("name", "").endswith(".safetensors")]
    assert len(shards) > 3
    flipped = bytearray((stage / shards[0]).read_bytes())
    flipped[-1] ^= 1
    (stage / shards[0]).write_bytes(flipped)
    (stage / shards[1]).write_bytes((stage / shards[1]).read_bytes()[:-1])
    copies = {name: shutil.copytree(stage, tmp_path / name / ".gptq.staged") for name in ("other", "plain")}
    times = {name: (stage / name).stat().st_mtime_ns for name in shards}
    assert exports.run("gptq", tmp_path, "--resume").status == 0
    assert tree(tmp_path / "gptq") == whole
    kept = [name for name in shards if (tmp_path / "gptq" / name).stat().st_mtime_ns == times[name]]
    assert kept == shards[2:]
    changed = exports.run("gptq", copies["other"].parent, "--resume", "--gptq-format", "gptq_v2")
    assert changed.status == 0, changed.text
    assert not {(copies["other"].parent / "gptq" / name).stat().st_mtime_ns for name in shards} & set(times.values())
    assert exports.run("gptq", copies["plain"].parent).status == 0
    assert tree(copies["plain"].parent / "gptq") == whole


def test_damaged_source_is_not_exported(exports: Exports, tmp_path: Path) -> None:
    """A bit that changed in the weights since the checkpoint was written stops the export; a changed config is told."""
    source = Path(shutil.copytree(exports.source, tmp_path / "checkpoint"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "remark": "changed by hand"}))
    assert export(L4QCheckpoint.open(source), "gptq", tmp_path / "told").verified is not None
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match=r"(?s)not as they were written.*changed: model.safetensors"):
        export(L4QCheckpoint.open(source), "gptq", tmp_path / "refused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "told"]


def fill(folder: Path, word: str) -> None:
    """Put one file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(word)


def test_replacing_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders cannot change names in one step, a kill between the two steps is made good by the next writer.

    The system call is really refused here: with a flag that no kernel knows.
    """
    monkeypatch.setattr(durable, "_RENAME_EXCHANGE", 1 << 30)
    target = tmp_path / "target"
    fill(target, "old")
    with staged_folder(target, overwrite=True) as stage:
        fill(stage, "new")
    assert (target / "file").read_text() == "new"
    os.rename(target, retired_path(target))  # as a kill after the first of the two renames leaves it
    fill(stage_path(target), "newer")
    with pytest.raises(UsageError, match="already exists"), staged_folder(target):
        pass
    assert (target / "file").read_text() == "new"
    fill(retired_path(target), "old")  # as a kill after the second leaves it
    fill(stage_path(target), "junk")
    fill(stage_path(tmp_path / "elsewhere"), "junk")
    with exclusive(tmp_path / "elsewhere"):  # someone is writing that one
        clean_leftovers(tmp_path)
        assert hidden(tmp_path) == [".elsewhere.lock", ".elsewhere.staged"]
    clean_leftovers(tmp_path)
    assert hidden(tmp_path) == []
    assert (target / "file").read_text() == "new"


def test_interrupted_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in that moment brings the old folder back at once."""
    target, rename = tmp_path / "target", os.rename
    fill(target, "old")

    def interrupted(source: Path, other: Path) -> None:
        if Path(source) == stage_path(target):
            raise KeyboardInterrupt
        rename(source, other)

    monkeypatch.setattr(durable, "_RENAME_EXCHANGE", 1 << 30)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(target, overwrite=True) as stage:
        fill(stage, "new")
    assert (target / "file").read_text() == "old"
    assert hidden(tmp_path) == []


def test_symlinked_target_is_replaced_where_it_lies(tmp_path: Path) -> None:
    """The folder behind a link is replaced, on its own file system, and the link stays."""
    fill(tmp_path / "real" / "folder", "old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "folder")
    with staged_folder(link, overwrite=True) as stage:
        assert stage.parent == tmp_path / "real"
        fill(stage, "new")
    assert link.is_symlink()
    assert (link / "file").read_text() == "new"


def test_mount_points_are_refused() -> None:
    """A folder that cannot be renamed is refused before any work."""
    with pytest.raises(UsageError, match=r"(?s)mount point.*inside it"):
        files.refuse_existing(Path("/proc"), overwrite=True)


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where locks are not supported, writing goes on with a warning; any other failure of a lock is an error."""

    def refusing(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)

    refusing(errno.ENOLCK)
    with caplog.at_level(logging.WARNING), staged_folder(tmp_path / "target") as stage:
        fill(stage, "new")
    assert "no file locks here" in caplog.text
    write_atomic(tmp_path / "plain", "text")
    assert (tmp_path / "plain").read_text() == "text"
    refusing(errno.EIO)
    with pytest.raises(OutputError, match="Input/output error"), staged_folder(tmp_path / "other"):
        pass


def test_unnamed_holder_and_stale_lock(tmp_path: Path) -> None:
    """A lock file that nobody holds is taken over, whatever it says; a holder without a name is reported as such."""
    target = tmp_path / "target"
    lock_path(target).write_text("process 1 on another machine")
    with exclusive(target):
        lock_path(target).write_text("")
        with pytest.raises(BusyError, match="has not given its name"), exclusive(target):
            pass
    assert not lock_path(target).exists()


def test_atomic_file_survives_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync that fails leaves the old content and no part; errors about other files pass unchanged."""
    path = tmp_path / "report.json"
    write_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="disk reports an error"):
            write_atomic(path, "new")
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), output_errors(path):
        (tmp_path / "source").read_text()
    record("reports and manifests", "fsync error while a file is replaced", 1, "old content kept, exit code 74")


def test_torn_journal_is_not_believed(tmp_path: Path) -> None:
    """Entries after a torn line, files nobody recorded and a journal of other work count for nothing."""

    def reopened(work: str) -> Journal:
        journal = Journal.open(tmp_path, lambda: {"work": work})
        journal.table()
        journal.stop()
        return journal

    for name in ("a", "b", "stray"):
        (tmp_path / name).write_text(name)
    path = tmp_path / JOURNAL_NAME
    first = reopened("one")
    assert not any(first.finished(name) for name in ("a", "b"))
    assert tree(tmp_path).keys() == {JOURNAL_NAME}
    writing = Journal.open(tmp_path, lambda: {"work": "one"})
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        writing.add(tmp_path / name)
    writing.table()
    writing.stop()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[2][:-5]]))
    (tmp_path / ".b.making" / "deeper").mkdir(parents=True)
    torn = reopened("one")
    assert (torn.finished("a"), torn.finished("b")) == (True, False)
    assert tree(tmp_path).keys() == {"a", JOURNAL_NAME}
    assert not reopened("two").finished("a")
