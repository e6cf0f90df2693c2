"""The four initialisations of the grid: their equations, what they promise, and that freezing stays exact."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from l4q.config import Init, LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.init import INITIALISATIONS, floor_half, init_qparams
from l4q.linear import L4QLinear
from l4q.quant import grid_params

BITS = (2, 3, 4)
GRIDS = ("fp16", "fp16_s7")
CASES = [(init, kind) for init in get_args(Init) for kind in ("none", "integer", "float")]
CASES.remove(("asymm", "none"))
# Initialisations that promise to clip nothing at the start.
UNCLIPPED = [(init, kind) for init, kind in CASES if init in ("l4q", "asymm")]


def weights(seed: int = 0, shift: float = 0.01) -> torch.Tensor:
    """64 rows of 8 groups of 32 weights, not centred, as real ones are not."""
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 0.03 + shift


def positions(weight: torch.Tensor, quant: QuantConfig, init: Any) -> torch.Tensor:
    """(W - m) / s on the grid that the forward would use, [out, groups, 32]."""
    start = init_qparams(weight, quant, init)
    params = grid_params(start.scales, start.offsets, quant)
    return (weight.view(*start.scales.shape, -1) - params.mins.unsqueeze(-1)) / params.scales.unsqueeze(-1)


def clipped(position: torch.Tensor, quant: QuantConfig) -> float:
    """Share of the weights outside the clamp."""
    return float(((position < 0) | (position > quant.max_code)).double().mean())


def test_every_name_has_an_initialiser() -> None:
    """The option's values and the table's keys are the same."""
    assert (*INITIALISATIONS, "calibrated", "reconstructed") == get_args(Init)


@pytest.mark.parametrize("bits", BITS)
def test_scales_follow_the_equations(bits: int) -> None:
    """Each s is the paper's number, computed here in exact or double precision, to within the scale grid's spacing."""
    weight = weights(bits)
    groups = weight.double().view(64, 8, 32).numpy()
    low, high, q_n, q_p = groups.min(-1), groups.max(-1), 2 ** (bits - 1), 2 ** (bits - 1) - 1
    mean, sigma = groups.mean(-1), groups.std(-1)
    expected = {
        "l4q": np.maximum(np.abs(low / -q_n), np.abs(high / q_p)),
        "lsq+": np.maximum(np.abs(mean - 3 * sigma), np.abs(mean + 3 * sigma)) / q_n,
        "symm": np.abs(groups).max(-1) / q_n,
        "asymm": (high - low) / (q_p + q_n),
    }
    for init, scales in expected.items():
        quant = QuantConfig(bits=bits, group_size=32, zero_point="float")
        start = init_qparams(weight, quant, init)  # type: ignore[arg-type]
        assert np.allclose(start.scales, scales, rtol=2**-9, atol=0), init
        offsets = high - q_p * scales if init == "asymm" else np.zeros_like(scales)
        assert np.allclose(start.offsets, offsets, rtol=0, atol=float(scales.max()) * 2**-7), init


@pytest.mark.parametrize(("init", "kind"), UNCLIPPED)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.2, -0.2])
def test_nothing_is_clipped_where_promised(init: str, kind: Any, bits: int, grid: Any, shift: float) -> None:
    """L4Q's and the asymmetric start leave no weight outside, also where all weights have one sign."""
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind, scale_grid=grid)
    position = positions(weights(bits, shift), quant, init)
    assert position.min() >= 0
    assert position.max() <= quant.max_code


@pytest.mark.parametrize("init", ["lsq+", "symm"])
@pytest.mark.parametrize("bits", BITS)
def test_the_others_clip(init: str, bits: int) -> None:
    """The twin: LSQ+ and Symm do clip, so the test above can fail; and they clip the paper's way, only extremes."""
    quant = QuantConfig(bits=bits, group_size=32)
    assert 0 < clipped(positions(weights(bits), quant, init), quant) < 0.25


