"""What the paper varies in training: each option does what it names, resumes bit for bit, and freezes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from l4q.cli_train import command as train_command
from l4q.cli_train import parse_options
from l4q.config import GridLearning, QuantConfig
from l4q.errors import UsageError
from l4q.linear import L4QLinear
from l4q.run_folder import RunFolder
from l4q.train import train
from l4q.train_options import OptimOptions, TrainOptions
from l4q.train_state import TRAINABLE, state_folder
from l4q.trainer import parameter_groups
from runtime_tests.test_linear import clipped_layer, gradients, reference_weight
from runtime_tests.train_runs import (
    Options,
    start_state,
    wrapped_model,
)

# --- gradient scaling -------------------------------------------------------------------------------------------------


def scaled_layer(bits: int, kind: str, learning: GridLearning) -> L4QLinear:
    """`clipped_layer` with another way of learning its grid."""
    source = clipped_layer(bits, kind)
    layer = L4QLinear(source.weight, None, source.quant, source.lora, learning=learning)  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    return layer


def lsq_reference(layer: L4QLinear, factor: float) -> torch.Tensor:
    """The reference weight with LSQ's own gradient scaling written out on s and b: x * g + detach(x - x * g)."""
    scaled = {
        name: value * factor + (value - value * factor).detach()
        for name, value in (("scales", layer.scales), ("offsets", layer.offsets))
    }
    parts = {name: getattr(layer, name) for name in ("quant", "lora", "weight", "lora_A", "lora_B")}
    return reference_weight(SimpleNamespace(**parts, **scaled))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_lsq_gradients_equal_autograd(bits: int, kind: str) -> None:
    """With gradient_scale lsq all gradients equal autograd's through LSQ's formula, g = 1 / sqrt(32 * Q_P)."""
    layer = scaled_layer(bits, kind, GridLearning(gradient_scale="lsq"))
    x = torch.randn(7, 64, dtype=torch.float64)
    factor = 1 / (32 * (2 ** (bits - 1) - 1)) ** 0.5
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda value: F.linear(value, lsq_reference(layer, factor)))
    plain = gradients(layer, x, lambda value: F.linear(value, reference_weight(layer)))
    assert set(ours) == set(theirs) >= {"x", "lora_A", "lora_B", "scales"}
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).abs().max()) <= 1e-12 * max(1.0, float(theirs[name].abs().max())), name
    assert float((ours["scales"] - plain["scales"]).abs().max()) > 1e-3  # the comparison notices a missing factor
    assert torch.allclose(ours["lora_A"], plain["lora_A"], rtol=0, atol=1e-12)


def test_lsq_factor_of_one_group_per_row() -> None:
    """N is the number of weights that share a scale: the whole row for group_size -1."""
    quant = QuantConfig(bits=4, group_size=-1)
    assert GridLearning(gradient_scale="lsq").gradient_factor(quant, 1000) == pytest.approx((1000 * 7) ** -0.5)
    assert GridLearning().gradient_factor(quant, 1000) == 1.0


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_lsq_scaling_freezes_exactly(kind: str) -> None:
    """The scaled layer computes and freezes to the same bits as the plain one."""
    plain = clipped_layer(4, kind, dtype=torch.float32)
    layer = L4QLinear(plain.weight, None, plain.quant, plain.lora, learning=GridLearning(gradient_scale="lsq"))  # type: ignore[arg-type]
    layer.load_state_dict(plain.state_dict())
    frozen = layer.freeze().dequantize()
    assert np.array_equal(frozen.view(np.uint32), plain.freeze().dequantize().view(np.uint32))
    assert torch.equal(layer(torch.eye(64)).T, torch.from_numpy(frozen))


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("offsets", [True, False])
def test_only_what_trains_moves(train_options: Options, scales: bool, offsets: bool) -> None:
    """S only, b only, both or neither: the others keep their start, asymm's offsets included, and have no group."""
    learning = GridLearning(train_scales=scales, train_offsets=offsets)
    made = train_options(steps=3, init="asymm", learning=learning)
    train(made)
    first, last = (load_file(state_folder(made.out, 3) / TRAINABLE), start_state(made))
    for name, tensor in first.items():
        kind = name.rpartition(".")[2]
        trains = {"scales": scales, "offsets": offsets}.get(kind, True)
        assert torch.equal(tensor, last[name]) is not trains, name


def test_groups_follow_what_trains(train_options: Options) -> None:
    """The optimizer has one group per kind that trains; zero_point none never has one of offsets."""
    for kind, learning, names in (
        ("integer", GridLearning(), {"lora", "scales", "offsets"}),
        ("integer", GridLearning(train_scales=False), {"lora", "offsets"}),
        ("none", GridLearning(), {"lora", "scales"}),
        ("float", GridLearning(train_scales=False, train_offsets=False), {"lora"}),
    ):
        made = train_options(quant=QuantConfig(zero_point=kind), learning=learning)  # type: ignore[arg-type]
        assert {group["name"] for group in parameter_groups(wrapped_model(made), OptimOptions())} == names


