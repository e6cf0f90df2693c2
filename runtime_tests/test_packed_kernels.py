"""What packs rows without unpacking them gives, piece by piece, the bytes of the code-by-code references."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from exporters import transpose
from exporters.awq.pack import ORDER, pack_awq
from exporters.compressed_tensors.pack import pack_codes as pack_words
from exporters.container import widen_packed
from exporters.gguf.encode import Subject, choose_encoding, encode
from exporters.gguf.encode_packed import encode_pieces, paired
from exporters.gguf.names import permute_rows
from exporters.onnx.pack import code_pieces, pack_linear, pack_uint4
from exporters.transpose import as_words, transposed_nibbles, transposed_words
from exporters.words import pack_rows
from l4q import packed_weight
from l4q.bitpack import pack_codes
from l4q.config import QuantConfig, ZeroPoint
from l4q.packed_weight import PackedWeight
from l4q.weight import QuantizedWeight
from runtime_tests.random_models import random_weight

SHAPES = [(8, 32), (16, 64), (40, 96), (136, 320), (264, 1024)]
"""Rows and columns below, at and above the strips and words that are taken at a time."""
KINDS: list[ZeroPoint] = ["none", "integer", "float"]


@pytest.fixture(autouse=True, params=[True, False], ids=["pieces", "whole"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every claim holds for many small pieces and for one."""
    if request.param:
        monkeypatch.setattr(transpose, "PIECE_BYTES", 3000)
        monkeypatch.setattr(packed_weight, "PIECE_CODES", 700)


def joined(parts: Iterable[np.ndarray]) -> bytes:
    """The bytes of all pieces."""
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def codes_of(shape: tuple[int, int], bits: int) -> np.ndarray:
    """Random codes over the whole range."""
    return np.random.default_rng(sum(shape)).integers(0, 1 << bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_are_the_transposed_rows(shape: tuple[int, int], bits: int) -> None:
    """GPTQ's words and compressed-tensors' words, dense at every number of bits; one changed code is seen."""
    codes = codes_of(shape, bits)
    packed = pack_codes(codes, bits)
    expected = pack_rows(np.ascontiguousarray(codes.T), bits).tobytes()
    assert joined(transposed_words(as_words(packed))) == expected
    assert as_words(packed).tobytes() == pack_words(codes, bits).tobytes()
    packed[-1, -1] ^= 1
    assert joined(transposed_words(as_words(packed))) != expected
    assert as_words(packed).tobytes() != pack_words(codes, bits).tobytes()


@pytest.mark.parametrize("shape", [*SHAPES, (8, 7), (16, 30), (24, 341)])
def test_nibbles_are_transposed(shape: tuple[int, int]) -> None:
    """AWQ's order and ONNX's, rows of any length; one changed code is seen."""
    codes = codes_of(shape, 4)
    packed, turned = pack_codes(codes, 4), np.ascontiguousarray(codes.T)
    awq, plain = pack_awq(turned).tobytes(), pack_uint4(turned).tobytes()
    signed = pack_uint4(turned ^ np.uint8(8)).tobytes()
    assert joined(transposed_nibbles(packed, shape[1], ORDER)) == awq
    assert joined(transposed_nibbles(packed, shape[1])) == plain
    assert joined(transposed_nibbles(packed, shape[1], flip=8)) == signed
    packed[0, 0] ^= 1
    assert joined(transposed_nibbles(packed, shape[1], ORDER)) != awq


@pytest.mark.parametrize("half", [16, 32])
def test_halves_of_a_block_are_paired(half: int) -> None:
    """Byte j of a block holds codes j and j + half."""
    codes = codes_of((6, 4 * half), 4)
    blocks = codes.reshape(6, 2, 2, half)
    expected = (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(6, -1)
    assert np.array_equal(paired(pack_codes(codes, 4), half), expected)
    assert not np.array_equal(paired(pack_codes(codes[::-1], 4), half), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_weights_keep_every_value(bits: int, kind: ZeroPoint) -> None:
    """Packing, taking rows and widening leave the dequantized float32 weights as they are."""
    weight = random_weight((24, 160), QuantConfig(bits=bits, zero_point=kind, group_size=32), seed=bits)
    packed = PackedWeight.of(weight)
    order = np.arange(24)[::-1]
    assert np.array_equal(packed.unpack().dequantize(), weight.dequantize())
    assert np.array_equal(packed.take(order).unpack().dequantize(), weight.dequantize()[order])
    shift = (1 << 4) - (1 << bits)
    assert np.array_equal(packed.fields(4, shift), pack_codes(weight.codes + np.uint8(shift), 4))
    if kind != "float":
        assert np.array_equal(widen_packed(packed, 4).unpack().dequantize(), weight.dequantize())


def block_cases() -> list[QuantizedWeight]:
    """Weights for which "auto" takes each of GGUF's block types."""
    grids = [QuantConfig(bits=bits, zero_point=kind, group_size=64) for bits in (2, 3, 4) for kind in KINDS]
    grids += [QuantConfig(bits=4, zero_point="integer", scale_grid="fp16", group_size=64)]
    grids += [QuantConfig(bits=4, zero_point="float", scale_grid="q4_k", group_size=32)]
    grids += [QuantConfig(bits=3, scale_grid="q3_k", group_size=16)]
    return [random_weight((16, 512), grid, seed=number) for number, grid in enumerate(grids)]


def test_blocks_are_those_of_the_reference() -> None:
    """Every block type of every kind of weight, rows as they are and in llama's order; a changed code is seen."""
    seen = set()
    for weight in block_cases():
        chosen = choose_encoding(Subject.of(weight), "auto").name
        seen.add(chosen)
        packed = PackedWeight.of(weight)
        for encoding in (chosen, "F32"):
            expected = encode(weight, encoding)
            assert joined(encode_pieces(packed, encoding)) == expected.tobytes()
            order = permute_rows(np.arange(16), 2)
            assert joined(encode_pieces(packed, encoding, order)) == permute_rows(expected, 2).tobytes()
        packed.packed[-1, -1] ^= 1
        assert joined(encode_pieces(packed, chosen)) != encode(weight, chosen).tobytes()
    assert seen == {"Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q3_K"}


def test_k_blocks_of_whole_superblocks() -> None:
    """Q4_K on request, for groups of whole superblocks and every kind of zero-point."""
    for kind in KINDS:
        weight = random_weight((16, 512), QuantConfig(zero_point=kind, group_size=256), seed=7)
        assert joined(encode_pieces(PackedWeight.of(weight), "Q4_K")) == encode(weight, "Q4_K").tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [24, 21])
def test_onnx_codes_are_those_of_the_reference(bits: int, kind: ZeroPoint, rows: int) -> None:
    """Signed and unsigned codes, also where rows of the transpose share bytes; a changed code is seen."""
    weight = random_weight((rows, 96), QuantConfig(bits=bits, zero_point=kind, group_size=32), seed=3)
    reference, packed = pack_linear(weight, 32), PackedWeight.of(weight)
    assert joined(code_pieces(packed, signed=reference.signed)) == reference.weight.tobytes()
    packed.packed[0, 0] ^= 1
    assert joined(code_pieces(packed, signed=reference.signed)) != reference.weight.tobytes()
