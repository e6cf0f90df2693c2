"""GGUF blocks: gguf-py decodes our bytes to the trained weights, bit for bit, and notices every kind of damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf.encode import Encoding, Subject, choose_encoding, encode, encoded_nbytes
from exporters.gguf.pack import (
    BLOCK,
    BLOCK_BYTES,
    pack_q4_0,
    pack_q4_1,
    pack_q5_0,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q5_0,
)
from exporters.plan import Fidelity
from l4q.errors import UnsupportedError, UsageError
from l4q.weight import QuantizedWeight
from runtime_tests.gguf_models import random_weight, same_bits

FREE_SCALES = 0xFFFF

# type: (pack, unpack, largest code + 1, its own equation in float32)
TYPES: dict[str, tuple[Callable[..., Any], Callable[..., Any], int, Callable[..., Any]]] = {
    "Q4_0": (pack_q4_0, unpack_q4_0, 16, lambda q, d: (q - 8) * d),
    "Q4_1": (pack_q4_1, unpack_q4_1, 16, lambda q, d, m: d * q + m),
    "Q5_0": (pack_q5_0, unpack_q5_0, 32, lambda q, d: (q - 16) * d),
}

# One block: code of column j is 31 - j (Q5_0) or its low half, scale 0.5 (0x3800), min -1.0 (0xbc00).
NIBBLES = "ffeeddccbbaa99887766554433221100"
GOLDEN = {
    "Q4_0": "0038" + NIBBLES,
    "Q4_1": "003800bc" + NIBBLES,
    "Q5_0": "0038" + "ffff0000" + NIBBLES,
}


def decode(packed: np.ndarray, kind: str) -> np.ndarray:
    """gguf-py's decoder."""
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])


def choose(weight: QuantizedWeight, requested: Any = "auto") -> Encoding:
    """The planner's decision."""
    return choose_encoding(Subject.of(replace(weight, name="layer")), requested)


