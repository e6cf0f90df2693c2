"""Shapes that packers rarely see: whole arrays of several axes, groups and rows that leave words unfilled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.compressed_tensors.pack import pack_zeros, unpack_zeros
from exporters.gptq.pack import decode_zeros, encode_zeros
from exporters.onnx.pack import pack_uint4, unpack_uint4
from exporters.words import pack_rows, unpack_rows
from l4q.errors import UsageError


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
