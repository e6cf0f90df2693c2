"""The parity report in a real Chromium: silent, offline, readable in both themes, on a phone and by keyboard."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from l4q.errors import UsageError
from runtime_tests.browser import Browser, find_browser
from runtime_tests.report_html.page import render_page
from runtime_tests.report_runs import Reports
from runtime_tests.test_report_html import HOSTILE, hostile_report
from tools import screenshot

CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "scheme", "width"), [("good", "light", 1200), ("bad", "dark", 1200), ("bad", "light", 390)]
)
def test_page_is_silent_and_readable(
    browser: Browser, reports: Reports, name: str, scheme: str, width: int, tmp_path: Path
) -> None:
    """No console message, no request, headings in order, labels, contrast >= 4.5, nothing wider than the window."""
    browser.open(getattr(reports, name) / "report.html", width=width, scheme=scheme)
    checked = browser.evaluate(CHECKS)
    assert checked["found"] == []
    assert checked["texts"] > 300
    assert checked["least"] >= 4.5
    assert browser.complaints() == []
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert browser.screenshot(tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


FAULTS = {
    '<h1 class="pass">': ("<h3>skipped</h3>" + '<h1 class="pass">', "heading skips a level"),
    'role="img" width': ("width", "svg without label"),
    '<th scope="row">torch float32': ("<th>torch float32", "th without scope"),
    "--soft: #545c66": ("--soft: #b8bcc2", "contrast"),
    '<html lang="en">': ("<html>", "no language"),
    "table { width: 100%": ("footer p { width: 3000px } table { width: 100%", "wider than the window"),
    'href="#how-kl"': ('href="#nowhere"', "link leads nowhere"),
    "<footer>": ('<footer><img src="https://example.org/x.png" alt="">', "foreign or active element"),
}


def test_faults_are_found(browser: Browser, reports: Reports, tmp_path: Path) -> None:
    """The twin: each fault put into the page is found, and a script that runs or a request that starts is seen."""
    page = reports.page("good")
    for number, (place, (fault, expected)) in enumerate(FAULTS.items()):
        assert place in page, place
        path = tmp_path / f"{number}.html"
        path.write_text(page.replace(place, fault), encoding="utf-8")
        browser.open(path)
        found = browser.evaluate(CHECKS)["found"]
        assert any(expected in sentence for sentence in found), (place, found)
    assert any(event["method"] == "Log.entryAdded" for event in browser.complaints())  # the image was blocked
    loose = page.replace('http-equiv="Content-Security-Policy"', 'name="policy"')
    noisy = loose.replace("<footer>", '<script>console.error("x"); nonsense()</script><footer><img src="nothing.png">')
    (tmp_path / "noisy.html").write_text(noisy, encoding="utf-8")
    browser.open(tmp_path / "noisy.html")
    methods = {event["method"] for event in browser.complaints()}
    assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.requestWillBeSent"} <= methods


def test_hostile_text_does_nothing(browser: Browser, reports: Reports, tmp_path: Path) -> None:
    """Token text, names and messages made of markup are shown letter by letter and do nothing."""
    path = tmp_path / "hostile.html"
    path.write_text(render_page(hostile_report(reports.data("good"))), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.complaints() == []
    shown = browser.evaluate("document.querySelector('mark').textContent")
    assert shown == HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\u0000").replace("\ud7ff", "\\ud7ff")


def test_keyboard_and_screen_reader(browser: Browser, reports: Reports) -> None:
    """The first Tab reaches the skip link, Enter moves on to the content; charts, tables and regions have names."""
    browser.open(reports.good / "report.html")
    browser.press("Tab")
    focused = browser.evaluate(
        "[document.activeElement.className, document.activeElement.getBoundingClientRect().left]"
    )
    assert focused[0] == "skip"
    assert focused[1] >= 0  # on screen once it has the focus
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.id") == "main"
    browser.press("Tab")
    assert browser.evaluate("document.querySelector('main').contains(document.activeElement)")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    images = [name for role in ("image", "img") for name in named.get(role, [])]
    assert len(images) == 5  # two charts of each of two runs, and the weight errors
    assert all(len(name) > 20 for name in images)
    assert all(named["heading"])
    assert all(named["region"])
    assert "Passed" in named["heading"][0]
    assert len(named["columnheader"]) > 20


def png_size(path: Path) -> tuple[int, ...]:
    """Width and height in the header of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_the_pictures_of_the_documents_are_drawn(reports: Reports, tmp_path: Path) -> None:
    """tools.screenshot draws a report in both colours as large as those stored, which are light enough for a README."""
    done = CliRunner().invoke(screenshot.command, [str(reports.good / "report.json"), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    light, dark = (tmp_path / f"report-{scheme}.png" for scheme in screenshot.SCHEMES)
    stored = sorted(screenshot.FOLDER.glob("*.png"))
    assert [path.name for path in stored] == [dark.name, light.name]
    assert {png_size(path) for path in (light, dark, *stored)} == {(screenshot.WIDTH, screenshot.HEIGHT)}
    assert light.read_bytes() != dark.read_bytes()
    assert all(path.stat().st_size < 250_000 for path in stored)


def test_pictures_show_no_folder_of_the_machine(reports: Reports) -> None:
    """Paths start below the folder they share, so that a picture tells nothing of where it was made."""
    report = screenshot.below_shared_folder(reports.data("good"))
    assert report["checkpoint"]
    assert str(reports.good.parent) in json.dumps(reports.data("good"))
    assert str(reports.good.parent) not in render_page(report)
    assert screenshot.below_shared_folder({"checkpoint": "a", "rows": []}) == {"checkpoint": "a", "rows": []}


def test_it_prints(browser: Browser, reports: Reports) -> None:
    """Printing gives a PDF of a few pages, in the light colours."""
    browser.open(reports.good / "report.html", scheme="dark")
    reply: dict[str, Any] = browser.call("Page.printToPDF", printBackground=True)
    pdf = base64.b64decode(reply["data"])
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_missing_browser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Chromium the message says how to get one."""
    monkeypatch.setenv("L4Q_BROWSER", "no-such-browser")
    with pytest.raises(UsageError, match="make browser"):
        find_browser()
