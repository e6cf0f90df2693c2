"""Bits of ggml's 256-weight superblocks: codes, 6-bit integers and fp16 numbers in, block bytes out, and back.

A superblock holds 256 neighbouring columns of one row. The structs are `block_q4_K` and `block_q3_K` of ggml's
`ggml-common.h`; fields are little-endian. In float32, with the operations in this order:

    Q4_K:  value = (d * sc) * q - (dmin * mn)      8 groups of 32 columns, sc and mn in 0..63
    Q3_K:  value = (d * sc) * (q - 4)             16 groups of 16 columns, sc in -32..31, stored + 32
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.gguf.pack import F16, U8
from l4q.errors import UsageError
from l4q.k_grids import SUPERBLOCK

SUPERBLOCK_BYTES = {"Q4_K": 2 + 2 + 12 + 128, "Q3_K": 32 + 64 + 12 + 2}
"""Bytes per superblock: 4.5 and 3.4375 bits a weight."""

Q4_K_GROUPS = 8
Q3_K_GROUPS = 16
Q3_K_BIAS = 32
"""What Q3_K adds to its integer scales before storing them."""


def pack_q4_k(codes: U8, scales: F16, sub_scales: U8, mins: F16, sub_mins: U8) -> U8:
    """Rows of Q4_K superblocks.

        byte  0 1 | 2 3  | 4 .... 15 | 16 ................................ 143
              d   | dmin | sc and mn | byte 32 j + l: q[64 j + l] | q[64 j + l + 32] << 4,  j = 0..3, l = 0..31

        bytes 4 + k, 8 + k, 12 + k (k = 0..3) hold the integers of groups k and k + 4:
            sc[k] | (sc[k + 4] >> 4) << 6,   mn[k] | (mn[k + 4] >> 4) << 6,   sc[k + 4] & 15 | (mn[k + 4] & 15) << 4

    Args:
        codes: uint8 [rows, columns], values 0..15, columns a multiple of 256.
        scales: d, float16 [rows, columns / 256].
        sub_scales: sc, uint8 [rows, columns / 32], values 0..63.
        mins: dmin, float16 [rows, columns / 256].
        sub_mins: mn, uint8 [rows, columns / 32], values 0..63.

    Returns:
        uint8 [rows, columns / 256 * 144].

    Raises:
        UsageError: A value is out of range, or a shape does not match.
    """
    blocks = _blocks(codes, 16)
    halves = blocks.reshape(*blocks.shape[:2], 4, 2, 32)  # [rows, superblocks, 4, low or high, 32]
    quants = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*blocks.shape[:2], 128)
    sc = _integers(codes, sub_scales, Q4_K_GROUPS, 64)
    mn = _integers(codes, sub_mins, Q4_K_GROUPS, 64)
    return _join((_half_bytes(codes, scales), _half_bytes(codes, mins), pack_scales_q4_k(sc, mn), quants))


def pack_scales_q4_k(sc: U8, mn: U8) -> U8:
    """The 12 bytes of a Q4_K superblock's integers, [rows, superblocks, 12], from two [rows, superblocks, 8]."""
    packed = (
        sc[..., :4] | (sc[..., 4:] >> 4) << 6,
        mn[..., :4] | (mn[..., 4:] >> 4) << 6,
        sc[..., 4:] & 15 | (mn[..., 4:] & 15) << 4,
    )
    return np.concatenate(packed, axis=-1)


def unpack_q4_k(packed: U8) -> tuple[U8, F16, U8, F16, U8]:
    """Codes, d, sc, dmin and mn of Q4_K rows, shaped as `pack_q4_k` takes them."""
    scale, minimum, low_sc, low_mn, high, quants = _split(packed, (2, 2, 4, 4, 4, 128))
    bytes_ = quants.reshape(*quants.shape[:2], 4, 1, 32)
    codes = np.concatenate((bytes_ & 15, bytes_ >> 4), axis=-2)  # [rows, superblocks, 4, low or high, 32]
    sc = np.concatenate((low_sc & 63, high & 15 | low_sc >> 6 << 4), axis=-1)
    mn = np.concatenate((low_mn & 63, high >> 4 | low_mn >> 6 << 4), axis=-1)
    rows = len(packed)
    return codes.reshape(rows, -1), _halves(scale), sc.reshape(rows, -1), _halves(minimum), mn.reshape(rows, -1)


