"""`l4q curves`: the numbers of a run as one page that a real browser shows without a complaint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from l4q.errors import UsageError
from runtime_tests.browser import Browser
from runtime_tests.cli_curves import command, parse_reference
from runtime_tests.report_html.curves import render_curves
from runtime_tests.report_html.runs import read_run
from runtime_tests.report_html.svg_lines import MOST_POINTS, smoothed, thinned

CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")
HOSTILE = '</title><script>console.log("x")</script><img src=x onerror=alert(1)>'


def write_run(folder: Path, steps: int, *, finished: bool = True, zero_point: str = "integer") -> Path:
    """A run folder with the files l4q-train writes, of figures that are easy to recognise."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 5 - step / steps, "lr_lora": 1e-3, "grad_norm": 1.5, "tokens": 128 * step}
        line |= {"scale_drift": 0.02 * step / steps, "clipped": 0.004, "tokens_per_s": 300.0, "memory_mb": 900.0}
        line |= {"zero_point_moves": 0.01} if zero_point != "none" else {}
        line |= {"held_out_perplexity": 40 - step / 10} if step % 10 == 0 else {}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    quant = {"bits": 4, "group_size": 64, "zero_point": zero_point}
    record = {"options": {"model": "some/model", "seed": 3, "quant": quant}}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    if finished:
        perplexity = {"base": 25.5, "start": 44.25, "trained": 33.125}
        (folder / "result.json").write_text(json.dumps({"steps": steps, "perplexity": perplexity}), encoding="utf-8")
    return folder


