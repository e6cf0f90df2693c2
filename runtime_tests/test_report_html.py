"""The parity report: its numbers are report.json's, its sentences explain failures, nothing in it can run."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from runtime_tests.cli import command
from runtime_tests.compare import TokenTrace
from runtime_tests.conftest import ASSETS
from runtime_tests.report import report_files, write_report
from runtime_tests.report_html.causes import ERROR_CAUSES, INEXACT, UNKNOWN_ERROR, bound_cause, error_cause
from runtime_tests.report_html.details import token_detail
from runtime_tests.report_html.page import render_page, visible
from runtime_tests.report_html.weight_error import weight_errors
from runtime_tests.report_runs import Reports
from runtime_tests.thresholds import LIMITS

TEXT = ASSETS / "text" / "wiki_demo.txt"


class Shown(HTMLParser):
    """The <data> elements of a page: place -> (exact value, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, tuple[float, str]] = {}
        self._open: tuple[str, float] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element's value and place."""
        values = dict(attrs)
        if tag == "data":
            self._open = (str(values["data-key"]), float(str(values["value"])))

    def handle_data(self, data: str) -> None:
        """The text inside."""
        if self._open:
            self.found[self._open[0]] = (self._open[1], data)
            self._open = None


def wrong_numbers(page: str, report: dict[str, Any]) -> list[str]:
    """Places of a page whose exact value is not report.json's, or whose text is not that value rounded."""
    wrong = []
    for place, (value, text) in Shown(page).found.items():
        stored: Any = report
        for key in place.split("/" if "/" in place else "."):
            stored = stored[int(key)] if isinstance(stored, list) else stored[key]
        percent = place.endswith("top1") or place.startswith("weight_error")
        number = float(text.replace("−", "-").replace(",", "").replace("%", ""))
        digits = text.replace("%", "").strip().partition("e")[0].partition(".")[2]
        power = int(text.replace("−", "-").partition("e")[2] or 0)
        tolerance = 0.51 * 10.0 ** (power - len(digits))
        if value != stored or abs(number - value * (100 if percent else 1)) > tolerance:
            wrong.append(place)
    return wrong


@pytest.mark.parametrize("name", ["good", "bad"])
def test_numbers_are_those_of_report_json(reports: Reports, name: str) -> None:
    """Every number on the page is report.json's, exactly in the markup and rounded in the text; none is left out."""
    page, report = reports.page(name), reports.data(name)
    assert not wrong_numbers(page, report)
    figures = ("perplexity", "delta_percent", "kl", "top1", "tokens_per_s", "bit_exact", "bytes", "bits_per_weight")
    expected = {f"rows.{row}.{key}" for row in range(2) for key in (*figures, "perplexity_band.0", "quantized_bytes")}
    expected |= {f"rows.{row}.tokens_detail.worst.{rank}.delta" for row in range(2) for rank in range(10)}
    expected |= {f"rows.0.checks.{index}.value" for index in range(3)} | {"oracle.perplexity", "tokens"}
    expected |= {f"weight_error/layers/{module}" for module in report["weight_error"]["layers"]}
    assert expected <= set(Shown(page).found)


def test_a_changed_number_is_noticed(reports: Reports) -> None:
    """The twin: another number in the text, or in the markup, or in report.json, fails the comparison."""
    page, report = reports.page("good"), reports.data("good")
    value, text = Shown(page).found["rows.0.perplexity"]
    assert "rows.0.perplexity" in wrong_numbers(page.replace(f">{text}<", f">{value + 0.001:.4f}<"), report)
    assert "rows.0.perplexity" in wrong_numbers(page.replace(repr(value), repr(value + 1e-9)), report)
    report["rows"][1]["kl"] *= 1.0001
    assert wrong_numbers(page, report) == ["rows.1.kl"]


