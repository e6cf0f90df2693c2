"""pack-quantized words against golden values and compressed-tensors' own packer and unpacker."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from exporters.compressed_tensors.pack import pack_codes, pack_zeros, unpack_codes, unpack_zeros
from l4q.errors import UsageError


@st.composite
def fields(draw: st.DrawFn) -> np.ndarray:
    """uint8 values below 16, any shape: last words that are not full included."""
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 16, shape, dtype=np.uint8)


def signed(values: np.ndarray) -> torch.Tensor:
    """compressed-tensors' convention: int8, lowered by 8."""
    return torch.from_numpy(values.astype(np.int16) - 8).to(torch.int8)


def test_golden_words() -> None:
    """Codes run along in_features, zero-points along out_features, lowest nibble first, short words padded with 0."""
    values = np.arange(10, dtype=np.uint8)
    assert [f"{word:08x}" for word in pack_codes(values[None], 4).view(np.uint32)[0]] == ["76543210", "00000098"]
    assert [f"{word:08x}" for word in pack_zeros(values[:, None], 4).view(np.uint32)[:, 0]] == ["76543210", "00000098"]


@given(fields())
def test_codes_match_compressed_tensors(codes: np.ndarray) -> None:
    """Its packer makes our weight_packed out of its signed codes, and its unpacker reads ours."""
    words = pack_codes(codes, 4)
    assert words.dtype == np.int32
    assert np.array_equal(words, pack_to_int32(signed(codes), 4).numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), 4, torch.Size(codes.shape)), signed(codes))


@given(fields())
def test_zero_points_match_compressed_tensors(zeros: np.ndarray) -> None:
    """The same for weight_zero_point, which is packed along dim 0."""
    words = pack_zeros(zeros, 4)
    assert np.array_equal(words, pack_to_int32(signed(zeros), 4, packed_dim=0).numpy())
    back = unpack_from_int32(torch.from_numpy(words), 4, torch.Size(zeros.shape), packed_dim=0)
    assert torch.equal(back, signed(zeros))


@given(fields())
def test_unpack_inverts_pack(values: np.ndarray) -> None:
    """No value is lost on either axis."""
    assert np.array_equal(unpack_codes(pack_codes(values, 4), 4, values.shape[1]), values)
    assert np.array_equal(unpack_zeros(pack_zeros(values, 4), 4, values.shape[0]), values)


@given(fields(), st.data())
def test_one_flipped_bit_is_one_wrong_code(codes: np.ndarray, data: st.DataObject) -> None:
    """The foreign unpacker sees exactly the damaged code."""
    words = pack_codes(codes, 4)
    row, column = data.draw(st.integers(0, codes.shape[0] - 1)), data.draw(st.integers(0, codes.shape[1] - 1))
    words.view(np.uint32)[row, column // 8] ^= np.uint32(1 << (4 * (column % 8)))
    back = unpack_from_int32(torch.from_numpy(words), 4, torch.Size(codes.shape))
    assert torch.argwhere(back != signed(codes)).tolist() == [[row, column]]


def test_mixed_conventions_are_noticed() -> None:
    """Signed codes taken for unsigned ones (q - 8 modulo 16) come back wrong in every place, by 8 steps."""
    codes = np.random.default_rng(0).integers(0, 16, (4, 16), dtype=np.uint8)
    words = torch.from_numpy(pack_codes((codes - np.uint8(8)) & np.uint8(15), 4))
    back = unpack_from_int32(words, 4, torch.Size(codes.shape))
    assert bool(((back - signed(codes)).abs() == 8).all())


def test_bad_input_names_the_limit() -> None:
    """Values above 15 and words that are too few are refused."""
    with pytest.raises(UsageError, match="< 16"):
        pack_codes(np.full((1, 8), 16, np.uint8), 4)
    with pytest.raises(UsageError, match="at least 9"):
        unpack_codes(np.zeros((1, 1), np.int32), 4, 9)
    with pytest.raises(UsageError, match="at least 17"):
        unpack_zeros(np.zeros((2, 3), np.int32), 4, 17)
