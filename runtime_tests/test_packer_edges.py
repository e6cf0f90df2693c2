"""Shapes that packers rarely see: whole arrays of several axes, groups and rows that leave words unfilled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exporters import transpose
from exporters.compressed_tensors.pack import pack_zeros, unpack_zeros
from exporters.gguf import encode_packed, pack, pack_k
from exporters.gguf.encode import encoded_nbytes
from exporters.gptq.pack import decode_zeros, encode_zeros
from exporters.onnx import pack as onnx_pack
from exporters.onnx.pack import _group_bias as group_bias
from exporters.onnx.pack import (
    choose_block,
    code_pieces,
    float_center,
    pack_linear_codes,
    pack_parameters,
    pack_uint4,
    unpack_uint4,
)
from exporters.transpose import as_words
from exporters.words import pack_rows, unpack_rows
from l4q import packed_weight
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UsageError
from l4q.packed_weight import PackedWeight
from l4q.weight import QuantizedWeight
from runtime_tests.random_models import random_weight


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 1), (4,)])
def test_onnx_arrays_keep_their_shape(shape: tuple[int, ...]) -> None:
    """Row-major order over all axes, odd sizes included; a byte too few or too many names both counts."""
    values = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    packed = pack_uint4(values)
    found = unpack_uint4(packed, shape)
    assert found.shape == shape
    assert np.array_equal(found, values)
    count = (values.size + 1) // 2
    for wrong in (packed[:-1], np.append(packed, packed[:1])):
        with pytest.raises(UsageError) as caught:
            unpack_uint4(wrong, shape)
        lines = str(caught.value).splitlines()
        assert lines == [
            "packed 4-bit array has the wrong length",
            f"  got: {wrong.size}",
            f"  expected: {count} bytes",
        ]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (33, 1), (33, 7), (40, 96), (64, 5)])
def test_zero_points_of_any_shape(bits: int, rows: int, groups: int) -> None:
    """The number of groups does not decide the padding: that is along the rows alone."""
    zeros = np.random.default_rng(1).integers(0, 1 << bits, (rows, groups)).astype(np.uint8)
    words = pack_zeros(zeros, bits)
    assert words.shape == (-(-rows * bits // 32), groups)
    assert np.array_equal(unpack_zeros(words, bits, rows), zeros)
    if bits == 4:  # the installed compressed-tensors packs 2 and 4 bits in the same words
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        signed = unpack_from_int32(torch.from_numpy(words), bits, torch.Size((rows, groups)), packed_dim=0)
        assert np.array_equal(signed.numpy().astype(np.int16) + 8, zeros)
    with pytest.raises(UsageError, match=r"(?s)^packed words are cut off.*got: \d+ values.*expected: at least"):
        unpack_zeros(words, bits, rows + 33)


def test_unknown_gptq_formats_are_named() -> None:
    """Both directions refuse a third convention with the two that exist."""
    zeros = np.ones((1, 1), dtype=np.uint8)
    for convert in (encode_zeros, decode_zeros):
        with pytest.raises(UsageError) as caught:
            convert(zeros, 4, "gptq_v3")
        assert str(caught.value).splitlines() == [
            "unknown GPTQ checkpoint format",
            "  got: gptq_v3",
            "  expected: one of ['gptq', 'gptq_v2']",
        ]


def test_words_say_what_does_not_fit() -> None:
    """Values come back as bytes; each refusal has its sentence, what was found and what was expected."""
    codes = np.arange(32, dtype=np.uint8).reshape(32, 1) % 8
    assert unpack_rows(pack_rows(codes, 3), 3).dtype == np.uint8
    for call, lines in (
        (
            lambda: pack_rows(codes[:31], 3),
            ["a packed axis must fill whole words", "  got: 31 values", "  expected: multiple of 32"],
        ),
        (lambda: pack_rows(codes, 2), ["a code does not fit its bits", "  got: 7", "  expected: < 4"]),
        (
            lambda: unpack_rows(pack_rows(codes, 3)[:2], 3),
            ["packed words are cut off", "  got: 2 words", "  expected: multiple of 3"],
        ),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value).splitlines() == lines


def test_rows_that_end_inside_a_word_are_filled_up() -> None:
    """With zeros, and no row is added."""
    packed = np.arange(1, 16, dtype=np.uint8).reshape(3, 5)
    words = as_words(packed)
    assert (words.shape, words.dtype.name) == ((3, 2), "uint32")
    assert words.astype("<u4").view(np.uint8).tolist() == [[*row, 0, 0, 0] for row in packed.tolist()]


def test_pieces_of_a_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as the bytes in memory allow, at least one word of them."""
    words, packed = np.zeros((8, 10), np.uint32), np.zeros((8, 32), np.uint8)
    for size, rows, nibbles in ((4 * 8 * 3, [3, 3, 3, 1], [24, 24, 16]), (1, [1] * 10, [8] * 8), (10**6, [10], [64])):
        monkeypatch.setattr(transpose, "PIECE_BYTES", size)
        assert [len(piece) for piece in transpose.transposed_words(words)] == rows
        assert [len(piece) for piece in transpose.transposed_nibbles(packed, 64)] == nibbles


