"""A K grid through training, l4q-freeze and l4q-export, on a small llama with a real tokenizer and text."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from exporters.cli import command as export_command
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_train import command as train_command
from l4q.config import QuantConfig
from l4q.model import l4q_layers, load_trainable_state
from l4q.refreeze import FreezeOptions, refreeze
from l4q.state_tensors import saved_tensors
from l4q.train import train
from l4q.train_model import load_model, wrap_model
from l4q.train_options import EvalOptions, TrainOptions
from l4q.train_state import TRAINABLE, list_states
from runtime_tests.random_models import build_model
from runtime_tests.test_gguf_export import wrong_modules
from runtime_tests.test_k_grids import MIXED, Q4_K
from runtime_tests.train_runs import base_options, final_weights, rewind, same_bits, same_checkpoints, write_pairs


@pytest.fixture(scope="module")
def run(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A finished run of 6 steps on q4_k: a random llama, 256 wide, behind glassllm's tokenizer."""
    folder = tmp_path_factory.mktemp("k_runs")
    vocabulary = json.loads((glassllm_dir / "config.json").read_text())["vocab_size"]
    build_model("llama", {**MIXED, "vocab_size": vocabulary}).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(glassllm_dir / name, folder / "model")
    made = replace(
        base_options(glassllm_dir, folder),
        model=str(folder / "model"),
        quant=Q4_K,
        init="asymm",
        leave_dense=False,
        steps=6,
    )
    train(made)
    return made


def test_training_moves_the_grid_and_freezes_it(run: TrainOptions) -> None:
    """Scales and offsets have learned, and RUN/checkpoint holds the trained forward's weights bit for bit."""
    model, _ = load_model(run)
    wrap_model(model, run)
    before = {name: layer.scales.detach().clone() for name, layer in l4q_layers(model)}
    load_trainable_state(model, saved_tensors(list_states(run.out)[-1][1] / TRAINABLE))
    checkpoint = L4QCheckpoint.open(run.out / "checkpoint")
    assert checkpoint.quant == Q4_K
    for name, layer in l4q_layers(model):
        assert (layer.scales != before[name]).double().mean() > 0.5
        assert np.array_equal(checkpoint.quantized(name).dequantize(), layer.quantized_weight().numpy())
        assert checkpoint.info(name).k_grid == (None if name.endswith("o_proj") else "q4_k")


def test_resumed_run_is_the_same(run: TrainOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed after step 3 and resumed, the run ends in the same bits, and its start names the layers off the grid."""
    copy = rewind(run.out, tmp_path / "again", 3)
    with caplog.at_level(logging.INFO, logger="l4q"):
        train(replace(run, out=copy, resume=True))
    assert same_bits(final_weights(copy), final_weights(run.out))
    assert same_checkpoints(copy, run.out)
    assert "2 of 14 layers, for example model.layers.0.self_attn.o_proj, are on the fp16 grid" in caplog.text


def test_export_and_refreeze(run: TrainOptions, glassllm_dir: Path, tmp_path: Path) -> None:
    """l4q-export writes GGUF and ONNX exactly, and refuses GPTQ until l4q-freeze has left the K grid."""
    source = str(run.out / "checkpoint")
    result = CliRunner().invoke(
        export_command, [source, "--to", "gguf", "--to", "onnx", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert wrong_modules(L4QCheckpoint.open(source), tmp_path / "out" / "gguf") == []
    evaluation = EvalOptions(text=glassllm_dir.parent / "text" / "heldout.txt", window=64, windows=2)
    options = FreezeOptions(run=run.out, out=tmp_path / "integer", zero_point="integer", evaluation=evaluation)
    report = refreeze(options)
    assert report["grid"]["frozen"]["scale_grid"] == "fp16_s7"
    assert 0 < report["weight_loss"][-1]["change"] < 0.2
    assert set(report["perplexity"]) == {"trained", "frozen"}
    frozen = str(tmp_path / "integer")
    result = CliRunner().invoke(export_command, [frozen, "--to", "gptq", "--out", str(tmp_path / "gptq")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale-grid", "q4_k"), "--bits 4 --group-size 32 --zero-point float"),
        (("--scale-grid", "q3_k", "--bits", "3", "--group-size", "16"), "fits none of the layers"),
    ],
)
def test_refusals_of_the_command(glassllm_dir: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """Another group size, or a model no row of which holds 256 columns, ends with what would work."""
    data = write_pairs(glassllm_dir, tmp_path / "pairs.jsonl")
    common: list[Any] = [glassllm_dir, "--data", data, "--out", tmp_path / "run", "--target-modules", "q_proj"]
    result = CliRunner().invoke(train_command, [str(part) for part in (*common, "--steps", 1, *arguments)])
    assert message in str(result.exception)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_config_of_a_k_grid_reads_back() -> None:
    """to_dict and from_dict agree, and a grid knows what a narrow layer gets."""
    assert QuantConfig.from_dict(Q4_K.to_dict()) == Q4_K
    assert Q4_K.for_layer(576) == QuantConfig(group_size=32, zero_point="float")
    assert Q4_K.for_layer(1536) == Q4_K
