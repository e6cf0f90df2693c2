"""The benchmark of freezing: it freezes the whole model, and the last line has its shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from l4q.checkpoint import L4QCheckpoint
from tools.bench_export_models import MODELS
from tools.bench_freeze import command, freeze_repeatedly, random_model

MODEL = MODELS["tiny"]


def test_it_freezes_every_linear_of_the_shapes(tmp_path: Path) -> None:
    """The folder holds all modules, and its weights are near the model's, which are random and not constant."""
    costs, copies = freeze_repeatedly("tiny", tmp_path / "out", 2)
    assert len(costs) == len(copies) == 2
    assert costs[0].nbytes == costs[1].nbytes > MODEL.linear_weights // 2
    opened, model = L4QCheckpoint.open(tmp_path / "out"), random_model(MODEL)
    assert len(opened.modules) == MODEL.layers * len(MODEL.linears)
    for name in opened.modules:
        weight = model.get_submodule(name).weight.float()
        frozen = torch.from_numpy(opened.quantized(name).dequantize())
        error = (frozen - weight).norm() / weight.norm()
        assert 0 < error < 0.15, name
        assert (frozen.flip(0) - weight).norm() > weight.norm(), name


def test_the_last_line_is_one_json_object(tmp_path: Path) -> None:
    """And nothing is left on the disk."""
    done = CliRunner().invoke(
        command, ["--model", "tiny", "--repetitions", "1", "--scratch", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"wall_vs_cp", "peak_mib", "mweights_per_s"}
    assert not any(tmp_path.iterdir())
