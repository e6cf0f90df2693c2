"""Merging, fake quantization and freezing against a NumPy reference, on numbers that no operation rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from l4q import quant as mathematics
from l4q.base import PackedBase
from l4q.config import QuantConfig, ScaleGrid, ZeroPoint
from l4q.quant import (
    GridParams,
    LoraUpdate,
    ScaleGradient,
    fake_quantize,
    freeze_weight,
    grid_params,
    merge_lora,
    row_blocks,
)

KINDS: list[ZeroPoint] = ["none", "integer", "float"]
ROWS, GROUPS, GROUP = 5, 2, 32
COLUMNS = GROUPS * GROUP
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True, params=[True, False], ids=["blocks", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim holds for blocks of two rows, the last one shorter, and for one block."""
    if request.param:
        monkeypatch.setattr(mathematics, "BLOCK_ELEMENTS", 2 * COLUMNS + 1)


def problem(kind: ZeroPoint, bits: int) -> tuple[torch.Tensor, LoraUpdate, GridParams, QuantConfig]:
    """W0, update and grid whose merged weights, quotients and products are float32 numbers; codes leave their range."""
    generator = torch.Generator().manual_seed(bits)
    quant = QuantConfig(bits=bits, group_size=GROUP, zero_point=kind, scale_grid="fp16")
    weight = torch.randint(-40, 40, (ROWS, COLUMNS), generator=generator) / 64
    a = torch.randint(-3, 4, (2, COLUMNS), generator=generator) / 16
    b = torch.randint(-3, 4, (ROWS, 2), generator=generator) / 8
    scales = 2.0 ** -torch.randint(3, 6, (ROWS, GROUPS), generator=generator)
    zeros = torch.randint(1, 2**bits, (ROWS, GROUPS), generator=generator).float()
    if kind == "none":
        zeros = torch.full_like(zeros, 2.0 ** (bits - 1))
    if kind == "float":
        zeros -= 0.25
    return weight, LoraUpdate(a, b, 0.5), GridParams(scales, -zeros * scales, zeros), quant


def reference(weight: torch.Tensor, update: LoraUpdate, params: GridParams, quant: QuantConfig) -> tuple[Array, Array]:
    """Codes [rows, columns], and the values they stand for, in float64 and code by code."""
    merged = weight.numpy().astype(np.float64) + update.scaling * (update.b.numpy() @ update.a.numpy())
    scales, mins = (np.repeat(part.numpy().astype(np.float64), GROUP, axis=1) for part in params[:2])
    codes = np.rint(np.clip((merged - mins) / scales, 0, 2**quant.bits - 1))
    return codes, codes * scales + mins


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_fake_quantization_is_the_equation(kind: ZeroPoint, bits: int) -> None:
    """q * s + m with codes clamped and rounded half to even, in the dtype of the scales or the one asked for."""
    weight, update, params, quant = problem(kind, bits)
    codes, values = reference(weight, update, params, quant)
    assert set(np.unique(codes)) == set(range(2**bits))
    found = fake_quantize(weight, update, params, quant.max_code)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), values)
    double = GridParams(*(part.double() for part in params))
    assert fake_quantize(weight, update, double, quant.max_code).dtype == torch.float64
    asked = fake_quantize(weight, update, double, quant.max_code, torch.float32)
    assert asked.dtype == torch.float32
    assert np.array_equal(asked.numpy(), values)
    assert not np.array_equal(fake_quantize(weight, update._replace(scaling=1.0), params, quant.max_code), values)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_freezing_keeps_codes_and_parameters(kind: ZeroPoint, bits: int) -> None:
    """The checkpoint's arrays: codes, fp16 scales, and zero-points or mins where the kind has them."""
    weight, update, params, quant = problem(kind, bits)
    codes, values = reference(weight, update, params, quant)
    frozen = freeze_weight(weight, update, params, quant, "layer.3")
    assert (frozen.name, frozen.bits, frozen.group_size, frozen.zero_point) == ("layer.3", bits, GROUP, kind)
    assert np.array_equal(frozen.codes, codes)
    assert np.array_equal(frozen.scales, params.scales.numpy())
    assert (frozen.scales.dtype.name, frozen.codes.dtype.name) == ("float16", "uint8")
    assert (frozen.zeros is not None, frozen.mins is not None) == (kind == "integer", kind == "float")
    assert frozen.sub_scales is frozen.sub_mins is None
    assert np.array_equal(frozen.dequantize(), values)
    assert freeze_weight(weight, update, params, quant).name == ""


