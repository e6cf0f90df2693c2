"""The grids, the initialisation and the value type, on plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.init import init_qparams
from l4q.quant import SCALE_MAX, SCALE_MIN, ceil_scales, grid_params, snap_scales
from l4q.weight import QuantizedWeight


def significant_bits(value: float) -> int:
    """Bits from the highest to the lowest one of a float's mantissa."""
    numerator, _ = float(value).as_integer_ratio()
    return len(bin(abs(numerator))[2:].rstrip("0"))


@given(st.lists(st.floats(1e-12, 1e9), min_size=1, max_size=40))
def test_seven_bit_scales_hold_seven_bits(values: list[float]) -> None:
    """Every fp16_s7 scale is an fp16 value of at most 7 significant bits, within 2**-7 of what was asked."""
    asked = torch.tensor(values, dtype=torch.float32)
    snapped = snap_scales(asked, "fp16_s7")
    assert torch.equal(snapped.half().float(), snapped)
    assert max(significant_bits(value) for value in snapped.tolist()) <= 7
    normal = (asked > 2**-14) & (asked < SCALE_MAX)
    assert torch.all((snapped - asked).abs()[normal] <= asked[normal] * (2**-7 + 2**-11))


@given(st.floats(SCALE_MIN, 4000.0), st.sampled_from(["fp16", "fp16_s7"]))
def test_ceil_scales_never_round_down(value: float, grid: str) -> None:
    """ceil_scales gives the least grid value that is not below its argument."""
    asked = torch.tensor([value], dtype=torch.float32)
    up = ceil_scales(asked, grid)  # type: ignore[arg-type]
    assert up >= asked
    assert torch.equal(snap_scales(up, grid), up)  # type: ignore[arg-type]
    below = (up.half().view(torch.int16) - (16 if grid == "fp16_s7" else 1)).view(torch.float16).float()
    assert below < asked or up <= SCALE_MIN


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", ["fp16", "fp16_s7"])
def test_l4q_init_clips_nothing(bits: int, grid: str) -> None:
    """At step 0 no weight lies outside the clamp, not even a group's extreme (eqs 36-38 and the rounding trap)."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits)) * 0.03
    quant = QuantConfig(bits=bits, group_size=32, scale_grid=grid)  # type: ignore[arg-type]
    scales, offsets = init_qparams(weight, quant)
    params = grid_params(scales, offsets, quant)
    position = (weight.view(64, 8, 32) - params.mins.unsqueeze(-1)) / params.scales.unsqueeze(-1)
    assert position.min() >= 0
    assert position.max() <= quant.max_code
    assert not offsets.any()


def test_nearest_scales_would_clip() -> None:
    """The twin: with scales rounded to nearest, some extremes do land outside, so the test above can fail."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.03
    quant = QuantConfig(group_size=32)
    grouped = weight.view(64, 8, 32)
    exact = torch.maximum(grouped.amin(-1) / -8, grouped.amax(-1) / 7)
    scales = snap_scales(exact, quant.scale_grid).unsqueeze(-1)
    position = (grouped + 8 * scales) / scales
    assert ((position < 0) | (position > 15)).any()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e30, float("inf")])
def test_scales_stay_positive_and_finite(value: float) -> None:
    """Whatever the optimizer does to s, the forward uses a positive finite fp16 value."""
    for grid in ("fp16", "fp16_s7"):
        snapped = snap_scales(torch.tensor([value]), grid)
        assert 0 < snapped.item() <= SCALE_MAX


def test_integer_zero_points_are_whole_and_in_range() -> None:
    """Z is an integer in [1, 2**bits - 1] for any b, and s * z is exact in fp16 on the 7-bit grid."""
    quant = QuantConfig(zero_point="integer")
    generator = torch.Generator().manual_seed(3)
    scales = torch.rand(64, 9, generator=generator) * 0.02 + 1e-4
    offsets = torch.randn(64, 9, generator=generator) * 0.1
    params = grid_params(scales, offsets, quant)
    assert torch.equal(params.zeros, params.zeros.round())
    assert params.zeros.min() == 1
    assert params.zeros.max() == 15
    assert torch.equal(params.mins.half().float(), params.mins)


