"""mkdocs hooks: links of the pages into the source tree, which the site does not contain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
# A fence with a mark for the tests behind its language, which the site's Markdown does not know.
FENCE = re.compile(r"^```(\w+) [^\n]*$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn links to source files and to folders into their text; remove the tests' marks."""
    folder = Path(page.file.abs_src_path).parent
    return LINK.sub(lambda link: plain(link, folder, Path(config["docs_dir"])), FENCE.sub(r"```\1", markdown))


def plain(link: re.Match[str], folder: Path, docs: Path) -> str:
    """A link's replacement: itself, unless its target exists beside the site rather than in it."""
    text, name = link[1], link[2]
    if "://" in name:
        return link[0]
    target = (folder / name).resolve()
    outside = target.exists() and PROJECT in target.parents and (docs not in target.parents or target.is_dir())
    return text if outside else link[0]
