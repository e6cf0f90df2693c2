"""The ONNX benchmarks on small models: what they report, and what they notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.onnx.optimized import OPTIMIZED_DATA, OPTIMIZED_NAME
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError, VerificationError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.onnx_models import export_onnx
from tools.bench_onnx import measure_folder
from tools.onnx_levels import as_markdown, blocks_of, measure


@pytest.fixture(scope="module")
def checkpoint(glass_checkpoint: CheckpointMaker) -> L4QCheckpoint:
    """GlassLLM in groups of 64 columns."""
    return L4QCheckpoint.open(glass_checkpoint("none", group_size=64))


def test_finer_blocks_make_level_4_more_accurate(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Level 0 is the oracle's model; level 4 is not, and comes nearer with each halving of the block."""
    assert blocks_of(checkpoint) == [64, 32, 16]
    ids = np.random.default_rng(0).integers(4, 1000, (2, 64)).tolist()
    rows = measure(checkpoint, ids, ids[0][:8], tmp_path)
    assert [(row["block"], row["level"]) for row in rows] == [(64, 0), (64, 4), (32, 4), (16, 4)]
    exact, *rounded = (row["kl"] for row in rows)
    assert exact < 1e-8
    assert rounded == sorted(rounded, reverse=True)
    assert rounded[-1] > 100 * exact
    sizes = [row["bytes"] for row in rows[1:]]
    assert sizes == sorted(sizes)
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {9}


def test_the_load_benchmark_compares_both_files(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """A ratio of two positive times for equal results; a damaged or missing file is an error, not a figure."""
    folder = export_onnx(checkpoint, tmp_path / "onnx", onnx_runtime_optimized=True)
    report: dict[str, Any] = {}
    measure_folder(folder, 1, report)
    assert report["load_ratio"] == report["plain_load_seconds"] / report["optimized_load_seconds"] > 0
    assert report["over_protobuf_limit"] is False
    assert set(report["bytes"]) == {"model.onnx", "model.onnx.data", OPTIMIZED_NAME, OPTIMIZED_DATA}
    data = bytearray((folder / OPTIMIZED_DATA).read_bytes())
    data[: len(data) // 2] = bytes(byte ^ 0x11 for byte in data[: len(data) // 2])
    (folder / OPTIMIZED_DATA).write_bytes(data)
    with pytest.raises(VerificationError, match="do not compute the same"):
        measure_folder(folder, 1, {})
    (folder / OPTIMIZED_NAME).unlink()
    with pytest.raises(UsageError, match=r"(?s)lacks a file.*--onnx-runtime-optimized"):
        measure_folder(folder, 1, {})
