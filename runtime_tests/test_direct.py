"""Files written past the page cache hold the same bytes, wherever pieces begin and end, whatever the system takes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import l4q.direct
from exporters.driver import EXPORTERS, export
from exporters.manifest import MANIFEST_NAME
from l4q.direct import BLOCK, DirectFile, append, read_blocks
from l4q.file_table import check_files, file_facts
from l4q.journal import Journal
from l4q.shard_layout import plan_unit
from l4q.shard_writer import PlannedWriter
from runtime_tests.fault_exports import Exports

MIB = 1 << 20
PIECES = (0, 17, BLOCK, 3 * MIB + 5, 128 << 10, 2 * BLOCK - 1, MIB, 300_001)
"""Bytes of pieces that begin and end inside blocks, fill some, or none."""


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as large."""
    monkeypatch.setattr(l4q.direct, "LEAST_BYTES", 0)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that went past the page cache, by call."""
    sizes: list[int] = []
    pwrite, opened = os.pwrite, os.open
    past: set[int] = set()

    def spy_open(path: Any, mode: int, *rest: Any, **named: Any) -> int:
        descriptor = opened(path, mode, *rest, **named)
        (past.add if mode & os.O_DIRECT else past.discard)(descriptor)
        return descriptor

    def spy_write(file: int, data: Any, position: int) -> int:
        count = pwrite(file, data, position)
        if file in past:
            sizes.append(count)
        return count

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "pwrite", spy_write)
    return sizes


def pieces() -> list[tuple[int, np.ndarray]]:
    """(position, bytes) of consecutive pieces of random bytes."""
    generator, found, end = np.random.default_rng(0), [], 0
    for size in PIECES:
        found.append((end, generator.integers(0, 256, size, dtype=np.uint8)))
        end += size
    return found


def written(path: Path, parts: list[tuple[int, np.ndarray]], nbytes: int) -> bytes:
    """The file after writing the pieces in this order."""
    path.touch()
    with DirectFile(path, nbytes) as file:
        for position, data in parts:
            file.write(data, position)
            assert path.read_bytes()[position : position + data.nbytes] == data.tobytes()
    return path.read_bytes()


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("reverse", [False, True])
def test_any_pieces_in_any_order(tmp_path: Path, flags: list[int], reverse: bool) -> None:
    """What is read back, also in between, is what was written; the large pieces did go past the page cache."""
    parts = pieces()
    expected = b"".join(data.tobytes() for _, data in parts)
    found = written(tmp_path / "file", parts[::-1] if reverse else parts, len(expected))
    assert found == expected
    assert sum(flags) > 0.9 * len(expected)
    assert all(size % BLOCK == 0 for size in flags)


def test_small_files_stay_in_the_page_cache(tmp_path: Path, flags: list[int]) -> None:
    """Below the limit nothing is written directly."""
    parts = pieces()
    assert written(tmp_path / "file", parts, 5 * MIB) == b"".join(data.tobytes() for _, data in parts)
    assert flags == []


def _refuse_open(real: Callable[..., int]) -> Callable[..., int]:
    def refuse(path: Any, mode: int, *rest: Any, **named: Any) -> int:
        if mode & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such thing here")
        return real(path, mode, *rest, **named)

    return refuse


def _refuse_third(real: Callable[..., int]) -> Callable[..., int]:
    calls = iter(range(1000))

    def refuse(file: int, data: Any, position: int) -> int:
        if len(data) >= BLOCK and next(calls) == 2:
            raise OSError(errno.EINVAL, "not any more")
        return real(file, data, position)

    return refuse


def _take_little(real: Callable[..., int]) -> Callable[..., int]:
    return lambda file, data, position: real(file, data[: max(1, len(data) // 2 + 1)], position)


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize(
    ("name", "fault"), [("open", _refuse_open), ("pwrite", _refuse_third), ("pwrite", _take_little)]
)
def test_systems_that_refuse_or_take_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[Any], Any]
) -> None:
    """Files go the usual way then, and hold the same bytes."""
    parts = pieces()
    monkeypatch.setattr(os, name, fault(getattr(os, name)))
    assert written(tmp_path / "file", parts, 5 * MIB) == b"".join(data.tobytes() for _, data in parts)


@pytest.mark.usefixtures("direct")
def test_files_are_hashed_as_they_lie_there(tmp_path: Path, flags: list[int]) -> None:
    """What went past the page cache and what went through it, in one file, read past it again."""
    tensors = {f"t{number}": torch.from_numpy(data) for number, (_, data) in enumerate(pieces()) if data.nbytes}
    planned = {name: plan_unit({name: ("U8", (len(data),))}, {}) for name, data in tensors.items()}
    with PlannedWriter(tmp_path, planned.values(), 4 * MIB) as writer:
        for name, data in tensors.items():
            writer.add({name: data}, {})
        table = writer.close()
    assert table == {name: file_facts(tmp_path / name) for name in table}
    assert len(table) > 1
    assert flags
    read = {name: value for file in table for name, value in load_file(tmp_path / file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], data) for name, data in tensors.items())


@pytest.mark.parametrize("nbytes", [0, 17, BLOCK, MIB, 3 * MIB + 5])
@pytest.mark.parametrize("least", [0, 64 * MIB])
def test_a_file_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, least: int) -> None:
    """Past the page cache and through it, and where the system refuses the former at once or later."""
    monkeypatch.setattr(l4q.direct, "LEAST_BYTES", least)
    content = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)

    def read() -> bytes:
        return b"".join(block.tobytes() for block in read_blocks(tmp_path / "file"))

    assert read() == content
    real, calls = os.preadv, iter(range(1000))

    def refuse(file: int, buffers: Any, position: int) -> int:
        if next(calls) == 1:
            raise OSError(errno.EINVAL, "not any more")
        return real(file, buffers, position)

    monkeypatch.setattr(os, "preadv", refuse)
    assert read() == content
    monkeypatch.setattr(os, "open", _refuse_open(os.open))
    assert read() == content


@pytest.mark.usefixtures("direct")
def test_other_errors_come_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no reason to try again; no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))

    def full(file: int, data: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", pieces(), 5 * MIB)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("direct")
def test_a_library_goes_on_behind_the_piece(tmp_path: Path) -> None:
    """What others write to their open file before and after a piece stands before and after it."""
    path, data = tmp_path / "file", np.full(MIB + 3, 7, dtype=np.uint8)
    with path.open("wb") as file:
        file.write(b"before")
        with DirectFile(path, MIB) as target:
            assert append(file, data, target) == 6 + data.nbytes
        file.write(b"after")
    assert path.read_bytes() == b"before" + data.tobytes() + b"after"


@pytest.mark.usefixtures("direct")
def test_the_hash_reads_back_what_is_told(tmp_path: Path) -> None:
    """Pieces that are not handed over are read from the file, however near to what is not written yet."""
    path, parts = tmp_path / "file", pieces()
    journal = Journal.open(tmp_path, lambda: {"work": "one"})
    path.touch()
    advance = journal.follow(path, path.name)
    with DirectFile(path, 5 * MIB) as file:
        for position, data in parts:
            file.write(data, position)
            advance(position + data.nbytes)
    journal.add(path)
    facts = journal.table()["file"]
    journal.stop()
    content = path.read_bytes()
    assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert facts["sha256"] != hashlib.sha256(content[:-1] + bytes([content[-1] ^ 1])).hexdigest()


@pytest.mark.parametrize("name", list(EXPORTERS))
def test_exports_are_the_same_files(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[int], name: str
) -> None:
    """Every format's folder is the same both ways, its large file was written directly, and the readers accept it."""
    monkeypatch.setattr(l4q.direct, "_LEAST_PIECE", 1)
    usual = export(exports.source, name, tmp_path / "usual", check="none").folder
    assert flags == []
    monkeypatch.setattr(l4q.direct, "LEAST_BYTES", 0)
    direct = export(exports.source, name, tmp_path / "direct", check="none").folder
    assert len(flags) > 3
    files = {path.name: path.read_bytes() for path in usual.iterdir() if path.is_file()}
    found = {path.name: path.read_bytes() for path in direct.iterdir() if path.is_file()}
    assert found.keys() == files.keys()
    assert all(found[file] == files[file] for file in files if file != MANIFEST_NAME)
    assert check_files(direct, json.loads(found[MANIFEST_NAME])["files"], skip=(MANIFEST_NAME,)).passed
