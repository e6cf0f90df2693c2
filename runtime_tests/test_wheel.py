"""The distribution: what is in the wheel, what PyPI's checkers say, and that it works without the repository."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from l4q.config import QuantConfig
from runtime_tests.tiny_llama import tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("l4q", "exporters", "runtime_tests")
FIXTURE_TEST = """
import sys

def test_light(l4q_parity):
    assert callable(l4q_parity)
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""


class Built(NamedTuple):
    """Both archives, and the sources they were built from."""

    source: Path
    wheel: Path
    sdist: Path


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command far from the repository: nothing of it on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def check(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A module of this environment as a command."""
    return run(sys.executable, "-m", *words, cwd=cwd, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """python -m build: the sdist from a copy of the sources, the wheel from the sdist."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    finished = check("build", "--no-isolation", source, cwd=source.parent)
    assert finished.returncode == 0, finished.stderr
    return Built(source, next(source.glob("dist/*.whl")), next(source.glob("dist/*.tar.gz")))


def top_level(wheel: Path) -> set[str]:
    """First parts of the names in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.partition("/")[0] for name in archive.namelist()}


def test_top_level_is_what_is_intended(built: Built) -> None:
    """Three packages and their metadata; each with py.typed, and with the data files that its code opens."""
    info = next(name for name in top_level(built.wheel) if name.endswith(".dist-info"))
    assert top_level(built.wheel) == {*PACKAGES, info}
    with zipfile.ZipFile(built.wheel) as archive:
        inside = set(archive.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside
    data = {
        path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in {".js", ".css", ".j2"}
    }
    assert {str(path.relative_to(ROOT)) for path in data} <= inside


def test_checkers_pass(built: Built, tmp_path: Path) -> None:
    """check-wheel-contents and twine find nothing; with one more top-level package in the wheel, the former does."""
    assert check("twine", "check", "--strict", built.wheel, built.sdist, cwd=tmp_path).returncode == 0
    words = ("check_wheel_contents", "--config", built.source / "pyproject.toml")
    finished = check(*words, built.wheel, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    spoiled = tmp_path / built.wheel.name
    with zipfile.ZipFile(built.wheel) as old, zipfile.ZipFile(spoiled, "w") as new:
        for name in old.namelist():
            extra = b"tools/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n"  # of no bytes
            new.writestr(name, old.read(name) + (extra if name.endswith("/RECORD") else b""))
        new.writestr("tools/__init__.py", b"")
    finished = check(*words, spoiled, cwd=tmp_path)
    assert finished.returncode != 0
    assert "tools" in finished.stdout


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that has the wheel, and this environment's packages beside it."""
    home = tmp_path_factory.mktemp("fresh")
    assert run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home).returncode == 0
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(home), "platbase": str(home)}))
    # A path file is not followed from a folder named in one, so the repository's editable install stays unseen.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    words = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", built.wheel)
    finished = run(sys.executable, *words, cwd=home)
    assert finished.returncode == 0, finished.stderr
    found = run(python, "-c", "import l4q, exporters, runtime_tests; print(l4q.__file__)", cwd=home)
    assert found.stdout.strip() == str(site / "l4q" / "__init__.py"), found.stderr
    return home / "bin"


def test_every_command_answers(built: Built, installed: Path, tmp_path: Path) -> None:
    """Each command of the wheel's metadata is installed and explains itself."""
    info = next(name for name in top_level(built.wheel) if name.endswith(".dist-info"))
    with zipfile.ZipFile(built.wheel) as archive:
        points = configparser.ConfigParser()
        points.read_string(archive.read(f"{info}/entry_points.txt").decode())
    commands = set(points["console_scripts"])
    assert {"l4q", "l4q-train", "l4q-export", "l4q-parity"} <= commands
    for command in sorted(commands):
        finished = run(installed / command, "--help", cwd=tmp_path)
        assert finished.returncode == 0, (command, finished.stderr)
        assert "Usage:" in finished.stdout, command


def test_export_and_inspect_work(installed: Path, tmp_path: Path) -> None:
    """A checkpoint goes to GGUF and is shown, by the installed commands alone."""
    source = tiny_checkpoint(tmp_path / "tiny", QuantConfig()).path
    finished = run(installed / "l4q-export", source, "--to", "gguf", "--out", tmp_path / "out", "--json", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    verified = json.loads(finished.stdout)["gguf"]["verified"]
    assert (verified["exact"], verified["total"]) == (14, 14)
    assert run(installed / "l4q-inspect", tmp_path / "out" / "gguf", cwd=tmp_path).returncode == 0


def test_pytest_finds_the_fixture(installed: Path, tmp_path: Path) -> None:
    """The plugin is there without being asked for, and an ordinary test run loads nothing heavy because of it."""
    (tmp_path / "test_mine.py").write_text(FIXTURE_TEST)
    finished = run(installed / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "1 passed" in finished.stdout