@settings(max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 3, 32]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(["none", "integer", "float"]),
    st.integers(0, 2**31),
)
def test_dequantize_follows_its_equation(
    out: int, groups: int, group_size: int, bits: int, kind: str, seed: int
) -> None:
    """QuantizedWeight.dequantize equals the documented equation in exact rational arithmetic, element by element."""
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, out, groups, group_size, bits, kind)
    dense = weight.dequantize()
    assert dense.dtype == np.float32
    for o in range(out):
        for i in range(groups * group_size):
            g = i // group_size
            code, scale = int(weight.codes[o, i]), float(weight.scales[o, g])
            if kind == "float":
                assert weight.mins is not None
                expected = np.float32(np.float64(scale) * code + np.float64(weight.mins[o, g]))
            else:
                zero = int(weight.zeros[o, g]) if weight.zeros is not None else 1 << (bits - 1)
                expected = np.float32((code - zero) * scale)
            assert dense[o, i] == expected


def random_weight(
    rng: np.random.Generator, out: int, groups: int, group_size: int, bits: int = 4, kind: str = "none"
) -> QuantizedWeight:
    """A valid random weight."""
    top = 1 << bits
    return QuantizedWeight(
        codes=rng.integers(0, top, (out, groups * group_size), dtype=np.uint8),
        scales=rng.uniform(1e-3, 0.1, (out, groups)).astype(np.float16),
        zeros=rng.integers(1, top, (out, groups), dtype=np.uint8) if kind == "integer" else None,
        mins=rng.uniform(-1, 1, (out, groups)).astype(np.float16) if kind == "float" else None,
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"codes": np.full((2, 64), 16, np.uint8)}, "codes"),
        ({"codes": np.zeros((2, 64), np.int8)}, "codes"),
        ({"scales": np.full((2, 2), np.nan, np.float16)}, "scales"),
        ({"scales": np.full((2, 2), np.inf, np.float16)}, "scales"),
        ({"scales": np.zeros((2, 2), np.float16)}, "scales"),
        ({"scales": np.ones((2, 3), np.float16)}, "scales"),
        ({"scales": np.ones((2, 2), np.float32)}, "scales"),
        ({"zeros": np.zeros((2, 2), np.uint8)}, "zeros"),
        ({"zeros": np.full((2, 2), 16, np.uint8)}, "zeros"),
        ({"zeros": np.ones((2, 2), np.uint8), "mins": np.ones((2, 2), np.float16)}, "zeros and mins"),
        ({"mins": np.full((2, 2), np.nan, np.float16)}, "mins"),
        ({"group_size": 48}, "group_size"),
        ({"bits": 5}, "bits"),
    ],
)
def test_bad_weights_are_refused(change: dict[str, object], field: str) -> None:
    """Every broken invariant is one UsageError that names the field."""
    fields: dict[str, object] = {
        "codes": np.zeros((2, 64), np.uint8),
        "scales": np.ones((2, 2), np.float16),
        "bits": 4,
        "group_size": 32,
    }
    with pytest.raises(UsageError, match=f"invalid quantized weight: {field}"):
        QuantizedWeight(**{**fields, **change})  # type: ignore[arg-type]


def test_float_weights_have_no_integer_zeros() -> None:
    """Asking a float zero-point for integers says where to go instead."""
    weight = random_weight(np.random.default_rng(0), 2, 2, 32, kind="float")
    with pytest.raises(UnsupportedError, match="no integer form"):
        weight.integer_zeros()


@pytest.mark.parametrize(
    "fields",
    [{"bits": 5}, {"bits": True}, {"group_size": 48}, {"group_size": 0}, {"zero_point": "half"}, {"scale_grid": "fp8"}],
)
def test_bad_grids_are_refused(fields: dict[str, object]) -> None:
    """A grid nobody supports is refused by name."""
    with pytest.raises(UsageError, match=f"{next(iter(fields))} has an unsupported value"):
        QuantConfig(**fields)  # type: ignore[arg-type]
