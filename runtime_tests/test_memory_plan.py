"""The memory plan: its constants are what the layer really allocates, and the document holds its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UsageError
from tools import memory_formula as plan
from tools.memory_measure import LayerShape, LiveBytes, block_saved, layer_transient, loss_peak, parameter_bytes
from tools.memory_plan import END, START, command, tables

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/scaling.md"
SHAPES = (LayerShape(hidden=256, ffn=512, kv=128), LayerShape(hidden=512, ffn=1024, kv=512))


def model_of(shape: LayerShape) -> plan.ModelShape:
    """A one-block model of the plan with the sizes that are measured."""
    sizes = {"hidden": shape.hidden, "ffn": shape.ffn, "kv": shape.kv, "heads": shape.hidden // 64}
    return plan.ModelShape(layers=1, vocabulary=1000, tied=False, **sizes)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_bytes_are_measured(shape: LayerShape, zero_point: ZeroPoint) -> None:
    """What a block keeps for backward is the formula's number to the byte, and no other size gives that number."""
    measured = block_saved(shape, QuantConfig(zero_point=zero_point), tokens=96)
    setting = plan.Setting(tokens=96, zero_point=zero_point)
    assert plan.saved(model_of(shape), setting) == measured
    assert plan.saved(model_of(replace(shape, ffn=shape.ffn + 64)), setting) != measured
    assert plan.saved(model_of(shape), replace(setting, tokens=97)) != measured


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_parameter_bytes_are_measured(zero_point: ZeroPoint) -> None:
    """Frozen and trainable bytes of a block are the formula's, whether offsets train or not."""
    shape, setting = SHAPES[0], plan.Setting(rank=8, zero_point=zero_point)
    frozen, trainable = parameter_bytes(shape, QuantConfig(zero_point=zero_point), rank=8)
    planned, numbers, _ = plan.block_parameters(model_of(shape), setting)
    assert (planned, 4 * numbers) == (frozen, trainable)
    assert plan.block_parameters(model_of(shape), replace(setting, rank=9))[1] != numbers


def test_transients_are_measured() -> None:
    """The bytes per weight of one linear's forward and backward, and per logit of the loss, are the plan's."""
    forward, backward = layer_transient((512, 1024), QuantConfig(zero_point="float"))
    assert forward == pytest.approx(plan.FORWARD_TRANSIENT, rel=0.02)
    assert backward == pytest.approx(plan.BACKWARD_TRANSIENT, rel=0.02)
    assert loss_peak(64, 2000) == pytest.approx(plan.LOSS_PER_LOGIT, rel=0.001)


def test_live_bytes_see_frees() -> None:
    """The counter follows storages, not tensors: views are free, a dropped tensor is gone, a second one adds."""
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[10:].reshape(-1)
        assert (live.now, live.peak) == (4000, 4000)
        b = a + 1
        del a, view
        assert (live.now, live.peak) == (4000, 8000)
        del b
    assert (live.now, live.peak) == (0, 8000)


def test_sharding_divides_what_it_should() -> None:
    """FSDP2 divides parameters and moments by the GPUs and leaves activations; DDP divides nothing."""
    model = plan.MODELS["7B"]
    one, four = (plan.memory(model, plan.Setting(mode="fsdp", gpus=count)) for count in (2, 8))
    assert (one.frozen, one.trainable) == (4 * four.frozen, 4 * four.trainable)
    assert one.activations == four.activations
    copies = [plan.memory(model, plan.Setting(gpus=count)) for count in (2, 8)]
    assert copies[0] == copies[1]


def test_document_holds_the_current_tables(tmp_path: Path) -> None:
    """docs/scaling.md was written by the tool as it is now; an older table would be replaced."""
    text = DOCUMENT.read_text(encoding="utf-8")
    current = "\n".join(tables(plan.MODELS, plan.Setting(), (1, 2, 4, 8)))
    assert f"{START}\n\n{current}\n\n{END}" in text
    copy = tmp_path / "scaling.md"
    copy.write_text(text.replace("13B", "12B"), encoding="utf-8")
    assert CliRunner().invoke(command, ["--write", str(copy)]).exit_code == 0
    assert current in copy.read_text(encoding="utf-8")


def test_any_config_is_planned(tmp_path: Path) -> None:
    """A config.json gives the numbers of its sizes; one that lacks a size is refused."""
    values = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "num_hidden_layers": 32}))
    assert plan.ModelShape.from_config(path) == plan.MODELS["7B"]
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="num_hidden_layers"):
        plan.ModelShape.from_config(path)