def test_token_details_agree_with_the_figures(reports: Reports) -> None:
    """The histogram holds every token, the first worst token is the largest |Δ|, and contexts are the text's own."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    for row in reports.data("bad")["rows"]:
        detail = row["tokens_detail"]
        assert sum(detail["histogram"]["counts"]) == row["tokens"] == 198
        assert len(detail["scatter"]) == 198
        gaps = [abs(token["delta"]) for token in detail["worst"]]
        assert gaps[0] == pytest.approx(row["max_abs_dlogprob"], rel=1e-6)
        assert gaps == sorted(gaps, reverse=True)
        for token in detail["worst"]:
            shown = " ".join((token["before"] + token["token"] + token["after"]).split())
            assert "<unk>" in shown or shown in text, token
            assert token["delta"] == pytest.approx(token["runtime"] - token["oracle"], abs=1e-12)


def test_worst_tokens_are_found_in_their_window() -> None:
    """A token moved by hand is reported with its window, position, neighbours and both sides' favourites."""
    windows = [list(range(10)), list(range(100, 110)), list(range(200, 210))]
    oracle = np.full(27, -2.0, dtype=np.float32)
    runtime = oracle.copy()
    runtime[9 + 4], runtime[26], runtime[0] = -7.0, -4.0, -1.0
    tops = np.arange(27), np.arange(27) + 500
    trace = TokenTrace(oracle=oracle, runtime=runtime, oracle_top=tops[0], runtime_top=tops[1])
    worst = token_detail(trace, windows, lambda ids: " ".join(map(str, ids)))["worst"][:3]
    assert [(t["window"], t["position"], t["token"], t["delta"]) for t in worst] == [
        (1, 5, "105", -5.0), (2, 9, "209", -2.0), (0, 1, "1", 1.0),
    ]  # fmt: skip
    assert (worst[0]["before"], worst[0]["after"]) == ("100 101 102 103 104", "106 107 108 109")
    assert (worst[0]["oracle_top"], worst[0]["runtime_top"], worst[1]["after"]) == ("13", "513", "")


def test_weight_errors_are_those_of_the_model(reports: Reports, glassllm_dir: Path) -> None:
    """‖W_q − W_0‖ / ‖W_0‖ of every linear, found without being told the start, equals transformers' weights'."""
    found = reports.data("good")["weight_error"]
    assert Path(found["start"]) == glassllm_dir
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    checkpoint = L4QCheckpoint.open(reports.source)
    assert list(found["layers"]) == list(checkpoint.modules)
    for module, value in found["layers"].items():
        start = model.get_submodule(module).weight.detach().double().numpy()
        change = checkpoint.quantized(module).dequantize().astype(np.float64) - start
        assert value == pytest.approx(np.linalg.norm(change) / np.linalg.norm(start), rel=1e-6)
        assert 0.01 < value < 0.5


def test_starts_that_cannot_be_used(reports: Reports, smollm2_dir: Path, tmp_path: Path) -> None:
    """A named start must fit; one that is only remembered and gone leaves a sentence instead of the figures."""
    checkpoint = L4QCheckpoint.open(reports.source)
    with pytest.raises(UsageError, match="no such folder"):
        weight_errors(checkpoint, tmp_path / "nothing")
    with pytest.raises(UsageError, match="the start has no such weight"):
        weight_errors(checkpoint, smollm2_dir)
    checkpoint.config["_name_or_path"] = str(tmp_path / "gone")
    assert "--start" in weight_errors(checkpoint)["missing"]
    report = reports.data("good") | {"weight_error": weight_errors(checkpoint)}
    assert "Not measured: the 16-bit start is not known" in render_page(report)


def test_verdict_and_causes(reports: Reports) -> None:
    """The verdict comes first; an export of another checkpoint says what it is, and which bounds that broke."""
    good, bad = reports.page("good"), reports.page("bad")
    assert "✓ Passed: all 2 runs are within their bounds" in good
    assert "✗ failed" not in good
    assert "✗ Failed: 2 of 2 runs are outside their bounds" in bad
    problems = reports.data("bad")["rows"][0]["problems"]
    assert problems[0]["cause"] == INEXACT
    assert problems[0]["what"].startswith("0 of 24 tensors are bit-exact. model.layers.0.")
    assert all(str(visible(problem["cause"])).replace("'", "&#39;") in bad for problem in problems)
    assert {problem["what"].split()[0] for problem in problems[1:]} == {
        check["figure"] for check in reports.data("bad")["rows"][0]["checks"] if not check["passed"]
    }
    assert "Failed: no runtime was compared" in render_page({**reports.data("good"), "rows": [], "passed": False})


@pytest.mark.parametrize("key", LIMITS)
def test_every_bound_has_a_cause(key: tuple[str, str]) -> None:
    """No bound of thresholds.py can break without a sentence on what usually causes it."""
    for limit in LIMITS[key]:
        assert len(bound_cause(key[0], limit.figure)) > 40


