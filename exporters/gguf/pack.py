"""Bits of ggml's 32-weight blocks: integer codes and fp16 scales in, block bytes out, and back.

Every block holds 32 neighbouring columns of one row. In each layout byte j of the nibble field carries column j in its
low half and column j + 16 in its high half. The structs are `block_q4_0`, `block_q4_1` and `block_q5_0` of ggml's
`ggml-common.h`; fields are little-endian.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from l4q.errors import UsageError

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]

BLOCK = 32
"""Columns per block, in all three types."""

BLOCK_BYTES = {"Q4_0": 2 + 16, "Q4_1": 2 + 2 + 16, "Q5_0": 2 + 4 + 16}
"""Bytes per block: scale, then min or high bits, then nibbles."""

_HALF = BLOCK // 2
_BIT_INDEX = np.arange(BLOCK, dtype=np.uint32)


def pack_q4_0(codes: U8, scales: F16) -> U8:
    """Rows of Q4_0 blocks, value = d * (q - 8).

        byte  0 1 | 2 ........ 17
              d   | q[j] | q[j + 16] << 4

    Args:
        codes: uint8 [rows, columns], values 0..15, columns a multiple of 32.
        scales: float16 [rows, groups]; each group spans a whole number of blocks.

    Returns:
        uint8 [rows, columns / 32 * 18].

    Raises:
        UsageError: A code does not fit four bits, or the shapes do not divide.
    """
    nibbles = _nibble_bytes(codes, 16)
    return _join((_scale_bytes(codes, scales), nibbles))


def unpack_q4_0(packed: U8) -> tuple[U8, F16]:
    """Codes [rows, columns] and per-block scales [rows, columns / 32] of Q4_0 rows."""
    scale, nibbles = _split(packed, (2, 16))
    return _codes_from_nibbles(nibbles), _halves(scale)


def pack_q4_1(codes: U8, scales: F16, mins: F16) -> U8:
    """Rows of Q4_1 blocks, value = d * q + m.

        byte  0 1 | 2 3 | 4 ........ 19
              d   | m   | q[j] | q[j + 16] << 4

    Args:
        codes: uint8 [rows, columns], values 0..15, columns a multiple of 32.
        scales: float16 [rows, groups].
        mins: float16 [rows, groups], the value of code 0.

    Returns:
        uint8 [rows, columns / 32 * 20].

    Raises:
        UsageError: A code does not fit four bits, or the shapes do not divide.
    """
    nibbles = _nibble_bytes(codes, 16)
    return _join((_scale_bytes(codes, scales), _scale_bytes(codes, mins), nibbles))


def unpack_q4_1(packed: U8) -> tuple[U8, F16, F16]:
    """Codes [rows, columns], per-block scales and per-block mins [rows, columns / 32] of Q4_1 rows."""
    scale, minimum, nibbles = _split(packed, (2, 2, 16))
    return _codes_from_nibbles(nibbles), _halves(scale), _halves(minimum)


def pack_q5_0(codes: U8, scales: F16) -> U8:
    """Rows of Q5_0 blocks, value = d * (q - 16).

        byte  0 1 | 2 3 4 5                         | 6 ........ 21
              d   | uint32, bit j = q[j] >> 4 & 1   | q[j] & 15 | (q[j + 16] & 15) << 4

    Args:
        codes: uint8 [rows, columns], values 0..31, columns a multiple of 32.
        scales: float16 [rows, groups].

    Returns:
        uint8 [rows, columns / 32 * 22].

    Raises:
        UsageError: A code does not fit five bits, or the shapes do not divide.
    """
    nibbles = _nibble_bytes(codes, 32)
    blocks = codes.reshape(len(codes), -1, BLOCK)  # [rows, blocks, 32]
    high = np.bitwise_or.reduce((blocks >> 4).astype(np.uint32) << _BIT_INDEX, axis=-1)  # [rows, blocks]
    high_bytes = high.astype("<u4")[:, :, None].view(np.uint8)  # [rows, blocks, 4]
    return _join((_scale_bytes(codes, scales), high_bytes, nibbles))


def unpack_q5_0(packed: U8) -> tuple[U8, F16]:
    """Codes [rows, columns] and per-block scales [rows, columns / 32] of Q5_0 rows."""
    scale, high_bytes, nibbles = _split(packed, (2, 4, 16))
    high = np.ascontiguousarray(high_bytes).view("<u4")  # [rows, blocks, 1]
    bits = ((high >> _BIT_INDEX) & 1).astype(np.uint8)  # [rows, blocks, 32]
    fifth: U8 = np.left_shift(bits, 4, dtype=np.uint8).reshape(len(packed), -1)
    return _codes_from_nibbles(nibbles) | fifth, _halves(scale)


def _nibble_bytes(codes: U8, limit: int) -> U8:
    """The 16 nibble bytes of every block, [rows, blocks, 16]."""
    if codes.ndim != 2 or codes.shape[1] % BLOCK:
        raise UsageError("codes do not fill blocks", got=codes.shape, expected=f"[rows, a multiple of {BLOCK}]")
    if codes.size and int(codes.max()) >= limit:
        raise UsageError("code out of range", got=int(codes.max()), expected=f"values below {limit}")
    blocks = codes.reshape(len(codes), -1, BLOCK)  # [rows, blocks, 32]
    low: U8 = blocks[..., :_HALF] & np.uint8(15)
    high: U8 = np.left_shift(blocks[..., _HALF:], 4, dtype=np.uint8)
    return low | high


def _codes_from_nibbles(nibbles: U8) -> U8:
    """Inverse of `_nibble_bytes` up to the fifth bit: [rows, blocks, 16] to [rows, columns]."""
    codes: U8 = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)  # [rows, blocks, 32]
    return codes.reshape(len(nibbles), -1)


def _scale_bytes(codes: U8, scales: F16) -> U8:
    """One fp16 per block, repeated over the blocks of its group: [rows, blocks, 2]."""
    blocks = codes.shape[1] // BLOCK
    if scales.dtype != np.float16 or scales.ndim != 2 or len(scales) != len(codes) or blocks % scales.shape[1]:
        raise UsageError(
            "group parameters do not match the codes",
            got=f"{scales.dtype} {scales.shape}",
            expected=f"float16 [{len(codes)}, a divisor of {blocks} blocks]",
        )
    per_block = np.repeat(scales, blocks // scales.shape[1], axis=1)  # [rows, blocks]
    return per_block.astype("<f2")[:, :, None].view(np.uint8)


def _halves(data: U8) -> F16:
    """[rows, blocks, 2] bytes to float16 [rows, blocks]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float16)[..., 0]


def _join(fields: tuple[U8, ...]) -> U8:
    joined = np.concatenate(fields, axis=-1)  # [rows, blocks, block bytes]
    return joined.reshape(len(joined), -1)


def _split(packed: U8, sizes: tuple[int, ...]) -> list[U8]:
    if packed.ndim != 2 or packed.shape[1] % sum(sizes):
        raise UsageError("not whole blocks", got=packed.shape, expected=f"[rows, a multiple of {sum(sizes)} bytes]")
    blocks = packed.reshape(len(packed), -1, sum(sizes))  # [rows, blocks, block bytes]
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)
