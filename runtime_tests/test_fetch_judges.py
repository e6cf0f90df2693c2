"""tools/fetch_judges.py: a judge's folder appears complete or not at all, once per set of versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4q.errors import UsageError
from tools import fetch_judges
from tools.fetch_judges import JUDGES, install, is_installed


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one module."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "tiny-judge"\nversion = "1.0"\n')
    (folder / "tiny_judge.py").write_text("ANSWER = 42\n")
    return folder


def test_a_judge_is_installed_once(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages and the extra files lie in the folder; a second call leaves it alone, other versions replace it."""
    monkeypatch.setattr(fetch_judges, "JUDGES", {"tiny": (str(package),)})
    monkeypatch.setattr(fetch_judges, "EXTRA_FILES", {"tiny": {"extra.py": "MORE = 1\n"}})
    target = install("tiny", tmp_path / "judges")
    assert (target / "tiny_judge.py").read_text() == "ANSWER = 42\n"
    assert (target / "extra.py").read_text() == "MORE = 1\n"
    (target / "mark").touch()
    install("tiny", tmp_path / "judges")
    assert (target / "mark").exists()
    monkeypatch.setattr(fetch_judges, "EXTRA_FILES", {})
    assert not is_installed("tiny", tmp_path / "judges")
    monkeypatch.setattr(fetch_judges, "JUDGES", {"tiny": (str(tmp_path / "missing"),)})
    with pytest.raises(UsageError, match=r"(?s)pip could not install.*missing"):
        install("tiny", tmp_path / "judges")
    assert (target / "mark").exists()
    assert sorted(path.name for path in (tmp_path / "judges").iterdir()) == [".lock", "tiny"]


def test_every_judge_is_pinned() -> None:
    """No version floats."""
    assert all("==" in requirement for requirements in JUDGES.values() for requirement in requirements)
