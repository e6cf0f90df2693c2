"""Fetching and storing assets: only pinned bytes are used, and folders are complete or absent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.assets_sources import COMMANDS, PACKAGES, FetchError, Package, fetch_package
from tools.assets_store import MANIFEST, problem_with, staged, write_manifest


def forged(text: str, status: int = 0) -> Callable[[Package, Path], list[str]]:
    """Return a package client that delivers this text as the archive and exits with this status."""
    code = f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({text!r}); print({text!r}); sys.exit({status})"
    return lambda package, folder: [sys.executable, "-c", code, str(folder / package.filename)]


@pytest.mark.parametrize(("status", "message"), [(0, "not the pinned one"), (3, "could not fetch glassllm 0.1.0")])
def test_fetch_refuses_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str) -> None:
    """A client that delivers other bytes or fails is an error, and nothing of it stays in the cache."""
    monkeypatch.setitem(COMMANDS, "pip-wheel", forged("forged", status))
    with pytest.raises(FetchError, match=message):
        fetch_package("glassllm", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_ignores_a_damaged_cached_archive(
    glassllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached archive is used as it is only while its bytes are the pinned ones."""
    monkeypatch.setitem(COMMANDS, "pip-wheel", forged("forged"))
    good = glassllm_dir.parent / ".downloads" / PACKAGES["glassllm"].filename
    cached = tmp_path / good.name
    cached.write_bytes(good.read_bytes())
    assert fetch_package("glassllm", tmp_path) == cached
    data = bytearray(good.read_bytes())
    data[1000] ^= 1
    cached.write_bytes(data)
    with pytest.raises(FetchError, match="not the pinned one"):
        fetch_package("glassllm", tmp_path)


def test_fetch_into_a_relative_cache(glassllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive a client delivers lands in the cache also when that is named from the working directory."""
    good = (glassllm_dir.parent / ".downloads" / PACKAGES["glassllm"].filename).resolve()
    code = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    monkeypatch.setitem(COMMANDS, "pip-wheel", lambda _, folder: [sys.executable, "-c", code, str(good), str(folder)])
    monkeypatch.chdir(tmp_path)
    arrived: list[int] = []
    found = fetch_package("glassllm", Path("cache"), arrived.append)
    assert found.read_bytes() == good.read_bytes()
    assert arrived[-1] == PACKAGES["glassllm"].size


def test_manifest_notices_changes(tmp_path: Path) -> None:
    """A shorter file, a flipped bit, another recipe and a missing manifest each make the folder incomplete."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123")
    write_manifest(tmp_path, 1, ("glassllm",))
    assert problem_with(tmp_path, 1, ("glassllm",), rehash=True) is None
    assert "recipe" in str(problem_with(tmp_path, 2, ("glassllm",)))
    assert "packages" in str(problem_with(tmp_path, 1, ("llamafactory",)))
    file.write_bytes(b"0122")
    assert "sha256" in str(problem_with(tmp_path, 1, ("glassllm",), rehash=True))
    file.write_bytes(b"012")
    assert "size" in str(problem_with(tmp_path, 1, ("glassllm",)))
    (tmp_path / MANIFEST).unlink()
    assert problem_with(tmp_path, 1, ("glassllm",)) == "not there"


def build_then_fail(target: Path) -> None:
    """Write half of a new folder and stop with an error."""
    with staged(target) as folder:
        (folder / "half").write_text("new")
        raise RuntimeError("interrupted")


def test_staged_folder_is_all_or_nothing(tmp_path: Path) -> None:
    """A failed build leaves the old folder and no scratch; a finished one replaces it."""
    target = tmp_path / "asset"
    with staged(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(RuntimeError, match="interrupted"):
        build_then_fail(target)
    assert [path.name for path in target.iterdir()] == ["old"]
    with staged(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]