def test_superblocks_come_apart_in_their_dtypes() -> None:
    """Codes and unsigned integers as bytes, fp16 numbers, and Q3_K's signed integers."""
    fields = pack_k.unpack_q4_k(np.zeros((2, 144), np.uint8))
    assert [field.dtype.name for field in fields] == ["uint8", "float16", "uint8", "float16", "uint8"]
    three = pack_k.unpack_q3_k(np.zeros((2, 110), np.uint8))
    assert [field.dtype.name for field in three] == ["uint8", "float16", "int8"]
    five = pack.unpack_q5_0(np.zeros((2, 22), np.uint8))
    assert [field.dtype.name for field in five] == ["uint8", "float16"]


def test_blocks_of_one_group_per_row() -> None:
    """The largest power of two in the row where none divides it, from 16 to 256."""
    for columns, expected in ((3, 16), (17, 16), (33, 32), (100, 64), (341, 256), (1001, 256)):
        assert choose_block(in_features=columns, group_size=columns, requested=None, where="w") == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float_weights_are_centred_where_that_is_exact(bits: int) -> None:
    """Signed codes and a bias of m + s * 2**(bits-1), unless one such sum rounds in float32: then codes as they are."""
    weight = random_weight((3, 64), QuantConfig(bits=bits, zero_point="float", group_size=32), 0)
    middle = 1 << (bits - 1)
    assert weight.mins is not None
    assert float_center(weight) == middle
    packed = pack_parameters(weight, 32)
    assert (packed.signed, packed.zeros) == (True, None)
    assert packed.group_bias is not None
    assert (packed.group_bias.dtype.name, packed.scales.dtype.name) == ("float32", "float32")
    exact = weight.mins.astype(np.float64) + weight.scales.astype(np.float64) * middle
    assert np.array_equal(packed.group_bias, exact.T)
    scales, mins = weight.scales.copy(), weight.mins.copy()
    scales[2, 1], mins[2, 1] = 2.0**-24, -1001.5
    off = replace(weight, scales=scales, mins=mins)
    assert float_center(off) == 0
    assert not pack_parameters(off, 32).signed
    assert group_bias(off, middle)[2, 1] == -1001.5 + middle * 2.0**-24


def test_rows_that_do_not_fill_words_of_onnx() -> None:
    """Whatever the number of rows, the pieces are the bytes of the reference."""
    for rows in range(8, 40):
        packed = PackedWeight.of(random_weight((rows, 32), QuantConfig(group_size=32), rows))
        found = b"".join(np.ascontiguousarray(piece).tobytes() for piece in code_pieces(packed, signed=True))
        assert found == pack_linear_codes(packed.unpack(), signed=True).tobytes()


def test_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as there may be codes, at least one."""
    packed = PackedWeight.of(random_weight((5, 32), QuantConfig(group_size=32), 0))
    for codes, sizes in ((64, [2, 2, 1]), (95, [2, 2, 1]), (1, [1] * 5), (32, [1] * 5), (160, [5])):
        monkeypatch.setattr(packed_weight, "PIECE_CODES", codes)
        assert [rows.stop - rows.start for rows in packed.row_slices()] == sizes


def test_codes_that_stay_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q4_0 of symmetric codes, Q4_1 and Q4_K go from bytes to bytes; a zero-point moves Q4_0's codes one by one."""

    def refuse(weight: QuantizedWeight, encoding: str) -> np.ndarray:
        raise AssertionError(encoding)

    kinds: tuple[ZeroPoint, ...] = ("none", "integer", "float")
    weights = {
        kind: PackedWeight.of(random_weight((3, 256), QuantConfig(zero_point=kind, group_size=256), 0))
        for kind in kinds
    }
    monkeypatch.setattr(encode_packed, "encode", refuse)
    direct: list[tuple[ZeroPoint, str]] = [
        ("none", "Q4_0"),
        ("integer", "Q4_1"),
        ("float", "Q4_1"),
        ("integer", "Q4_K"),
    ]
    others: list[tuple[ZeroPoint, str]] = [("integer", "Q4_0"), ("none", "Q5_0"), ("none", "F32")]
    for kind, encoding in direct:
        (rows,) = encode_packed.encode_pieces(weights[kind], encoding)
        assert rows.shape == (3, encoded_nbytes((1, 256), encoding))
    for kind, encoding in others:
        with pytest.raises(AssertionError, match=encoding):
            next(encode_packed.encode_pieces(weights[kind], encoding))


def test_onnx_codes_are_transposed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code by code only where rows of the transpose end inside a word."""

    def refuse(weight: QuantizedWeight, *, signed: bool) -> np.ndarray:
        raise AssertionError("unpacked")

    monkeypatch.setattr(onnx_pack, "pack_linear_codes", refuse)
    for rows in (8, 24, 72):
        packed = PackedWeight.of(random_weight((rows, 32), QuantConfig(group_size=32), 0))
        assert sum(piece.nbytes for piece in code_pieces(packed, signed=True)) == rows * 16
    with pytest.raises(AssertionError, match="unpacked"):
        next(code_pieces(PackedWeight.of(random_weight((12, 32), QuantConfig(group_size=32), 0)), signed=True))


def test_fields_of_the_same_width_are_the_codes() -> None:
    """Nothing is copied; fields that are shifted are others."""
    packed = PackedWeight.of(random_weight((5, 32), QuantConfig(bits=3, group_size=32), 0))
    assert packed.fields(3) is packed.packed
    assert not np.array_equal(packed.fields(4, 4), packed.fields(4))
