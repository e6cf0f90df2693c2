"""GPTQ words against golden bytes, compressed-tensors' decoder and a bit-by-bit reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gptq.pack import decode_zeros, encode_zeros
from exporters.words import pack_cols, pack_rows, run_length, unpack_cols, unpack_rows
from l4q.errors import UsageError


@st.composite
def values_and_bits(draw: st.DrawFn, bits: st.SearchStrategy[int]) -> tuple[np.ndarray, int]:
    """uint8 [runs * values per run, columns] over the whole range of `bits`."""
    width = draw(bits)
    rows = draw(st.integers(1, 5)) * run_length(width)[0]
    columns = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 1 << width, (rows, columns), dtype=np.uint8), width


def slow_words(column: np.ndarray, bits: int) -> np.ndarray:
    """One column packed bit by bit: bit i of value k is bit bits*k + i of the stream."""
    stream = [(int(value) >> i) & 1 for value in column for i in range(bits)]
    words = [sum(bit << i for i, bit in enumerate(stream[start : start + 32])) for start in range(0, len(stream), 32)]
    return np.array(words, dtype=np.uint32).view(np.int32)


def test_four_bit_golden_words() -> None:
    """Eight 4-bit codes fill one word, the first in the lowest nibble, as GPTQ checkpoints on the hub store them."""
    codes = np.array([[0, 15], [1, 14], [2, 13], [3, 12], [4, 11], [5, 10], [6, 9], [7, 8]], dtype=np.uint8)
    assert pack_rows(codes, 4).view(np.uint32).tolist() == [[0x76543210, 0x89ABCDEF]]
    assert pack_cols(codes.T, 4).view(np.uint32).tolist() == [[0x76543210], [0x89ABCDEF]]


def test_three_bit_golden_words() -> None:
    """32 codes 0..7 repeated are the 24-bit run 0xFAC688 (octal 76543210) four times: three full words."""
    codes = (np.arange(32) % 8).astype(np.uint8)[:, None]
    assert pack_rows(codes, 3).view(np.uint32).ravel().tolist() == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


def test_symmetric_zero_points_are_the_known_constants() -> None:
    """Zero-point 8 is stored as 0x77777777 in "gptq" and 0x88888888 in "gptq_v2"."""
    zeros = np.full((1, 8), 8, dtype=np.uint8)
    stored = [int(pack_cols(encode_zeros(zeros, 4, name), 4).view(np.uint32)[0, 0]) for name in ("gptq", "gptq_v2")]
    assert stored == [0x77777777, 0x88888888]


def test_v1_zero_points_wrap_and_come_back() -> None:
    """Every zero-point survives both conventions; 0 is stored as 15 in v1."""
    zeros = np.arange(16, dtype=np.uint8)[None]
    assert encode_zeros(zeros, 4, "gptq")[0, :2].tolist() == [15, 0]
    for name in ("gptq", "gptq_v2"):
        assert np.array_equal(decode_zeros(encode_zeros(zeros, 4, name), 4, name), zeros)


@given(values_and_bits(st.just(4)))
def test_four_bit_rows_match_compressed_tensors(case: tuple[np.ndarray, int]) -> None:
    """compressed-tensors packs the same words and reads ours, along both axes."""
    values, bits = case
    signed = torch.from_numpy(values.astype(np.int16) - 8).to(torch.int8)
    words = pack_rows(values, bits)
    assert np.array_equal(words, pack_to_int32(signed, bits, packed_dim=0).numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), bits, signed.shape, packed_dim=0), signed)
    columns = torch.from_numpy(pack_cols(np.ascontiguousarray(values.T), bits))
    assert torch.equal(unpack_from_int32(columns, bits, signed.T.shape, packed_dim=1), signed.T)


@given(values_and_bits(st.integers(2, 8)))
def test_words_match_a_bit_by_bit_reference(case: tuple[np.ndarray, int]) -> None:
    """Every width, the word-straddling ones included, is one dense little-endian bit stream."""
    values, bits = case
    expected = np.stack([slow_words(column, bits) for column in values.T], axis=1)
    assert np.array_equal(pack_rows(values, bits), expected)


@given(values_and_bits(st.integers(2, 8)))
def test_unpack_inverts_pack(case: tuple[np.ndarray, int]) -> None:
    """No value is lost on either axis."""
    values, bits = case
    assert np.array_equal(unpack_rows(pack_rows(values, bits), bits), values)
    turned = np.ascontiguousarray(values.T)
    assert np.array_equal(unpack_cols(pack_cols(turned, bits), bits), turned)


@settings(max_examples=30)
@given(values_and_bits(st.sampled_from([3, 4])), st.data())
def test_one_flipped_bit_is_one_wrong_code(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    """The decoder notices any single damaged bit, and only the code it belongs to changes."""
    values, bits = case
    words = pack_rows(values, bits)
    row, column = data.draw(st.integers(0, words.shape[0] - 1)), data.draw(st.integers(0, words.shape[1] - 1))
    bit = data.draw(st.integers(0, 31))
    damaged = words.copy()
    damaged.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
    changed = np.argwhere(unpack_rows(damaged, bits) != values).tolist()
    assert changed == [[(32 * row + bit) // bits, column]]


def test_bad_input_names_the_limit() -> None:
    """Cut-off axes, codes that need more bits and unknown formats are refused with what would fit."""
    with pytest.raises(UsageError, match="multiple of 8"):
        pack_rows(np.zeros((12, 2), np.uint8), 4)
    with pytest.raises(UsageError, match="multiple of 32"):
        pack_cols(np.zeros((2, 40), np.uint8), 3)
    with pytest.raises(UsageError, match="< 8"):
        pack_rows(np.full((32, 2), 8, np.uint8), 3)
    with pytest.raises(UsageError, match="multiple of 3"):
        unpack_rows(np.zeros((4, 1), np.int32), 3)
    with pytest.raises(UsageError, match="gptq_v2"):
        encode_zeros(np.ones((1, 8), np.uint8), 4, "awq")
