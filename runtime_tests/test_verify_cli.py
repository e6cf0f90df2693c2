"""`l4q-verify`: every way a folder can differ from what was written is named, and only a folder as written passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporters.card import update_parity
from exporters.cli import command as export_command
from exporters.cli_verify import command
from exporters.driver import export
from exporters.manifest import MANIFEST_NAME, read_manifest
from l4q.checkpoint import L4QCheckpoint
from l4q.checkpoint_files import CHECKPOINT_MANIFEST, source_digest
from l4q.cli_common import ByteSize
from l4q.config import QuantConfig
from l4q.errors import UsageError, VerificationError
from l4q.file_table import read_table
from runtime_tests.tiny_llama import tiny_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint "l4q" and its exports "gptq" and "gguf"; tests only read it."""
    base = tmp_path_factory.mktemp("folders")
    checkpoint = tiny_checkpoint(base, QuantConfig(group_size=64))
    for name in ("gptq", "gguf"):
        export(checkpoint, name, base / name)
    return base


def verify(folder: Path, *options: str) -> dict[str, Any]:
    """What the command prints as JSON, with its exit code."""
    result = CliRunner().invoke(command, [str(folder), "--json", *options])
    if result.exception is not None and not isinstance(result.exception, VerificationError):
        raise result.exception
    code = result.exception.exit_code if result.exception else 0
    return {**json.loads(result.stdout), "code": code}


@pytest.mark.parametrize("name", ["gptq", "gguf", "l4q"])
def test_what_was_written_passes(name: str, folders: Path) -> None:
    """Exports and checkpoints pass as they are; exports also against their source, every module decoded."""
    found = verify(folders / name)
    assert (found["passed"], found["code"], found["files"] > 1) == (True, 0, True)
    if name != "l4q":
        found = verify(folders / name, "--source", str(folders / "l4q"))
        assert (found["passed"], found["same_source"], found["weights"]["exact"]) == (True, True, 14)


def truncate(folder: Path) -> None:
    """Cut the last byte off the weights."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def flip(folder: Path) -> None:
    """Change the last bit of the weights."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def flip_code(folder: Path) -> None:
    """Change the lowest bit of one quantized weight of a GPTQ folder."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])["model.layers.1.mlp.up_proj.qweight"]
    content[8 + size + entry["data_offsets"][0]] ^= 1
    (folder / WEIGHTS).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
    "truncated": truncate,
    "changed": flip,
    "extra": lambda folder: (folder / "modeling.py").write_text("import os"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["gptq", "l4q"])
def test_each_difference_is_named(name: str, kind: str, folders: Path, tmp_path: Path) -> None:
    """A missing, truncated, changed or extra file gives exit code 4 and stands in its own list; hidden ones are not."""
    folder = tmp_path / name
    shutil.copytree(folders / name, folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("of another tool")
    assert verify(folder)["passed"]
    DAMAGES[kind](folder)
    found = verify(folder)
    assert (found["passed"], found["code"]) == (False, 4)
    assert {key: bool(found[key]) for key in DAMAGES} == {key: key == kind for key in DAMAGES}
    text = CliRunner().invoke(command, [str(folder)]).stdout
    assert f"{kind}: {found[kind][0]}" in text
    assert "NOT as written" in text


def test_weights_are_compared_with_the_source(folders: Path, tmp_path: Path) -> None:
    """A flipped weight is found by decoding too; another source is noticed; what is cut short is not decoded."""
    folder, source = tmp_path / "gptq", ["--source", str(folders / "l4q")]
    shutil.copytree(folders / "gptq", folder)
    flip_code(folder)
    assert verify(folder, *source)["weights"]["exact"] == 13
    other = tiny_checkpoint(tmp_path / "other", QuantConfig(group_size=64, zero_point="integer"))
    found = verify(folders / "gptq", "--source", str(other.path))
    assert (found["same_source"], found["passed"], found["code"]) == (False, False, 4)
    truncate(folder)
    found = verify(folder, *source)
    assert (found["weights"], "not compared" in found["remark"]) == (None, True)
    sampled = verify(folders / "gptq", *source, "--verify", "sample")
    assert sampled["weights"]["checked"] <= sampled["weights"]["total"]
    assert verify(folders / "gptq", *source, "--verify", "none")["weights"] is None


def test_manifest_says_what_decided_the_bytes(folders: Path) -> None:
    """Source hash, plan hash and the packages that write the format; the source's hash needs no manifest of its own."""
    gguf, gptq = read_manifest(folders / "gguf"), read_manifest(folders / "gptq")
    assert gguf is not None
    assert gptq is not None
    assert (list(gguf["packages"]), list(gptq["packages"])) == (["gguf"], [])
    assert gguf["source"] == gptq["source"] == {"sha256": source_digest(folders / "l4q")}
    assert gguf["plan"] != gptq["plan"]


