"""The comparison after fine-tuning runs end to end, and its figures are those of the blocks."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tools.compare_trained import BLOCKS, command

# what ggml's block types cost: bytes per block of 32 weights
BITS = {"Q4_0": 18 / 4, "Q4_1": 20 / 4, "Q5_0": 22 / 4}


def test_rows_of_a_real_model() -> None:
    """Two steps on glassllm: sizes are the block types', K types fall back, more bits lose less."""
    options = ["--model", "glassllm", "--steps", "2", "--windows", "2", "--grids", "fp16 none", "--json"]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    plain, tuned, *quantized, ours = rows
    assert plain["bits"] is None
    assert tuned["perplexity"] != plain["perplexity"]
    assert len(quantized) == len(BLOCKS)
    for block, row in zip(BLOCKS, quantized, strict=True):
        stored = {"Q4_K": "Q4_1", "Q3_K": "Q4_0"}.get(block, block)  # rows of 128 columns fill no superblock
        assert row["blocks"].endswith(stored)
        assert row["bits"] == pytest.approx(BITS[stored])
    by_block = {row["blocks"].split()[-1]: row["perplexity"] for row in quantized}
    assert len(set(by_block.values())) == len(by_block)
    assert abs(by_block["Q5_0"] - tuned["perplexity"]) < abs(by_block["Q4_0"] - tuned["perplexity"])
    assert ours["blocks"].endswith("Q4_0")
    assert ours["bits"] == pytest.approx(BITS["Q4_0"])


def test_an_unknown_grid_lists_the_known_ones() -> None:
    """A misspelt grid is a usage error."""
    result = CliRunner().invoke(command, ["--grids", "q9_k"])
    assert result.exit_code == 2
    assert "q4_k float" in result.output