@pytest.mark.parametrize("kind", TYPES)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    blocks=st.integers(1, 4),
    bits=st.integers(0, 0x7BFF),
    seed=st.integers(0, 2**32 - 1),
)
def test_foreign_decoder_and_own_inverse(kind: str, rows: int, groups: int, blocks: int, bits: int, seed: int) -> None:
    """gguf-py returns the block equation's values for any shape and any finite fp16; unpack returns what was packed."""
    pack, unpack, limit, equation = TYPES[kind]
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, limit, (rows, groups * blocks * BLOCK), dtype=np.uint8)
    halves = [rng.integers(0, bits + 1, (rows, groups), dtype=np.uint16).view(np.float16) for _ in range(2)]
    parameters = halves if kind == "Q4_1" else halves[:1]
    packed = pack(codes, *parameters)
    assert packed.shape == (rows, groups * blocks * BLOCK_BYTES[kind])
    per_column = [np.repeat(array, blocks * BLOCK, axis=1).astype(np.float32) for array in parameters]
    assert same_bits(decode(packed, kind), equation(codes.astype(np.float32), *per_column).astype(np.float32))
    per_block = [np.repeat(array, blocks, axis=1) for array in parameters]
    expected_fields: list[np.ndarray] = [codes, *per_block]
    for got, expected in zip(unpack(packed), expected_fields, strict=True):
        assert got.dtype == expected.dtype
        assert np.array_equal(got.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("kind", TYPES)
def test_golden_bytes(kind: str) -> None:
    """A block's bytes are those of ggml-common.h."""
    codes = np.arange(BLOCK - 1, -1, -1, dtype=np.uint8)[None] % TYPES[kind][2]
    parameters = [np.full((1, 1), value, np.float16) for value in ((0.5, -1.0) if kind == "Q4_1" else (0.5,))]
    assert TYPES[kind][0](codes, *parameters).tobytes().hex() == GOLDEN[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_decoder_notices_damage(kind: str) -> None:
    """A flipped code bit, a changed scale and two swapped rows all change what gguf-py decodes."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, TYPES[kind][2], (4, 2 * BLOCK), dtype=np.uint8)
    parameters = [rng.uniform(0.01, 0.1, (4, 2)).astype(np.float16) for _ in range(2 if kind == "Q4_1" else 1)]
    packed = TYPES[kind][0](codes, *parameters)
    good = decode(packed, kind)
    nibble, scale = packed.copy(), packed.copy()
    nibble[1, -3] ^= 0x10
    scale[2, 0] ^= 1
    for damaged in (nibble, scale, packed[[1, 0, 2, 3]]):
        assert not same_bits(decode(damaged, kind), good)


@pytest.mark.parametrize(
    ("weight", "encoding"),
    [
        (random_weight((3, 128), zero_point="none", group_size=64, scale_mask=FREE_SCALES), "Q4_0"),
        (random_weight((3, 128), zero_point="none", bits=3, group_size=128, scale_mask=FREE_SCALES), "Q4_0"),
        (random_weight((3, 128), zero_point="none", bits=2, group_size=32, scale_mask=FREE_SCALES), "Q4_0"),
        (random_weight((3, 128), zero_point="integer", bits=3, group_size=64, scale_mask=FREE_SCALES), "Q4_0"),
        (random_weight((3, 128), zero_point="integer", group_size=64), "Q4_1"),
        (random_weight((64, 128), zero_point="integer", group_size=32, scale_mask=FREE_SCALES), "Q5_0"),
        (random_weight((3, 128), zero_point="float", group_size=64, scale_mask=FREE_SCALES), "Q4_1"),
        (random_weight((3, 128), zero_point="float", bits=3, group_size=32, scale_mask=FREE_SCALES), "Q4_1"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.zero_point}-{value.bits}bit-g{value.group_size}",
)
def test_auto_is_the_smallest_exact_type(weight: QuantizedWeight, encoding: str) -> None:
    """Every grid has an exact block type, and gguf-py decodes it to the checkpoint's own floats."""
    chosen = choose(weight)
    assert (chosen.name, chosen.fidelity) == (encoding, Fidelity.EXACT)
    packed = encode(weight, chosen.name)
    assert packed.nbytes == encoded_nbytes(weight.shape, chosen.name)
    assert same_bits(decode(packed, encoding), weight.dequantize())


@pytest.mark.parametrize("requested", ["Q4_1", "Q5_0", "F32"])
@pytest.mark.parametrize(("zero_point", "bits"), [("none", 4), ("integer", 4), ("integer", 3), ("none", 2)])
def test_requested_types_are_exact_on_seven_bit_scales(requested: str, zero_point: str, bits: int) -> None:
    """Q4_1, Q5_0 and F32 hold every integer zero-point whose products fit fp16."""
    weight = random_weight((8, 128), zero_point=zero_point, bits=bits, group_size=64)
    assert choose(weight, requested).fidelity is Fidelity.EXACT
    assert same_bits(decode(encode(weight, requested), requested), weight.dequantize())


def test_inexact_q4_1_is_declared() -> None:
    """Free fp16 scales: auto says why it left Q4_1, a requested Q4_1 is planned as rounded, and it does round."""
    weight = random_weight((64, 128), zero_point="integer", scale_mask=FREE_SCALES)
    assert "not Q4_1: scale * zero is not an fp16 number in" in choose(weight).reason
    assert choose(weight, "Q4_1").fidelity is Fidelity.ROUNDED
    decoded = decode(encode(weight, "Q4_1"), "Q4_1")
    assert not same_bits(decoded, weight.dequantize())
    np.testing.assert_allclose(decoded, weight.dequantize(), atol=0.5 * 2.0**-11)  # half an fp16 step below 0.5


def test_q4_0_takes_integer_zeros_only_where_they_fit() -> None:
    """Zero-points 8 are Q4_0's own, 7 those of a negative scale, as llama.cpp writes it; others do not fit."""
    weight = random_weight((3, 128), zero_point="integer")
    centred = QuantizedWeight(
        codes=weight.codes, scales=weight.scales, zeros=np.full_like(weight.scales, 8, np.uint8), bits=4, group_size=32
    )
    assert choose(centred).name == "Q4_0"
    assert same_bits(decode(encode(centred, "Q4_0"), "Q4_0"), centred.dequantize())
    either = np.random.default_rng(0).integers(7, 9, weight.scales.shape, dtype=np.uint8)
    mirrored = QuantizedWeight(codes=weight.codes, scales=weight.scales, zeros=either, bits=4, group_size=32)
    assert choose(mirrored).name == "Q4_0"
    decoded = decode(encode(mirrored, "Q4_0"), "Q4_0")
    assert np.array_equal(decoded, mirrored.dequantize())  # zeros of a negative scale are negative zeros
    assert not np.array_equal(decoded, centred.dequantize())
    with pytest.raises(UnsupportedError, match=r"(?s)Q4_0 cannot hold.*layer.*zero-points 7 and 8 only"):
        choose(weight, "Q4_0")


@pytest.mark.parametrize("requested", ["Q4_0", "Q5_0"])
def test_float_zero_points_need_a_min(requested: str) -> None:
    """Types without a min refuse float zero-points."""
    with pytest.raises(UnsupportedError, match="cannot hold"):
        choose(random_weight((3, 64), zero_point="float"), requested)


def test_overflowing_product_leaves_q4_1() -> None:
    """A scale * zero beyond fp16 cannot be a Q4_1 min; Q5_0 holds it."""
    weight = random_weight((2, 64), zero_point="integer")
    scales = np.full_like(weight.scales, 60000.0)
    huge = QuantizedWeight(
        codes=weight.codes, scales=scales, zeros=np.full(scales.shape, 15, np.uint8), bits=4, group_size=32
    )
    assert choose(huge).name == "Q5_0"
    assert same_bits(decode(encode(huge, "Q5_0"), "Q5_0"), huge.dequantize())
    with pytest.raises(UnsupportedError, match="overflows fp16"):
        choose(huge, "Q4_1")


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.full((1, 32), 16, np.uint8), np.ones((1, 1), np.float16), "code out of range"),
        (np.zeros((1, 33), np.uint8), np.ones((1, 1), np.float16), "do not fill blocks"),
        (np.zeros((1, 64), np.uint8), np.ones((1, 3), np.float16), "group parameters do not match the codes"),
        (np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float32), "group parameters do not match the codes"),
    ],
)
def test_wrong_input_is_named(codes: Any, scales: Any, message: str) -> None:
    """Codes and scales that no block holds are refused with what was found."""
    with pytest.raises(UsageError, match=message):
        pack_q4_0(codes, scales)