def pack_q3_k(codes: U8, scales: F16, sub_scales: U8) -> U8:
    """Rows of Q3_K superblocks.

        bytes 0..31     bit i of byte l:             q[32 i + l] >> 2,              i = 0..7,  l = 0..31
        bytes 32..95    bits 2 j of byte 32 h + l:   q[128 h + 32 j + l] & 3,       h = 0, 1,  j = 0..3
        bytes 96..107   sc, below
        bytes 108, 109  d

        with t = sc + 32: byte 96 + k = t[k] & 15 | (t[k + 8] & 15) << 4 for k = 0..7, and bits 2 j of byte 104 + k
        = t[4 j + k] >> 4 for k, j = 0..3.

    Args:
        codes: uint8 [rows, columns], values 0..7, columns a multiple of 256.
        scales: d, float16 [rows, columns / 256].
        sub_scales: sc, uint8 [rows, columns / 16], values 0..31.

    Returns:
        uint8 [rows, columns / 256 * 110].

    Raises:
        UsageError: A value is out of range, or a shape does not match.
    """
    blocks = _blocks(codes, 8)
    lead = blocks.shape[:2]
    eighths = blocks.reshape(*lead, 8, 32) >> 2  # [rows, superblocks, bit, byte]
    high = np.bitwise_or.reduce(eighths << np.arange(8, dtype=np.uint8)[:, None], axis=-2)
    quarters = blocks.reshape(*lead, 2, 4, 32) & 3  # [rows, superblocks, half, shift, byte]
    low = np.bitwise_or.reduce(quarters << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
    stored = _integers(codes, sub_scales, Q3_K_GROUPS, 32) + np.uint8(Q3_K_BIAS)
    nibbles = stored[..., :8] & 15 | (stored[..., 8:] & 15) << 4
    pairs = stored.reshape(*lead, 4, 4) >> 4  # [rows, superblocks, shift, byte]
    tops = np.bitwise_or.reduce(pairs << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
    return _join((high, low.reshape(*lead, 64), nibbles, tops, _half_bytes(codes, scales)))


def unpack_q3_k(packed: U8) -> tuple[U8, F16, npt.NDArray[np.int8]]:
    """Codes, d and sc (int8, -32..31) of Q3_K rows, shaped as `pack_q3_k` takes them."""
    high, low, nibbles, tops, scale = _split(packed, (32, 64, 8, 4, 2))
    lead, rows = high.shape[:2], len(packed)
    bits = high[:, :, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [rows, superblocks, 8, 32]
    pairs = low.reshape(*lead, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = (pairs.reshape(*lead, SUPERBLOCK) | bits.reshape(*lead, SUPERBLOCK) << 2).astype(np.uint8, copy=False)
    fourths = tops[:, :, None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # [rows, superblocks, 4, 4]
    stored = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1) | fourths.reshape(*lead, Q3_K_GROUPS) << 4
    sub_scales = (stored.astype(np.int8) - np.int8(Q3_K_BIAS)).reshape(rows, -1)
    return codes.reshape(rows, -1), _halves(scale), sub_scales


def _blocks(codes: U8, limit: int) -> U8:
    """Codes by superblock, [rows, superblocks, 256]."""
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] % SUPERBLOCK:
        raise UsageError(
            "codes do not fill superblocks",
            got=f"{codes.dtype} {codes.shape}",
            expected=f"uint8 [rows, a multiple of {SUPERBLOCK}]",
        )
    if codes.size and int(codes.max()) >= limit:
        raise UsageError("code out of range", got=int(codes.max()), expected=f"values below {limit}")
    return codes.reshape(len(codes), -1, SUPERBLOCK)


def _integers(codes: U8, values: U8, groups: int, limit: int) -> U8:
    """Integer scales or mins by superblock, [rows, superblocks, groups]."""
    shape = (len(codes), codes.shape[1] // SUPERBLOCK * groups)
    if values.dtype != np.uint8 or values.shape != shape:
        raise UsageError(
            "group integers do not match the codes", got=f"{values.dtype} {values.shape}", expected=f"uint8 {shape}"
        )
    if values.size and int(values.max()) >= limit:
        raise UsageError("group integer out of range", got=int(values.max()), expected=f"values below {limit}")
    return values.reshape(len(codes), -1, groups)


def _half_bytes(codes: U8, values: F16) -> U8:
    """One fp16 per superblock as bytes, [rows, superblocks, 2]."""
    shape = (len(codes), codes.shape[1] // SUPERBLOCK)
    if values.dtype != np.float16 or values.shape != shape:
        raise UsageError(
            "superblock numbers do not match the codes",
            got=f"{values.dtype} {values.shape}",
            expected=f"float16 {shape}",
        )
    return np.ascontiguousarray(values.astype("<f2"))[:, :, None].view(np.uint8)


def _halves(data: U8) -> F16:
    return np.ascontiguousarray(data).view("<f2").astype(np.float16)[..., 0]


def _join(fields: tuple[npt.NDArray[np.integer[Any]], ...]) -> U8:
    joined = np.concatenate(fields, axis=-1, dtype=np.uint8, casting="no")  # [rows, superblocks, superblock bytes]
    return joined.reshape(len(joined), -1)


def _split(packed: U8, sizes: tuple[int, ...]) -> list[U8]:
    if packed.ndim != 2 or packed.shape[1] % sum(sizes):
        raise UsageError(
            "not whole superblocks", got=packed.shape, expected=f"[rows, a multiple of {sum(sizes)} bytes]"
        )
    blocks = packed.reshape(len(packed), -1, sum(sizes))  # [rows, superblocks, superblock bytes]
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)