ERRORS = {
    "RuntimeError: unable to mmap: Cannot allocate memory": "ran out of memory",
    "the vllm engine gave no answer within 900.0 s": "slower than the time limit",
    "the vllm engine failed in load: ModuleNotFoundError: No module named 'vllm'": "not installed",
    "ValueError: only symmetric quantization is supported": "zero-point",
    "llama_model_load: error loading model: tensor data is not within file bounds, failed to load model": "damaged",
    "Model architectures ['FooForCausalLM'] are not supported for now": "architecture",
    "log-probabilities have the wrong shape": "vocabulary",
    "the runtime answered NaN": "overflowed",
    "the llamacpp engine died in prompt_logprobs (signal SIGABRT)": "longer than the model's context",
}


def test_errors_get_their_usual_cause() -> None:
    """Messages that runtimes really give are recognised, each by another line; the rest gets a sentence."""
    causes = [error_cause(message) for message in ERRORS]
    assert all(words in cause for cause, words in zip(causes, ERRORS.values(), strict=True)), causes
    assert set(causes) == {cause for _, cause in ERROR_CAUSES}
    assert error_cause("quite unheard of") == UNKNOWN_ERROR


HOSTILE = "</mark><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\u202e\x00\ud7ff&amp;"


def hostile_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report in which everything that comes from a model, a path or a runtime is an attack."""
    for row in report["rows"]:
        row["folder"] = row["error"] = HOSTILE
        row["info"] = {HOSTILE: HOSTILE}
        row["problems"] = [{"what": HOSTILE, "cause": HOSTILE}]
        for token in row["tokens_detail"]["worst"]:
            token.update(dict.fromkeys(("before", "token", "after", "oracle_top", "runtime_top"), HOSTILE))
    report["checkpoint"] = report["model"]["architecture"] = report["settings"]["text"] = HOSTILE
    report["weight_error"]["start"] = HOSTILE
    report["weight_error"]["layers"] = {f"model.layers.0.{HOSTILE.replace('/', '')}": 0.1}
    report["baselines"] = {HOSTILE.replace("/", ""): 1.5}
    return report


def test_hostile_text_stays_text(reports: Reports) -> None:
    """Markup in token text, names and messages is escaped everywhere; invisible and reversing signs are spelled out."""
    page = render_page(hostile_report(reports.data("good")))
    lowered = page.lower()
    assert "<script" not in lowered
    assert "<img" not in lowered
    assert "&lt;/mark&gt;&lt;script&gt;alert(1)" in page
    assert "\\u202e\\u0000" in page
    assert "\u202e" not in page
    assert "\x00" not in page


def test_stored_reports_of_earlier_versions_render(reports: Reports, tmp_path: Path) -> None:
    """A report.json with nothing but figures still makes a page, with the same numbers."""
    report = reports.data("good")
    bare = {key: report[key] for key in ("checkpoint", "tokens", "oracle", "passed")}
    extra = {"tokens_detail", "problems", "perplexity_band", "quantized_bytes"}
    bare["rows"] = [{key: value for key, value in row.items() if key not in extra} for row in report["rows"]]
    write_report(bare, tmp_path / "old.json")
    page = (tmp_path / "old.html").read_text(encoding="utf-8")
    assert not wrong_numbers(page, bare)
    assert "rows.1.perplexity" in Shown(page).found


def test_places_of_a_report(tmp_path: Path) -> None:
    """A folder gets report.json and report.html, a .json name its own; a place that is a file is refused at once."""
    assert report_files(tmp_path / "a" / "b") == (tmp_path / "a/b/report.json", tmp_path / "a/b/report.html")
    assert report_files(tmp_path / "x.json") == (tmp_path / "x.json", tmp_path / "x.html")
    (tmp_path / "file").write_text("taken")
    with pytest.raises(UsageError, match="cannot be written there"):
        report_files(tmp_path / "file")


def test_report_option_without_a_place(
    glass_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--report` alone means ./parity, made before anything runs; the help says so."""
    monkeypatch.chdir(tmp_path)
    source = glass_checkpoint("integer", group_size=32)
    result = CliRunner().invoke(command, [str(source), str(tmp_path), "--text", str(TEXT), "--report"])
    assert isinstance(result.exception, UsageError)
    assert "none of the formats" in str(result.exception)
    assert (tmp_path / "parity").is_dir()
    help_text = CliRunner().invoke(command, ["--help"]).output
    assert "./parity" in help_text
    assert "--start" in help_text


def test_decoded_tokens_are_the_tokenizers(reports: Reports) -> None:
    """Every worst token's text is what the checkpoint's tokenizer gives for one id."""
    tokenizer = AutoTokenizer.from_pretrained(reports.source)
    words = {tokenizer.decode([index]) for index in range(len(tokenizer))}
    for row in reports.data("good")["rows"]:
        assert {t["token"] for t in row["tokens_detail"]["worst"]} <= words
