"""Asset folders on disk: built in a staged folder, renamed when complete, described by a manifest."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.assets_sources import PACKAGES, sha256_of

MANIFEST = ".manifest.json"


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the lock of an assets folder, so that two runs at once do the work only once."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place if the block succeeds, else vanishes."""
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".stage-{target.name}-"))
    try:
        yield stage
        stage.chmod(0o755)
        for path in stage.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600
        if target.exists():
            old = stage.with_name(f"{stage.name}-old")
            target.rename(old)
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def describe(folder: Path, recipe: int, packages: tuple[str, ...]) -> dict[str, Any]:
    """Return the manifest of a finished folder: recipe number, source sums, and size and SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        "recipe": recipe,
        "sources": _sources(packages),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        },
    }


def write_manifest(folder: Path, recipe: int, packages: tuple[str, ...]) -> None:
    """Write the manifest of a staged folder into it."""
    text = json.dumps(describe(folder, recipe, packages), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def problem_with(folder: Path, recipe: int, packages: tuple[str, ...], *, rehash: bool = False) -> str | None:
    """Return why a folder has to be built (again), or None if it is complete.

    Args:
        folder: The asset's folder.
        recipe: Number of the recipe that the folder must come from.
        packages: Keys of PACKAGES it must come from.
        rehash: Read every byte instead of comparing file sizes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return "not there"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["recipe"] != recipe or manifest["sources"] != _sources(packages):
        return "made by another recipe or from other packages"
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != facts["size"]:
            return f"{name} is missing or has another size"
        if rehash and sha256_of(file) != facts["sha256"]:
            return f"{name} has another sha256"
    return None


def _sources(packages: tuple[str, ...]) -> dict[str, str]:
    return {key: PACKAGES[key].sha256 for key in packages}