@pytest.mark.parametrize(("grid", "kind"), [("q4_k", "float"), ("q4_k", "none"), ("q3_k", "none")])
def test_freezing_on_a_k_grid(grid: ScaleGrid, kind: ZeroPoint) -> None:
    """Units and 6-bit integers multiply to the scales and mins that training used; no mins where there are none."""
    bits, group = (4, 32) if grid == "q4_k" else (3, 16)
    quant = QuantConfig(bits=bits, group_size=group, zero_point=kind, scale_grid=grid)
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(ROWS, 512 // group, generator=generator) * 0.01 + 1e-3
    params = grid_params(scales, torch.randn(scales.shape, generator=generator) * scales, quant)
    nothing = LoraUpdate(torch.zeros(1, 512), torch.zeros(ROWS, 1), 1.0)
    weight = torch.randn(ROWS, 512, generator=generator) * 0.02
    frozen = freeze_weight(weight, nothing, params, quant)
    assert frozen.k_grid == grid
    assert np.array_equal(frozen.group_scales(), params.scales.numpy())
    assert (frozen.mins is None, frozen.sub_mins is None) == (kind == "none", kind == "none")
    mins = frozen.group_mins()
    assert mins is None if kind == "none" else np.array_equal(mins, params.mins.numpy())  # type: ignore[arg-type]
    assert np.array_equal(frozen.dequantize(), fake_quantize(weight, nothing, params, quant.max_code).numpy())


def test_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as fit the cache, at least one; all of them on another device."""
    for elements, expected in ((2 * COLUMNS, [2, 2, 1]), (3 * COLUMNS - 1, [2, 2, 1]), (1, [1] * 5), (10**6, [5])):
        monkeypatch.setattr(mathematics, "BLOCK_ELEMENTS", elements)
        taken = list(row_blocks(torch.zeros(ROWS, COLUMNS)))
        assert [rows.stop - rows.start for rows in taken] == expected
        assert [row for rows in taken for row in range(rows.start, rows.stop)] == list(range(ROWS))
    monkeypatch.setattr(mathematics, "BLOCK_ELEMENTS", 1)
    assert list(row_blocks(torch.zeros(ROWS, COLUMNS, device="meta"))) == [slice(0, ROWS)]


def test_merging_keeps_its_precision() -> None:
    """In the dtype asked for, of a dense or packed W0, whatever autocast would choose; W0 itself stays as it was."""
    weight, update, _, _ = problem("none", 4)
    update = update._replace(b=update.b * (1 + 2.0**-12), a=update.a * (1 + 2.0**-12))
    rows = slice(1, 3)
    before = weight.clone()
    expected = merge_lora(weight, update, rows, torch.float32)
    assert np.allclose(expected, weight[rows] + update.scaling * update.b[rows] @ update.a, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge_lora(weight, update, rows, torch.float32), expected)
    double = merge_lora(weight.to(torch.bfloat16), update, rows, torch.float64)
    assert double.dtype == torch.float64
    exact = weight[rows].double() + update.scaling * update.b[rows].double() @ update.a.double()
    assert torch.equal(double, exact)
    assert torch.equal(weight, before)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    packed = PackedBase(codes, torch.full((ROWS, GROUPS), 0.5), bits=4, block=GROUP, columns=COLUMNS)
    dense = (codes[rows].float() - 8) * 0.5
    assert torch.equal(merge_lora(packed, update, rows, torch.float32), merge_lora(dense, update._replace(
        b=update.b[rows]), slice(0, 2), torch.float32))  # fmt: skip


def test_gradients_of_scales_are_multiplied() -> None:
    """LSQ's factor acts on the gradient alone."""
    value = torch.tensor([1.0, -2.0], requires_grad=True)
    result = ScaleGradient.apply(value, 0.25)
    assert torch.equal(result, value)
    result.backward(torch.tensor([4.0, 8.0]))
    assert value.grad is not None
    assert value.grad.tolist() == [1.0, 2.0]


def test_the_smallest_integers_of_a_k_grid() -> None:
    """Scales down to one unit and mins down to none keep their integers."""
    quant = QuantConfig(group_size=32, zero_point="float", scale_grid="q4_k")
    scales = torch.tensor([[63.0, 1, 2, 3, 4, 5, 6, 62]]) * 2.0**-12
    mins = torch.tensor([[-63.0, 0, -1, -2, 0, -5, -6, -62]]) * 2.0**-10
    frozen = freeze_weight(
        torch.zeros(1, 256),
        LoraUpdate(torch.zeros(1, 256), torch.zeros(1, 1), 1.0),
        GridParams(scales, mins, -mins / scales),
        quant,
    )
    assert frozen.sub_scales is not None
    assert frozen.sub_mins is not None
    assert (frozen.scales.tolist(), frozen.sub_scales.tolist()) == ([[2.0**-12]], [[63, 1, 2, 3, 4, 5, 6, 62]])
    assert (frozen.mins is not None, frozen.sub_mins.tolist()) == (True, [[63, 0, 1, 2, 0, 5, 6, 62]])


def test_half_precision_weights_and_whole_rows() -> None:
    """A 16-bit W0 is merged in the dtype of the scales; a group of the whole row is as long as the row."""
    weight, update, params, quant = problem("integer", 4)
    low = weight.to(torch.bfloat16)
    assert torch.equal(low.float(), weight)
    found = fake_quantize(low, update, params, quant.max_code)
    assert found.dtype == torch.float32
    assert torch.equal(found, fake_quantize(weight, update, params, quant.max_code))
    codes = freeze_weight(low, update, params, quant).codes
    assert np.array_equal(codes, freeze_weight(weight, update, params, quant).codes)
    whole = QuantConfig(group_size=-1, zero_point="integer")
    first = GridParams(*(part[:, :1] for part in params))
    assert freeze_weight(weight, update, first, whole).group_size == COLUMNS