@pytest.mark.parametrize("kind", ["integer", "float"])
@pytest.mark.parametrize("bits", BITS)
def test_asymm_wastes_fewer_codes(kind: Any, bits: int) -> None:
    """With offsets, the asymmetric start has smaller steps than L4Q's, and no integer zero-point does better."""
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind, scale_grid="fp16")
    weight = weights(bits)
    ours = init_qparams(weight, quant, "asymm").scales
    assert torch.all(ours <= init_qparams(weight, quant, "l4q").scales)
    assert ours.mean() < 0.95 * init_qparams(weight, quant, "l4q").scales.mean()
    if kind == "integer":
        groups = weight.view(64, 8, 32)
        for zero in range(1, quant.max_code):
            needed = torch.maximum(groups.amin(-1) / -zero, groups.amax(-1) / (quant.max_code - zero))
            assert torch.all(ours <= needed * (1 + 2**-10))


@pytest.mark.parametrize("init", ["l4q", "asymm"])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_groups(init: Any, value: float) -> None:
    """A group of equal weights, zeros included, gets positive finite scales and loses nothing to clipping."""
    weight = torch.full((2, 64), value)
    quant = QuantConfig(group_size=32, zero_point="integer")
    position = positions(weight, quant, init)
    assert torch.isfinite(position).all()
    assert clipped(position, quant) == 0


@given(st.floats(-60000, 60000, width=32))
def test_floor_half_is_the_floor(value: float) -> None:
    """The result is an fp16 number, not above the value, and the next one is."""
    number = torch.tensor([value], dtype=torch.float32)
    floor = floor_half(number)
    assert torch.equal(floor.half().float(), floor)
    assert floor <= number
    assert np.nextafter(floor.half().numpy(), np.float16(np.inf)) > np.float32(value)


@pytest.mark.parametrize(("init", "kind"), CASES)
@pytest.mark.parametrize("bits", BITS)
def test_frozen_weight_is_the_forward_bit_for_bit(init: Any, kind: Any, bits: int) -> None:
    """For every start: dequantize(freeze(layer)) is the weight the forward multiplied with, before and after moving."""
    torch.manual_seed(bits)
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind)
    layer = L4QLinear.from_linear(nn.Linear(96, 2800, bias=False), quant, LoraConfig(rank=5), init=init)
    for _ in range(2):
        forward = layer(torch.eye(96)).T.detach()  # multiplying by 1 and adding zeros changes no bit
        frozen = layer.freeze().dequantize()
        assert np.array_equal(frozen.view(np.uint32), layer.quantized_weight().numpy().view(np.uint32))
        assert torch.equal(forward, torch.from_numpy(frozen))
        with torch.no_grad():
            layer.lora_B.normal_(0, 0.02)
            layer.scales.mul_(0.6 + 0.5 * torch.rand_like(layer.scales))
    frozen[3, 5] += 1e-6
    assert not torch.equal(forward, torch.from_numpy(frozen))


@pytest.mark.parametrize(("init", "kind"), UNCLIPPED)
def test_rounding_error_is_at_most_half_a_step(init: Any, kind: Any) -> None:
    """An unclipped start puts every weight within half a step of its value."""
    quant = QuantConfig(group_size=32, zero_point=kind)
    linear = nn.Linear(96, 64, bias=False)
    layer = L4QLinear.from_linear(linear, quant, LoraConfig(), init=init)
    error = (layer.quantized_weight() - linear.weight).abs().view(64, 3, 32).amax(-1)
    assert torch.all(error <= layer.grid().scales * (0.5 + 1e-4))
    assert error.max() > 0


@pytest.mark.parametrize(("init", "kind", "message"), [("asymm", "none", "needs offsets"), ("kmeans", "float", "lsq")])
def test_impossible_starts_are_refused(init: Any, kind: Any, message: str) -> None:
    """An unknown name lists the known ones; asymm without offsets says what to use instead."""
    with pytest.raises(UsageError, match=f"(?s){message}"):
        init_qparams(weights(), QuantConfig(zero_point=kind), init)
