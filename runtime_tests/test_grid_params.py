"""s, b, m and z of every grid against NumPy, element by element, with the gradients of straight-through rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from l4q.config import QuantConfig
from l4q.k_grids import K_GRIDS
from l4q.quant import SCALE_MAX, SCALE_MIN, GridParams, ceil_scales, grid_params, snap_mins, snap_scales

FLOAT16_MAX = 65504.0


def trained(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [3, 16] as training leaves them: off every grid, some out of range."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(3, 16, generator=generator) * 0.02 + 1e-3
    offsets = torch.randn(3, 16, generator=generator) * scales * 4
    scales[0, 0], offsets[0, 1], offsets[0, 2] = 1e-9, 1e3, -1e3
    return scales.requires_grad_(), offsets.requires_grad_()


def solved(quant: QuantConfig, seed: int = 0) -> tuple[GridParams, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The grid's parameters, and the fp16 scales and float offsets as NumPy arrays."""
    scales, offsets = trained(seed)
    params = grid_params(scales, offsets, quant)
    return params, params.scales.detach().numpy(), offsets.detach().numpy()


def half(values: Any) -> np.ndarray[Any, Any]:
    """Rounded to fp16 and back."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric(bits: int) -> None:
    """Z is the midpoint everywhere and m its multiple of the fp16 scale."""
    params, scales, _ = solved(QuantConfig(bits=bits, scale_grid="fp16"))
    middle = 2 ** (bits - 1)
    assert np.array_equal(scales, half(np.clip(trained()[0].detach().numpy(), SCALE_MIN, SCALE_MAX)))
    assert np.array_equal(params.zeros.detach().numpy(), np.full_like(scales, middle))
    assert np.array_equal(params.mins.detach().numpy(), -middle * scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer(bits: int) -> None:
    """Z is the nearest whole number of midpoint - b / s within [1, 2**bits - 1], and m = -z s."""
    params, scales, offsets = solved(QuantConfig(bits=bits, zero_point="integer", scale_grid="fp16"))
    zeros = np.clip(np.round(2 ** (bits - 1) - offsets / scales), 1, 2**bits - 1)
    assert set(zeros.ravel()) >= {1, 2**bits - 1}
    assert np.array_equal(params.zeros.detach().numpy(), zeros)
    assert np.array_equal(params.mins.detach().numpy(), -(zeros * scales).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float(bits: int) -> None:
    """M is the fp16 number nearest to b - midpoint s, and z = -m / s."""
    params, scales, offsets = solved(QuantConfig(bits=bits, zero_point="float", scale_grid="fp16"))
    mins = half(offsets - np.float32(2 ** (bits - 1)) * scales)
    assert np.array_equal(params.mins.detach().numpy(), mins)
    assert np.array_equal(params.zeros.detach().numpy(), -mins / scales)


def test_gradients_pass_straight_through() -> None:
    """Of every kind, s receives the gradients of snapped s, z and m as if nothing had been rounded."""
    for kind, expected in (
        ("none", lambda s, b: (s.sum() - 8 * s.sum(), 0 * b.sum())),
        ("float", lambda s, b: (s.sum() + (b - 8 * s).sum(), 0 * b.sum())),
    ):
        scales, offsets = trained()
        params = grid_params(scales, offsets, QuantConfig(zero_point=kind, scale_grid="fp16"))  # type: ignore[arg-type]
        (params.scales.sum() + params.mins.sum()).backward()
        left, right = trained()
        sum(expected(left, right)).backward()
        assert scales.grad is not None
        assert left.grad is not None
        assert torch.allclose(scales.grad, left.grad)
        if kind == "float":
            assert offsets.grad is not None
            assert torch.equal(offsets.grad, torch.ones_like(offsets))
    scales, offsets = trained(1)
    params = grid_params(scales, offsets, QuantConfig(zero_point="integer", scale_grid="fp16"))
    params.zeros.sum().backward()
    assert offsets.grad is not None
    assert torch.allclose(offsets.grad, -1 / params.scales.detach())


@pytest.mark.parametrize("grid", sorted(K_GRIDS))
def test_scales_on_a_k_grid(grid: Any) -> None:
    """Rounded up they are on the grid, not below and within one unit; rounded to nearest, within half a unit."""
    k_grid = K_GRIDS[grid]
    scales = torch.rand(4, 2 * k_grid.groups, generator=torch.Generator().manual_seed(3)) * 0.02 + 1e-3
    scales[0, 0], scales[1, :], scales[2, :] = 1e-12, 1e9, 1e-12
    above, near = ceil_scales(scales, grid), snap_scales(scales, grid)
    bounded = scales.clamp(SCALE_MIN, SCALE_MAX)
    assert torch.equal(snap_scales(above, grid), above)
    inside = bounded < SCALE_MAX
    assert bool((above >= bounded)[inside].all())
    assert above.dtype == near.dtype == scales.dtype
    tops = bounded.view(4, 2, k_grid.groups).amax(-1, keepdim=True)
    units = (tops / k_grid.top).expand(4, 2, k_grid.groups).reshape(4, -1)
    assert bool(((above - bounded) <= 1.01 * units)[inside].all())
    assert bool(((near - bounded).abs() <= 0.51 * units)[(bounded > units) & inside].all())
    assert float(above[2].min()) >= SCALE_MIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_rounded_up(dtype: torch.dtype) -> None:
    """The smallest fp16, or 7-bit, number that is not below, in the dtype that came in."""
    scales = torch.rand(2, 64, generator=torch.Generator().manual_seed(4), dtype=dtype) + 0.5
    for grid, gap in (("fp16", 2.0**-10), ("fp16_s7", 2.0**-6)):
        above = ceil_scales(scales, grid)  # type: ignore[arg-type]
        assert above.dtype == dtype
        assert bool((above >= scales).all())
        assert bool((above - scales < gap).all())
        assert torch.equal(snap_scales(above, grid), above)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mins(dtype: torch.dtype) -> None:
    """Nearest fp16 numbers, kept finite on both sides, in the dtype that came in."""
    mins = torch.tensor([[1e9, -1e9, 0.1, -0.1, 0.0, -3.0]], dtype=dtype)
    found = snap_mins(mins, "fp16")
    assert found.dtype == dtype
    tenth = float(np.float16(0.1))
    assert found.tolist() == [[FLOAT16_MAX, -FLOAT16_MAX, tenth, -tenth, 0.0, -3.0]]


def test_mins_on_a_k_grid() -> None:
    """They are never positive; the most negative is reached, finite, and what is on the grid stays."""
    groups = K_GRIDS["q4_k"].groups
    mins = -torch.rand(3, groups, generator=torch.Generator().manual_seed(5))
    mins[0, 0], mins[1, 1] = 7.0, -1e9
    found = snap_mins(mins, "q4_k")
    assert bool((found <= 0).all())
    assert float(found[0, 0]) == 0.0
    assert FLOAT16_MAX <= float(-found[1, 1]) <= 1.07 * FLOAT16_MAX
    assert torch.equal(snap_mins(found, "q4_k"), found)
    others = torch.ones_like(mins, dtype=torch.bool)
    others[0, 0] = others[1] = False
    assert bool(((found - mins).abs() < 0.51 / 63)[others].all())
    quant = QuantConfig(bits=4, group_size=32, zero_point="float", scale_grid="q4_k")
    scales = torch.rand(3, groups, generator=torch.Generator().manual_seed(6)) * 0.02 + 1e-3
    params = grid_params(scales, torch.zeros_like(scales), quant)
    snapped = snap_scales(scales, "q4_k")
    assert torch.equal(params.scales, snapped)
    assert torch.equal(params.mins, snap_mins(-8 * snapped, "q4_k"))
    assert not torch.equal(params.mins, snap_mins(-8 * snapped, "fp16"))


def test_seven_bit_scales_are_the_nearest() -> None:
    """Every fp16 number of the range: the nearer of its two neighbours with four low bits clear, halves to even."""
    least, most = (int(np.float16(end).view(np.uint16)) for end in (2.0**-20, 4096.0))
    bits = np.arange(least, most + 1, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float64)
    below = bits & np.uint16(0xFFF0)
    above = below + np.uint16(16)
    low, high = (edge.view(np.float16).astype(np.float64) for edge in (below, above))
    up = (high - values < values - low) | ((high - values == values - low) & (below >> 4 & 1 == 1))
    expected = np.where(up, high, low)
    assert np.array_equal(snap_scales(torch.from_numpy(values), "fp16_s7").numpy(), expected)
    assert 0 < np.count_nonzero(high - values == values - low) < len(values)