def test_old_checkpoints_are_as_good(folders: Path, tmp_path: Path) -> None:
    """Without its manifest a checkpoint exports to the same bytes, but cannot be verified; a damaged one is refused."""
    old = tmp_path / "l4q"
    shutil.copytree(folders / "l4q", old)
    (old / CHECKPOINT_MANIFEST).unlink()
    assert source_digest(old) == source_digest(folders / "l4q") == source_digest(folders / "l4q", check=False)
    folder = export(L4QCheckpoint.open(old), "gptq", tmp_path / "gptq").folder
    assert (folder / MANIFEST_NAME).read_bytes() == (folders / "gptq" / MANIFEST_NAME).read_bytes()
    with pytest.raises(UsageError, match=r"(?s)no manifest.*export again"):
        verify(old)
    (old / CHECKPOINT_MANIFEST).write_text("[")
    with pytest.raises(UsageError, match="manifest cannot be read"):
        verify(old)
    (old / CHECKPOINT_MANIFEST).write_text('{"files": {"config.json": {"size": "1"}}}')
    with pytest.raises(UsageError, match="lists no files"):
        verify(old)
    with pytest.raises(UsageError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--source is for exports"):
        verify(folders / "l4q", "--source", str(old))


def test_rounded_exports_are_not_compared(tmp_path: Path) -> None:
    """An export that was allowed to round has its files checked, and says why its weights are not."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=64, zero_point="integer"))
    arguments = [str(checkpoint.path), "--to", "gguf", "--gguf-type", "Q4_1", "--allow-rounding", "--json"]
    result = CliRunner().invoke(export_command, [*arguments, "--out", str(tmp_path / "out")])
    if result.exception is not None:
        raise result.exception
    found = verify(tmp_path / "out" / "gguf", "--source", str(checkpoint.path))
    assert (found["passed"], found["same_source"], "allowed to round" in found["remark"]) == (True, True, True)


def test_measured_parity_is_part_of_the_folder(folders: Path, tmp_path: Path) -> None:
    """The card that l4q-parity fills in is recorded anew; one that was edited by hand is reported."""
    folder = tmp_path / "gptq"
    shutil.copytree(folders / "gptq", folder)
    assert update_parity(folder, "| measured |")
    assert verify(folder)["passed"]
    (folder / "README.md").write_text("by hand")
    assert verify(folder)["truncated"] == ["README.md"]


@pytest.mark.parametrize("facts", [1, {"sha256": 1, "size": 1}, {"sha256": "", "size": True}])
def test_tables_of_wrong_types_are_none(facts: object) -> None:
    """A "files" entry counts only with a hash and a size per name."""
    assert read_table({"a": facts}) is read_table([facts]) is None


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("7B", 7), ("60KB", 60_000), ("2 GiB", 1 << 31), ("1tb", 10**12)])
def test_sizes(text: str, size: int) -> None:
    """Sizes are decimal with KB, binary with KiB, and whole bytes without a unit."""
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["0", "-1", "1.5GB", "GB", "1PB"])
def test_other_sizes_are_refused(text: str, folders: Path, tmp_path: Path) -> None:
    """What is not a size is refused before anything is written."""
    arguments = [str(folders / "l4q"), "--to", "gptq", "--out", str(tmp_path / "out"), "--max-shard-size", text]
    result = CliRunner().invoke(export_command, arguments)
    assert (result.exit_code, "is not a size" in result.output) == (2, True)
    assert not (tmp_path / "out").exists()
