"""Files that are hashed while they are written: the hash is that of the whole, in whatever order a shard is filled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from exporters.driver import export
from exporters.manifest import MANIFEST_NAME
from l4q import durable, prefix_hash
from l4q.durable import sync_file, sync_tree
from l4q.file_table import check_files
from l4q.journal import JOURNAL_FILES, Journal
from runtime_tests.fault_exports import Exports


def test_a_followed_file_has_the_hash_of_all_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the hashing of a growing file falls behind, the journal says of it what hashlib says of the whole."""
    monkeypatch.setattr(prefix_hash, "_STEP_BYTES", 100)
    monkeypatch.setattr(prefix_hash, "_BLOCK_BYTES", 64)
    journal = Journal.open(tmp_path, lambda: {"work": "one"})
    part, final = tmp_path / ".data.part", tmp_path / "data"
    with part.open("wb", buffering=0) as file:
        advance = journal.follow(part, final.name)
        for number in range(50):
            file.write(bytes([number]) * 37)
            advance(file.tell())
        file.write(b"the last, of which nobody was told")
    part.rename(final)
    journal.add(final)
    facts = journal.table()["data"]
    journal.stop()
    content = final.read_bytes()
    assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert facts["sha256"] != hashlib.sha256(content[:-1] + b"!").hexdigest()


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx"])
def test_followed_exports_record_what_is_on_the_disk(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Hashed piece after piece while they are written, the files of a format are those its manifest lists."""
    monkeypatch.setattr(prefix_hash, "_STEP_BYTES", 1)
    folder = export(exports.source, name, tmp_path / name, check="none").folder
    table = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert check_files(folder, table, skip=(MANIFEST_NAME,)).passed
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert check_files(folder, table, skip=(MANIFEST_NAME,)).changed == (largest.name,)


def test_a_journal_that_is_replaced_meanwhile_stops_no_export(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's thread renames its file whenever it likes: nobody else opens it; the twin, who does, stumbles."""
    opened = []

    def sync(path: Path) -> None:
        opened.append(path.name)
        sync_file(path)

    monkeypatch.setattr(durable, "sync_file", sync)
    export(exports.source, "gguf", tmp_path / "gguf", check="none")
    assert "README.md" in opened or any(name.endswith(".gguf") for name in opened)
    assert not set(opened) & set(JOURNAL_FILES)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / JOURNAL_FILES[1]).symlink_to("gone")
    sync_tree(tmp_path / "tree", leave=JOURNAL_FILES)
    with pytest.raises(FileNotFoundError):
        sync_tree(tmp_path / "tree")
