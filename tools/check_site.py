"""Check a built site: every internal link and anchor resolves, and no page loads anything from elsewhere.

`python -m tools.check_site [build/site]`; exit code 1 and one line per problem.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

SITE = Path(__file__).resolve().parent.parent / "build" / "site"
# Attributes whose target the browser loads by itself; an <a href> is only followed by a reader.
LOADED = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "audio": ("src",),
    "video": ("src", "poster"), "object": ("data",), "embed": ("src",), "link": ("href",), "use": ("href",),
}  # fmt: skip
# <link rel> that loads nothing.
INERT = {"canonical", "next", "prev", "alternate", "author", "license"}


class Page(HTMLParser):
    """A page's anchors, what a reader can follow, and what its browser loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect one tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and INERT & set(given.get("rel", "").split()):
            return
        self.loads += [given[name] for name in LOADED.get(tag, ()) if name in given]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))


def problems(site: Path) -> list[str]:
    """One line per broken link, missing anchor or load from another host."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} has no page"]
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # is served from anywhere, so its links start at the root
            continue
        name = path.relative_to(site.resolve()).as_posix()
        found += [f"{name} loads {load}" for load in page.loads if foreign(load)]
        for link in dict.fromkeys((*page.links, *page.loads)):
            found += [f"{name}: {why}" for why in broken(link, path, pages)]
    for sheet in sorted(site.rglob("*.css")):
        loads = re.findall(r"url\(['\"]?([^'\")]+)", sheet.read_text(encoding="utf-8"))
        loads += re.findall(r"@import ['\"]([^'\"]+)", sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.name} loads {load}" for load in loads if foreign(load)]
    return found


def foreign(load: str) -> bool:
    """Whether loading this asks another host."""
    return bool(urlsplit(load).netloc) or urlsplit(load).scheme in ("http", "https")


def broken(link: str, path: Path, pages: dict[Path, Page]) -> list[str]:
    """Why a link of the page at `path` leads nowhere, if it does; links to other hosts are not asked for."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return []
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return [f"{link} leads nowhere"]
    anchor = unquote(parts.fragment)
    return [f"{link} has no anchor"] if anchor and target in pages and anchor not in pages[target].anchors else []


@click.command(name="check_site")
@click.argument("site", type=click.Path(path_type=Path, file_okay=False, exists=True), default=SITE)
def command(site: Path) -> None:
    """Check the links, anchors and loads of a built SITE."""
    found = problems(site)
    for line in found:
        click.echo(line, err=True)
    raise SystemExit(bool(found))


if __name__ == "__main__":
    command()
