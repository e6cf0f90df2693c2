"""Draw the pictures of the parity report that README.md and docs/parity_report.md show: python -m tools.screenshot.

The page is made anew from a stored report.json, that of `make demo` by default, and photographed by a real Chromium.
Paths in it are shortened to what lies below the folder that they share.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from l4q.json_files import read_object
from runtime_tests.browser import Browser
from runtime_tests.report import write_report

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "docs" / "images"
WIDTH, HEIGHT = 1200, 1090
"""Of the window, in CSS pixels: the verdict and both tables of a report of four runs."""
SCHEMES = ("light", "dark")


def draw(report: Path, folder: Path) -> list[Path]:
    """Write report-light.png and report-dark.png.

    Args:
        report: A report.json.
        folder: Where the pictures go.

    Raises:
        UsageError: It is not JSON, or there is no Chromium.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_report(below_shared_folder(read_object(report, "the report")), place)
        with Browser(place / "profile") as browser:
            return [photograph(browser, place / "report.html", scheme, folder) for scheme in SCHEMES]


def below_shared_folder(report: dict[str, Any]) -> dict[str, Any]:
    """The report with every path shortened; of one path, its last part remains."""
    error = report.get("weight_error", {})
    owners = [(report, "checkpoint"), (error, "start"), *((row, "folder") for row in report["rows"])]
    places = [(owner, key) for owner, key in owners if os.path.isabs(owner.get(key) or "")]
    shared = os.path.commonpath([os.path.dirname(owner[key]) for owner, key in places] or [os.curdir])
    for owner, key in places:
        owner[key] = os.path.relpath(owner[key], shared)
    return report


def photograph(browser: Browser, page: Path, scheme: str, folder: Path) -> Path:
    """One picture of what a window of `WIDTH` by `HEIGHT` shows first."""
    browser.open(page, width=WIDTH, height=HEIGHT, scheme=scheme)
    return browser.screenshot(folder / f"report-{scheme}.png", full=False)


@click.command(name="screenshot")
@click.argument(
    "report",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    default=PROJECT / "build" / "demo" / "report.json",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, help="Folder to draw into.")
def command(report: Path, out: Path) -> None:
    """Draw pictures of REPORT, by default of what `make demo` measured."""
    for path in draw(report, out):
        click.echo(f"{path} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    command()
