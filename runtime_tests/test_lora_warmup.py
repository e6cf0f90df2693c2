"""LoRA warm-up: plain LoRA first, then quantization from the merged weight, resumed bit for bit in either phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.init import init_qparams
from l4q.linear import L4QLinear
from l4q.train import train
from l4q.train_options import TrainOptions
from l4q.train_state import TRAINABLE, state_folder
from runtime_tests.test_linear import clipped_layer, gradients
from runtime_tests.train_runs import (
    Options,
    final_weights,
    metrics,
    rewind,
    same_bits,
    same_checkpoints,
    start_state,
)

WARMUP = 4


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_warmup_is_plain_lora(kind: str) -> None:
    """In the warm-up forward and gradients are those of x (W0 + scaling B A)^T, and the grid gets none."""
    layer = clipped_layer(4, kind)
    layer.start_warmup()
    x = torch.randn(7, 64, dtype=torch.float64)

    def merged(value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A)  # type: ignore[operator]

    ours, theirs = gradients(layer, x, layer), gradients(layer, x, merged)
    assert torch.allclose(layer(x), merged(x), rtol=0, atol=1e-12)
    for name in ("x", "lora_A", "lora_B"):
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-11)
    assert ours["scales"] is None
    assert layer.offsets.grad is None


@pytest.mark.parametrize("init", ["l4q", "lsq+", "symm", "asymm"])
def test_quantization_starts_from_the_merged_weight(init: Any) -> None:
    """start_quantization gives the s and b of W0 + scaling B A, and from then on frozen == forward bit for bit."""
    torch.manual_seed(0)
    quant = QuantConfig(group_size=32, zero_point="integer")
    layer = L4QLinear.from_linear(nn.Linear(96, 2800, bias=False), quant, LoraConfig(rank=5), init=init)
    layer.start_warmup()
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.05)
    before = layer.scales.clone()
    with pytest.raises(UsageError, match=r"(?s)warm-up.*start_quantization"):
        layer.freeze()
    layer.start_quantization()
    merged = layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A  # type: ignore[operator]
    start = init_qparams(merged.detach(), quant, init)
    # the product is made in blocks of rows, which may differ in the last bit
    assert torch.allclose(layer.scales, start.scales, rtol=2**-6, atol=0)
    assert (layer.scales == start.scales).double().mean() > 0.99
    assert (layer.scales == before).double().mean() < 0.5
    frozen = layer.freeze().dequantize()
    assert torch.equal(layer(torch.eye(96)).T, torch.from_numpy(frozen))


@pytest.fixture(scope="module")
def warmed(train_base: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A run of 10 steps whose first 4 train plain LoRA, with a state of every step."""
    made = replace(
        train_base, out=tmp_path_factory.mktemp("warm") / "run", lora_warmup_steps=WARMUP, save_every=1, init="l4q"
    )
    train(made)
    return made


def test_warmup_run_changes_phase_once(warmed: TrainOptions) -> None:
    """The grid is untouched through the warm-up and starts anew after it; A and B train all along."""
    states = [load_file(state_folder(warmed.out, step) / TRAINABLE) for step in (1, WARMUP, WARMUP + 1)]
    start = start_state(warmed)
    for name, tensor in start.items():
        kind = name.rpartition(".")[2]
        if kind in ("scales", "offsets"):
            assert torch.equal(tensor, states[0][name])
            assert torch.equal(tensor, states[1][name])
            assert not torch.equal(tensor, states[2][name])
        elif kind == "lora_B":
            assert len({state[name].sum().item() for state in states}) == 3


def test_warmup_starts_at_the_base_models_loss(train_options: Options, warmed: TrainOptions) -> None:
    """The first loss of a warm-up is the unquantized model's, below that of a run which quantizes at once."""
    plain = train_options(steps=1, quant=QuantConfig(bits=2))
    warm = replace(warmed, out=plain.out.with_name("warm"), steps=2, lora_warmup_steps=1, quant=plain.quant)
    train(plain)
    train(warm)
    losses = [metrics(run.out)[0]["loss"] for run in (warmed, warm, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] > 1.01 * losses[1]  # 2 bits cost this small model 2 % of its loss


@pytest.mark.parametrize("step", [WARMUP - 1, WARMUP, WARMUP + 1])
def test_warmup_resumes_bit_equal(warmed: TrainOptions, tmp_path: Path, step: int) -> None:
    """Resuming inside the warm-up, right at its end, and after it ends with the uninterrupted run's bits."""
    resumed = rewind(warmed.out, tmp_path / "resumed", step)
    train(replace(warmed, out=resumed, resume=True))
    assert same_bits(final_weights(warmed.out), final_weights(resumed))
    assert same_checkpoints(warmed.out, resumed)


def test_forgetting_the_phase_is_noticed(warmed: TrainOptions, tmp_path: Path) -> None:
    """The twin: a resumed run that starts quantization anew, one step late, ends elsewhere."""
    resumed = rewind(warmed.out, tmp_path / "resumed", WARMUP)
    config = (resumed / "config.json").read_text()
    (resumed / "config.json").write_text(config.replace(f'"lora_warmup_steps": {WARMUP}', '"lora_warmup_steps": 5'))
    train(replace(warmed, out=resumed, resume=True, lora_warmup_steps=WARMUP + 1))
    assert not same_bits(final_weights(warmed.out), final_weights(resumed))


def test_warmup_must_end(train_options: Options) -> None:
    """A warm-up as long as the run is refused, when the options are made or when the steps are known."""
    with pytest.raises(UsageError, match="lora_warmup_steps"):
        train_options(steps=4, lora_warmup_steps=4)
    with pytest.raises(UsageError, match=r"(?s)leaves no step.*fewer than the run's 6 steps"):
        train(train_options(steps=None, epochs=1.0, lora_warmup_steps=6))
