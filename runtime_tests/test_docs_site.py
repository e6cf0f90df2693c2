"""`make docs`: the site builds strictly, its links lead somewhere, and it asks nobody for anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import figures
from tools.check_site import problems
from tools.error_messages import PROJECT


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(PROJECT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_resolve_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Every link, anchor, image, script and style of every page is in the site; all pages of docs/ are."""
    assert problems(site) == []
    pages = {path.stem for path in (PROJECT / "docs").glob("*.md")}
    assert pages - {path.parent.name for path in site.rglob("index.html")} == {"index"}


def test_the_search_knows_pages_and_docstrings(site: Path) -> None:
    """The index that the page's own script searches has a how-to page and a docstring in it."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"] for entry in index["docs"]}
    assert {"choose_grid/#zero-point", "reference/#l4q.model.wrap_linears"} <= places


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('href="../choose_grid/"', 'href="../gone/"', "leads nowhere"),
        ('href="../serving/#onnx-runtime"', 'href="../serving/#gone"', "has no anchor"),
        ("</body>", '<script src="https://example.org/x.js"></script></body>', "loads https://example.org/x.js"),
        ("</body>", '<link rel="stylesheet" href="//example.org/x.css"></body>', "loads //example.org/x.css"),
        ("</body>", '<p style="background: url(https://example.org/x.png)"></body>', "loads https://example.org/x.png"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(site: Path, tmp_path: Path, old: str, new: str, found: str) -> None:
    """A broken link, a missing anchor, and a script, style or image of another host are each reported, alone."""
    shutil.copytree(site, tmp_path / "site")
    page = tmp_path / "site" / "tutorial" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new), encoding="utf-8")
    told = problems(tmp_path / "site")
    assert told
    assert all(line.startswith("tutorial/index.html") and found in line for line in told)


def test_the_strict_build_refuses_a_broken_link(tmp_path: Path) -> None:
    """mkdocs itself stops at a link to a page that is not there."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[gone](gone.md), [kept](../tools/docs_hooks.py)\n")
    (tmp_path / "tools").mkdir()
    shutil.copy(PROJECT / "tools" / "docs_hooks.py", tmp_path / "tools")
    settings = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav:\n  - Page: index.md\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr
    assert "docs_hooks" not in done.stderr  # a link to a source file became text
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[kept](../tools/docs_hooks.py)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0


def test_the_figures_are_the_codes() -> None:
    """docs/figures is what the layer draws today."""
    stored = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "docs" / "figures").glob("*.svg")}
    assert stored == {name: draw() for name, draw in figures.FIGURES.items()}
