"""mkdocs hooks: links of the pages into the source tree, which the site does not contain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
# Pages that may be missing from the folder; links to them become text and the navigation leaves them out.
PENDING = ("api.md", "cli.md", "huggingface.md", "outputs.md", "performance.md", "reliability.md", "watching.md")

# A fence with a mark for the tests behind its language, which the site's Markdown does not know.
FENCE = re.compile(r"^```(\w+) [^\n]*$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Leave pending pages out of the navigation."""
    config["nav"] = without_missing(config["nav"], Path(config["docs_dir"]))
    return config


def without_missing(nav: list[Any], docs: Path) -> list[Any]:
    """A navigation without the `PENDING` pages that are not there, and without sections that this empties."""
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            inner = without_missing(target, docs)
            kept += [{title: inner}] if inner else []
        elif target not in PENDING or (docs / target).is_file():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn links to source files, to folders and to pending pages into their text; remove the tests' marks."""
    folder = Path(page.file.abs_src_path).parent
    return LINK.sub(lambda link: plain(link, folder, Path(config["docs_dir"])), FENCE.sub(r"```\1", markdown))


def plain(link: re.Match[str], folder: Path, docs: Path) -> str:
    """A link's replacement: itself, unless its target exists beside the site rather than in it."""
    text, name = link[1], link[2]
    if "://" in name:
        return link[0]
    target = (folder / name).resolve()
    outside = target.exists() and PROJECT in target.parents and (docs not in target.parents or target.is_dir())
    return text if outside or (name in PENDING and not target.exists()) else link[0]
