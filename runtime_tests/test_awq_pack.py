"""AWQ words against golden values and compressed-tensors' AutoAWQ decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from hypothesis import given
from hypothesis import strategies as st

from exporters.awq.pack import ORDER, pack_awq, unpack_awq
from exporters.words import pack_cols
from l4q.errors import UsageError


@st.composite
def fields(draw: st.DrawFn) -> np.ndarray:
    """uint8 [rows, a multiple of 8] below 16."""
    shape = (draw(st.integers(1, 12)), 8 * draw(st.integers(1, 5)))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 16, shape, dtype=np.uint8)


def foreign(words: np.ndarray) -> np.ndarray:
    """compressed-tensors' reading of AutoAWQ words, unsigned."""
    packed = torch.from_numpy(words)
    values, zeros = AutoAWQConverter.unpack_awq(packed, packed, 4)
    values, zeros = AutoAWQConverter.reverse_awq_order(values, zeros, 4)
    assert zeros is not None
    assert torch.equal(values, zeros)  # codes and zero-points share the layout
    return (values & 15).to(torch.uint8).numpy()


def test_golden_word() -> None:
    """Columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up."""
    assert [f"{word:08x}" for word in pack_awq(np.arange(8, dtype=np.uint8)[None]).view(np.uint32)[0]] == ["75316420"]


@given(fields())
def test_foreign_decoder_reads_our_words(values: np.ndarray) -> None:
    """compressed-tensors returns every value in its column."""
    words = pack_awq(values)
    assert words.dtype == np.int32
    assert words.shape == (values.shape[0], values.shape[1] // 8)
    assert np.array_equal(foreign(words), values)


@given(fields())
def test_unpack_inverts_pack(values: np.ndarray) -> None:
    """No value is lost or moved."""
    assert np.array_equal(unpack_awq(pack_awq(values)), values)


@given(fields(), st.data())
def test_one_flipped_bit_is_one_wrong_value(values: np.ndarray, data: st.DataObject) -> None:
    """Nibble j of a word is column ORDER[j], so a damaged nibble shows in that column alone."""
    words = pack_awq(values)
    row, word = data.draw(st.integers(0, words.shape[0] - 1)), data.draw(st.integers(0, words.shape[1] - 1))
    bit = data.draw(st.integers(0, 31))
    words.view(np.uint32)[row, word] ^= np.uint32(1 << bit)
    assert np.argwhere(foreign(words) != values).tolist() == [[row, 8 * word + ORDER[bit // 4]]]


def test_natural_order_is_noticed() -> None:
    """GPTQ's nibble order read as AWQ's puts six of eight columns in the wrong place."""
    values = np.arange(8, dtype=np.uint8)[None]
    assert int((foreign(pack_cols(values, 4)) != values).sum()) == 6


def test_bad_input_names_the_limit() -> None:
    """Columns that do not fill words and values above 15 are refused."""
    with pytest.raises(UsageError, match="multiple of 8"):
        pack_awq(np.zeros((2, 12), np.uint8))
    with pytest.raises(UsageError, match="< 16"):
        pack_awq(np.full((1, 8), 16, np.uint8))
