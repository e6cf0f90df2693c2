"""A W0 that moves with its grid: codes stay when s and b change, gradients are the definition's, runs resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l4q.base import MovingBase, dense_base
from l4q.config import GridLearning, LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.init import init_qparams
from l4q.kernels.fused import FusedKernels
from l4q.kernels.numba_kernels import NumbaPasses
from l4q.kernels.verify import compare, example
from l4q.linear import L4QLinear
from l4q.quant import grid_params
from l4q.refreeze import FreezeOptions, refreeze
from l4q.train import train
from runtime_tests.test_reconstruct import GRID
from runtime_tests.test_refreeze import same_files
from runtime_tests.train_runs import Options, final_weights, rewind, same_bits, same_checkpoints

KINDS = ("none", "integer", "float")


def settled(kind: Any, *, move: bool = True, kernels: Any = "auto", settle: float = 1.0) -> L4QLinear:
    """[48, 64] in groups of 32, on its codes, with an update that changes some of them."""
    quant = QuantConfig(bits=3, group_size=32, zero_point=kind)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 64, generator=generator)
    start = init_qparams(weight, quant)
    params = grid_params(start.scales, start.offsets, quant)
    s, m = (part.repeat_interleave(32, 1) for part in (params.scales, params.mins))
    codes = torch.clip(torch.round((weight - m) / s), 0, quant.max_code)
    weight = weight.lerp(codes * s + m, settle)
    learning = GridLearning(move_base=move)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data.copy_(weight)
    layer = L4QLinear.from_linear(
        linear, quant, LoraConfig(rank=4, alpha=8), learning=learning, qparams=start, kernels=kernels
    )
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.05, generator=generator)
    return layer


def defined(layer: L4QLinear, x: torch.Tensor, positions: torch.Tensor, *, base: bool = True) -> torch.Tensor:
    """The output by the definition: W0 = positions * s + m, each operation recorded by autograd."""
    params = grid_params(layer.scales, layer.offsets, layer.quant)
    s, m = (part.repeat_interleave(32, 1) for part in (params.scales, params.mins))
    moving = positions * s + m
    weight = (moving if base else moving.detach()) + layer.lora.scaling * layer.lora_B @ layer.lora_A
    w = ((weight - m) / s).clamp(0, layer.quant.max_code)
    return F.linear(x, (w + (w.round() - w).detach()) * s + m)


def positions_of(layer: L4QLinear) -> torch.Tensor:
    """Where W0 lies on the grid that the layer starts with."""
    params = grid_params(layer.scales.detach(), layer.offsets.detach(), layer.quant)
    s, m = (part.repeat_interleave(32, 1) for part in (params.scales, params.mins))
    return (dense_base(layer.weight) - m) / s


@pytest.mark.parametrize("settle", [0.0, 1.0])
@pytest.mark.parametrize("kernels", ["eager", "numba"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_definition(kind: Any, kernels: Any, settle: float) -> None:
    """Of A, B, s and b, also after the grid has moved; those that a W0 that stays would have are others."""
    layer = settled(kind, kernels=kernels, settle=settle)
    positions = positions_of(layer)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        layer.scales.mul_(1.07)
        layer.offsets.add_(0.02 * layer.scales)
    trained = [each for each in layer.parameters() if each.requires_grad]
    given, wanted, without = layer(x), defined(layer, x, positions), defined(layer, x, positions, base=False)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output.square().mean(), trained))

    ours = gradients(given)
    assert len(ours) == (3 if kind == "none" else 4)
    near = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, gradients(wanted), strict=True)]
    far = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, gradients(without), strict=True)]
    assert max(near) < 1e-4
    assert max(far) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_agree(kind: Any) -> None:
    """Compiled kernels and eager ones, W_q bit for bit; with another origin they do not."""
    problem, x, grad_y = example(QuantConfig(bits=3, group_size=32, zero_point=kind), torch.float32, shape=(300, 480))
    s, m = problem.params.scales, problem.params.mins
    base = MovingBase(kept=problem.weight, origin_scales=s * 0.9, origin_mins=m * 1.1, scales=s, mins=m)  # type: ignore[arg-type]
    moved = problem._replace(weight=base)
    numba = FusedKernels(NumbaPasses())
    assert compare(numba, moved, x, grad_y) is None
    assert not torch.equal(numba.quantize(moved, torch.float32), numba.quantize(problem, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_when_the_grid_moves(kind: Any) -> None:
    """Scales a third larger change every weight and no code; what is frozen is what the forward multiplies."""
    layer, other = settled(kind), settled(kind, move=False)
    with torch.no_grad():
        for each in (layer, other):
            each.lora_B.zero_()
    before = layer.freeze().codes
    assert (before == other.freeze().codes).all()
    with torch.no_grad():
        for each in (layer, other):
            each.scales.mul_(1.33)
            each.offsets.mul_(1.33)
    frozen = layer.freeze()
    assert (frozen.codes == before).all()
    assert not (other.freeze().codes == before).all()
    assert torch.equal(torch.from_numpy(frozen.dequantize()), layer.quantized_weight())
    assert torch.equal(layer(torch.eye(64)), layer.quantized_weight().T)


def test_a_new_kind_of_grid_codes_the_moved_weight() -> None:
    """Re-coded from where W0 is after training, not from where it began."""
    layer = settled("float")
    with torch.no_grad():
        layer.scales.mul_(1.33)
        layer.offsets.mul_(1.33)
    moved = layer.base()
    assert isinstance(moved, MovingBase)
    expected = moved.dequantize()
    layer.regrid(replace(layer.quant, zero_point="integer"))
    assert torch.equal(dense_base(layer.weight), expected)
    assert layer.base() is layer.weight


def test_it_needs_a_grid_that_was_found_with_w0(train_options: Options) -> None:
    """A layer whose grid is initialised, and a run with another start, are refused; nothing is trained."""
    with pytest.raises(UsageError, match="found with"):
        L4QLinear.from_linear(nn.Linear(64, 8), QuantConfig(), LoraConfig(), learning=GridLearning(move_base=True))
    with pytest.raises(UsageError, match="reconstructed"):
        train_options(learning=GridLearning(move_base=True))


@pytest.mark.parametrize("kind", ["integer", "float"])
def test_a_run_resumes_bit_equal_and_freezes_again(train_options: Options, tmp_path: Path, kind: Any) -> None:
    """Killed and resumed it ends with the same bits; frozen again, also onto other zero-points. If W0 stays, others."""
    made = train_options(
        init="reconstructed",
        quant=replace(GRID, zero_point=kind),
        learning=GridLearning(move_base=True),
        calibration=6,
        reconstruct_epochs=1,
        reconstruct_settle=1.0,
        steps=5,
    )
    train(made)
    resumed = rewind(made.out, tmp_path / "resumed", 3)
    train(replace(made, out=resumed, resume=True))
    assert same_bits(final_weights(made.out), final_weights(resumed))
    assert same_checkpoints(made.out, resumed)
    refreeze(FreezeOptions(run=made.out, out=tmp_path / "again"))
    assert same_files(tmp_path / "again", made.out / "checkpoint")
    train(replace(made, out=tmp_path / "stays", learning=GridLearning()))
    assert not same_bits(final_weights(made.out), final_weights(tmp_path / "stays"))
    if kind == "float":
        losses = refreeze(FreezeOptions(run=made.out, out=tmp_path / "integer", zero_point="integer"))
        assert losses
