"""Comparison arithmetic, thresholds, target detection and the l4q-parity command, without heavy engines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporters.driver import export
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError, VerificationError
from runtime_tests.compare import LogprobComparison, ParityStats
from runtime_tests.conftest import ASSETS, CheckpointMaker
from runtime_tests.parity_runs import ParityOptions, ParityReport, assert_parity, run_parity
from runtime_tests.run import read_windows
from runtime_tests.targets import detect
from runtime_tests.thresholds import LIMITS, limits_for

TEXT = ASSETS / "text" / "wiki_demo.txt"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 reference."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_figures_follow_their_definitions() -> None:
    """Perplexity, KL, top-1 and log-probability differences equal a direct float64 computation over two windows."""
    rng = np.random.default_rng(0)
    comparison = LogprobComparison()
    nll, other, kl, gaps, same = [], [], [], [], []
    for _ in range(2):
        ids = rng.integers(0, 50, 200).tolist()
        logits = rng.normal(0, 2, (200, 50))
        oracle, runtime = log_softmax(logits), log_softmax(logits + rng.normal(0, 0.3, logits.shape))
        comparison.add(ids, oracle.astype(np.float32), runtime.astype(np.float32))
        for t in range(199):
            nll.append(-oracle[t, ids[t + 1]])
            other.append(-runtime[t, ids[t + 1]])
            gaps.append(abs(nll[-1] - other[-1]))
            kl.append(float((np.exp(oracle[t]) * (oracle[t] - runtime[t])).sum()))
            same.append(oracle[t].argmax() == runtime[t].argmax())
    stats = comparison.stats
    assert stats.tokens == 398
    assert stats.oracle_perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert stats.perplexity == pytest.approx(math.exp(np.mean(other)), rel=1e-6)
    assert stats.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert stats.top1 == pytest.approx(np.mean(same))
    assert stats.mean_abs_dlogprob == pytest.approx(np.mean(gaps), rel=1e-5)
    assert stats.max_abs_dlogprob == pytest.approx(max(gaps), rel=1e-5)


def test_nan_and_wrong_shapes_are_refused() -> None:
    """A runtime that answers NaN, or for another vocabulary, is an error and not a figure."""
    oracle = log_softmax(np.zeros((4, 7))).astype(np.float32)
    broken = oracle.copy()
    broken[1] = np.nan
    with pytest.raises(VerificationError, match="NaN"):
        LogprobComparison().add([0, 1, 2, 3], oracle, broken)
    with pytest.raises(VerificationError, match="wrong shape"):
        LogprobComparison().add([0, 1, 2, 3], oracle, oracle[:, :5])
    with pytest.raises(VerificationError, match="nothing was compared"):
        _ = LogprobComparison().stats


PERFECT = ParityStats(
    tokens=10,
    oracle_perplexity=20.0,
    perplexity=20.0,
    delta_percent=0.0,
    mean_abs_dlogprob=0.0,
    max_abs_dlogprob=0.0,
    kl=0.0,
    top1=1.0,
)


@pytest.mark.parametrize("key", LIMITS)
def test_every_limit_can_fail(key: tuple[str, str]) -> None:
    """Each threshold accepts perfect figures, and refuses its figure just beyond the bound and as NaN."""
    limits = limits_for(*key)
    assert limits
    for limit in limits:
        assert limit.check(PERFECT).passed
        assert limit.reason
        for bad in (limit.bound - 1e-6 if limit.at_least else limit.bound * 1.001, math.nan):
            changed = ParityStats(**{**PERFECT.__dict__, limit.figure: bad})
            assert not limit.check(changed).passed
        if not limit.at_least:
            assert not limit.check(ParityStats(**{**PERFECT.__dict__, limit.figure: -2 * limit.bound})).passed


def test_report_without_rows_is_no_success() -> None:
    """Comparing nothing is a failure, not a pass."""
    report = ParityReport(checkpoint=Path("x"), tokens=1, oracle_perplexity=2.0, oracle_tokens_per_s=None, rows=())
    with pytest.raises(VerificationError, match="no runtime was compared"):
        assert_parity(report)


def test_detection(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Folders are recognised by what is in them; ONNX runs at its shipped level and at 4."""
    source = glass_checkpoint("none", group_size=32)
    opened = L4QCheckpoint.open(source)
    onnx, gguf = (export(opened, name, tmp_path / name).folder for name in ("onnx", "gguf"))
    assert [(t.engine, t.variant) for t in detect(onnx)] == [("onnxruntime", "0"), ("onnxruntime", "4")]
    assert [(t.engine, t.variant) for t in detect(gguf)] == [("llamacpp", "Q4_0")]
    assert [(t.engine, t.variant) for t in detect(source)] == [("torch", "")]
    (gguf / "l4q_export.json").unlink()
    assert [(t.engine, t.variant) for t in detect(gguf)] == [("llamacpp", "Q4_0")]
    with pytest.raises(UsageError, match="no such folder"):
        detect(tmp_path / "nothing")
    with pytest.raises(UsageError, match="none of the formats"):
        detect(tmp_path)


def test_a_crashing_engine_is_one_row(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A file the runtime cannot load fails its own row; the other runtimes still get theirs."""
    source = glass_checkpoint("none", group_size=32)
    opened = L4QCheckpoint.open(source)
    onnx, gguf = (export(opened, name, tmp_path / name).folder for name in ("onnx", "gguf"))
    path = next(gguf.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:2000])
    windows, _ = read_windows(source, TEXT, 1, 100)
    report = run_parity(source, [*detect(gguf), *detect(onnx)], windows, ParityOptions(check_bits=False))
    broken, *rest = report.rows
    assert broken.error
    assert not broken.passed
    assert all(row.stats for row in rest)
    with pytest.raises(VerificationError, match="gguf"):
        assert_parity(report)


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    words = [sys.executable, "-c", "from runtime_tests.cli import main; main()", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_cli_passes_and_fails(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Exit code 0 with a report for a faithful export; 4 when the export belongs to another checkpoint."""
    source = glass_checkpoint("integer", group_size=32)
    onnx = export(L4QCheckpoint.open(source), "onnx", tmp_path / "onnx").folder
    counts = ("--text", TEXT, "--windows", 2, "--window", 100, "--new-tokens", 8)
    good = run_cli(source, onnx, *counts, "--report", tmp_path / "report.json", "--json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert good.returncode == 0, good.stderr
    assert report == json.loads(good.stdout)
    assert report["passed"]
    assert [row["variant"] for row in report["rows"]] == ["0", "4"]
    assert "onnxruntime" in (onnx / "README.md").read_text()
    other = run_cli(glass_checkpoint("none", group_size=32), onnx, *counts, "--json")
    assert other.returncode == 4
    assert json.loads(other.stdout)["passed"] is False
    assert "parity failed" in other.stderr
    assert "Traceback" not in other.stderr
    missing = run_cli(source, onnx, "--text", tmp_path / "nothing.txt")
    assert missing.returncode == 2
    assert "the text cannot be read" in missing.stderr