# --- LoRA dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_dropout_acts_in_training_only(warm: bool) -> None:
    """Training forwards differ from one another; evaluation and the frozen weight are those without dropout."""
    source = clipped_layer(4, "integer", dtype=torch.float32)
    layer = L4QLinear(source.weight, None, source.quant, replace(source.lora, dropout=0.5))  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    frozen = layer.freeze().dequantize()
    if warm:
        layer.start_warmup()
        source.start_warmup()
    x = torch.eye(64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer(x).T, torch.from_numpy(frozen)) is not warm
    assert np.array_equal(frozen.view(np.uint32), source_frozen(source).view(np.uint32))


def source_frozen(layer: L4QLinear) -> np.ndarray:
    """The dequantized weight, also of a layer that was put into its warm-up."""
    layer.quantizing = True
    return layer.freeze().dequantize()


def test_dropout_keeps_the_mean() -> None:
    """Dropped entries of A are made up for: the mean of many warm-up forwards is the one without dropout."""
    source = clipped_layer(4, "none", dtype=torch.float32)
    layer = L4QLinear(source.weight, None, source.quant, replace(source.lora, dropout=0.25))  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    layer.start_warmup()
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    expected = layer.eval()(x)
    low_rank = (expected - F.linear(x, layer.weight)).norm()  # type: ignore[arg-type]
    assert (mean - expected).norm() < 0.2 * low_rank


# --- the command line -------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> TrainOptions:
    """The options that `l4q-train` makes of its arguments."""
    fixed = ["model", "--data", __file__, "--out", "run"]
    context = train_command.make_context("l4q-train", [*fixed, *arguments])
    values = dict(context.params)
    values.pop("as_json")
    return parse_options(values)


def test_defaults_are_the_documented_ones() -> None:
    """The command line's defaults are the dataclasses': the paper's, but for the start."""
    made = parsed()
    assert made == TrainOptions(model="model", data=(Path(__file__),), out=Path("run"))
    assert (made.start_init, made.calibration, parsed("--fsdp").start_init) == ("calibrated", 16, "l4q")
    assert (made.learning, made.lora_warmup_steps, made.optim.state) == (GridLearning(), 0, "float32")
    assert made.learning == GridLearning(train_scales=True, train_offsets=True, gradient_scale="none")


def test_flags_reach_their_options() -> None:
    """Every flag of this file arrives where it belongs."""
    made = parsed(
        *("--init", "asymm", "--zero-point", "float", "--no-train-scales", "--no-train-offsets"),
        *("--gradient-scale", "lsq", "--lora-warmup-steps", "7", "--optim-state", "bfloat16", "--dropout", "0.05"),
        *("--distill", "0.5"),
    )
    assert made.learning == GridLearning(train_scales=False, train_offsets=False, gradient_scale="lsq")
    assert (made.init, made.lora_warmup_steps, made.optim.state, made.lora.dropout) == ("asymm", 7, "bfloat16", 0.05)
    assert made.distill == 0.5
    with pytest.raises(UsageError, match="needs offsets"):
        parsed("--init", "asymm")


def test_options_survive_their_record(train_options: Options) -> None:
    """from_dict(to_dict(options)) == options; older records get defaults; unknown and missing options are refused."""
    made = train_options(init="asymm", learning=GridLearning(train_scales=False), optim=OptimOptions(state="bfloat16"))
    record = made.to_dict()
    assert TrainOptions.from_dict(record) == made
    del record["learning"]
    assert TrainOptions.from_dict(record) == replace(made, learning=GridLearning())
    with pytest.raises(UsageError, match=r"(?s)shape_of_water.*version of l4q"):
        TrainOptions.from_dict({**record, "shape_of_water": 1})
    with pytest.raises(UsageError, match="model"):
        TrainOptions.from_dict({key: value for key, value in record.items() if key != "model"})


def test_runs_of_older_versions_resume(train_options: Options) -> None:
    """A record without the newer options is a run with their defaults, and is refused with other values."""
    made, facts = train_options(), {"sha256": "0"}
    run = RunFolder(made.out)
    run.start(made, facts)
    record = json.loads(run.config.read_text())
    for section in (record["options"], record["identity"]):
        for name in ("init", "learning", "lora_warmup_steps", "distill"):
            del section[name]
        del section["optim"]["state"]
    run.config.write_text(json.dumps(record))
    run.check(replace(made, resume=True), facts)
    for changes in ({"init": "lsq+"}, {"lora_warmup_steps": 2}, {"optim": OptimOptions(state="bfloat16")}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            run.check(replace(made, resume=True, **changes), facts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridLearning(gradient_scale="l2"), "gradient_scale"),  # type: ignore[arg-type]
        (lambda: OptimOptions(state="fp4"), "optim_state"),  # type: ignore[arg-type]
    ],
)
def test_unknown_values_are_refused(make: Callable[[], object], message: str) -> None:
    """A value that no option has is refused by the option's name."""
    with pytest.raises(UsageError, match=message):
        make()