def write_trainer(folder: Path) -> Path:
    """What transformers' Trainer leaves: two checkpoints with their logs."""
    for last in (8, 16):
        history: list[dict[str, Any]] = [
            {"step": step, "loss": 4.5, "grad_norm": 2.0} for step in range(4, last + 1, 4)
        ]
        history += [{"step": last, "eval_loss": math.log(30.0)}]
        (folder / f"checkpoint-{last}").mkdir(parents=True)
        state = {"global_step": last, "log_history": history}
        (folder / f"checkpoint-{last}/trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run beside one that still trains and a Trainer's."""
    folder = tmp_path_factory.mktemp("curves")
    runs = [write_run(folder / "mine", 40), write_run(folder / "other", 20, finished=False)]
    words = [str(runs[0]), "--compare", str(runs[1]), "--compare", str(write_trainer(folder / "lora"))]
    done = CliRunner().invoke(command, [*words, "--reference", "16-bit LoRA=28.5"], catch_exceptions=False)
    assert done.stdout == f"{runs[0] / 'curves.html'}\n"
    return runs[0] / "curves.html"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_page_is_silent_and_readable(browser: Browser, page: Path, scheme: str, width: int, tmp_path: Path) -> None:
    """No console message, no request, headings in order, labels, contrast >= 4.5, nothing wider than the window."""
    browser.open(page, width=width, scheme=scheme)
    checked = browser.evaluate(CHECKS)
    assert checked["found"] == []
    assert checked["texts"] > 150
    assert checked["least"] >= 4.5
    assert browser.complaints() == []
    assert (browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )
    assert browser.screenshot(tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_page_draws_every_figure(browser: Browser, page: Path) -> None:
    """Six charts with a line per run that has the figure, the references across, and it prints in light colours."""
    browser.open(page)
    lines = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('figure')].map(f => "
        "[f.id, [...f.querySelectorAll('path.line:not(.mark)')].map(p => p.getAttribute('class').split(' ')[1])]))"
    )
    assert lines == {
        "held_out_perplexity": ["a", "b", "c"], "loss": ["a", "b", "c"], "scale_drift": ["a", "b"],
        "clipped": ["a", "b"], "zero_point_moves": ["a", "b"], "grad_norm": ["a", "b", "c"],
    }  # fmt: skip
    text = browser.evaluate("document.body.textContent")
    for words in ("44.250 → 33.125 in 40 steps", "16-bit LoRA 28.500", "16-bit model before training 25.500"):
        assert words in text
    assert "4 bits, group size 64, zero-point integer" in text
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    heights = browser.evaluate(
        "[...document.querySelectorAll('#scale_drift path.line.a')].map(p => p.getBBox().height)"
    )
    assert heights[0] > 100  # the curve climbs over most of its chart


def test_a_fault_is_found(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The twin: a page with pale text and a chart without a name does not pass the same checks."""
    content = page.read_text(encoding="utf-8")
    bad = content.replace("--soft: #545c66", "--soft: #b8bcc2").replace('role="img" width', "width")
    assert bad != content
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    browser.open(tmp_path / "bad.html")
    found = browser.evaluate(CHECKS)["found"]
    assert any("contrast" in sentence for sentence in found)
    assert any("svg without label" in sentence for sentence in found)


def test_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    """Markup in a run's name, its model or a reference's label is shown letter by letter."""
    run = read_run(write_run(tmp_path / "run", 12))
    hostile = [run.__class__(**{**vars(run), "name": HOSTILE, "facts": {"model": HOSTILE}})]
    (tmp_path / "page.html").write_text(render_curves(hostile, {HOSTILE: 30.0}), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert HOSTILE in browser.evaluate("document.querySelector('.legend').textContent")
    assert browser.complaints() == []


def test_numbers_as_json(tmp_path: Path) -> None:
    """--json gives first, last, least and greatest of every figure; shares are percent."""
    run = write_run(tmp_path / "run", 40)
    words = [str(run), "--json", "--out", str(tmp_path / "new" / "page.html"), "--reference", "a=b=7"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["figures"]}
    assert result["references"] == {"a=b": 7.0}
    assert rows["held_out_perplexity"]["first"] == [0.0, 44.25]
    assert rows["held_out_perplexity"]["last"] == [40.0, 33.125]  # the result's, not the step's 36.0
    assert rows["scale_drift"]["most"] == [40.0, pytest.approx(2.0)]
    assert rows["loss"]["count"] == 40
    assert (tmp_path / "new" / "page.html").is_file()


def test_damaged_and_repeated_lines(tmp_path: Path) -> None:
    """A half-written line is passed over; a step that stands twice counts once, as last written."""
    run = write_run(tmp_path / "run", 5, finished=False)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 9.5}\n{"step": 6, "loss": NaN}\n{"step": 7, "lo')
    loss = read_run(run).series["loss"]
    assert [step for step, _ in loss] == [1, 2, 3, 4, 5]
    assert loss[3] == (4.0, 9.5)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """No run, a run without a step, a broken record, too many runs and a wrong reference get one error each."""
    with pytest.raises(UsageError, match=r"(?s)there is no run here.*metrics\.jsonl nor trainer_state\.json"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="no logged step yet"):
        read_run(write_run(tmp_path / "none", 0, finished=False))
    broken = write_run(tmp_path / "broken", 3)
    (broken / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s)record of the run cannot be read.*result\.json"):
        read_run(broken)
    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"(?s)cannot be read.*expected: log_history"):
        read_run(tmp_path / "trainer_state.json")
    many = [str(broken), *(word for _ in range(4) for word in ("--compare", str(broken)))]
    with pytest.raises(UsageError, match="too many runs for one page"):
        CliRunner().invoke(command, many, catch_exceptions=False)
    for text in ("16-bit LoRA", "=3", "a=", "a=-1", "a=inf"):
        with pytest.raises(UsageError, match=f"(?s)LABEL=PERPLEXITY.*{re.escape(text)}"):
            parse_reference(text)


def test_long_lines_are_thinned_and_smoothed_fairly() -> None:
    """Thinning keeps the mean and the range of steps; smoothing keeps a constant and has no bias at its start."""
    points = [(float(step), float(step % 2)) for step in range(1, 10_001)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert sum(value for _, value in few) / len(few) == pytest.approx(0.5)
    assert thinned(points[:300]) == points[:300]
    assert smoothed([(1.0, 3.0), (2.0, 3.0)]) == [(1.0, 3.0), (2.0, 3.0)]
    assert smoothed([(float(step), 7.0) for step in range(100)])[0][1] == pytest.approx(7.0)
