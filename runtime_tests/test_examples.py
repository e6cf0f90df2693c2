"""The programs of tools/examples run and do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from l4q.checkpoint import L4QCheckpoint
from runtime_tests.import_sources import UP, exported, flip, make_source
from runtime_tests.train_runs import write_pairs
from tools.examples import gptq_to_gguf, train_own_data

TENSOR = "blk.0.ffn_up.weight"  # `UP`; llama.cpp keeps its rows in their order


def decoded(folder: Path) -> np.ndarray:
    """One tensor of an exported GGUF file, by gguf's own decoder."""
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    tensor = next(tensor for tensor in reader.tensors if tensor.name == TENSOR)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_training_on_own_data(glassllm_dir: Path, tmp_path: Path) -> None:
    """The program prints three perplexities and leaves a run and a GGUF file of its weights."""
    data = write_pairs(glassllm_dir, tmp_path / "pairs.jsonl")
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    words = [str(glassllm_dir), str(data), str(text), str(tmp_path / "out"), "--steps", "2", "--max-length", "64"]
    done = CliRunner().invoke(train_own_data.command, words, catch_exceptions=False)
    figures = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("perplexity")]
    assert figures == ["base", "start", "trained"]
    assert "bit-exact: True" in done.output
    checkpoint = L4QCheckpoint.open(tmp_path / "out" / "run" / "checkpoint")
    assert np.array_equal(decoded(tmp_path / "out" / "gguf"), checkpoint.quantized(UP).dequantize())
    assert json.loads((tmp_path / "out" / "run" / "result.json").read_text())["steps"] == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_gptq_becomes_gguf(tmp_path: Path, damaged: bool) -> None:
    """The file holds the GPTQ folder's weights bit for bit; one flipped bit of the folder shows in it."""
    original = make_source(tmp_path / "source", {"bits": 4, "group_size": 32, "zero_point": "none"})
    source = exported(original, "gptq", tmp_path / "gptq")
    if damaged:
        flip(source)
    done = CliRunner().invoke(gptq_to_gguf.command, [str(source), str(tmp_path / "out")], catch_exceptions=False)
    assert f"{len(original.modules)} of {len(original.modules)} layers" in done.stdout
    assert f"{len(original.modules)} x Q4_0" in done.stdout
    same = np.array_equal(decoded(tmp_path / "out" / "gguf"), original.quantized(UP).dequantize())
    assert same != damaged
