"""Blocks from a checkpoint's packed rows, some rows at a time; where codes are stored as they are, without unpacking.

Both sides keep two codes a byte and differ in which two: a checkpoint's byte holds neighbours, a block's byte columns j
and j + 16 (Q4_0, Q4_1) or j + 32 (Q4_K). `exporters.gguf.encode` says the same code by code; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from exporters.gguf.encode import block_mins, encode
from exporters.gguf.encode_k import q4_k_numbers
from exporters.gguf.pack import BLOCK, U8
from exporters.gguf.pack_k import pack_scales_q4_k
from l4q.k_grids import SUPERBLOCK
from l4q.packed_weight import PackedWeight

_WORD = 8
_LOW_NIBBLES = np.uint16(0x0F0F)
_HIGH_BYTE = np.uint16(4)
"""How far a byte's high nibble is from the low nibble of the next byte."""
_NIBBLE = np.uint64(4)

_Q4_0 = np.dtype([("d", "<f2"), ("qs", "V16")])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "V16")])
_Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "V12"), ("qs", "V128")])


def encode_pieces(
    weight: PackedWeight, encoding: str, order: npt.NDArray[np.integer[Any]] | None = None
) -> Iterator[npt.NDArray[np.generic]]:
    """The tensor's data in file order: uint8 rows of blocks, or float32 rows for "F32".

    Args:
        weight: What to store.
        encoding: A name that `exporters.gguf.encode.choose_encoding` has given it.
        order: The order of its rows in the file; as they are if None.
    """
    direct = _DIRECT.get(encoding)
    if encoding == "Q4_0" and weight.zero_point != "none":
        direct = None  # a zero-point of its own moves every group's codes
    for rows in weight.row_slices():
        part = weight.take(rows if order is None else order[rows])
        yield encode(part.unpack(), encoding) if direct is None else direct(part)


def paired(fields: U8, half: int) -> U8:
    """Nibbles j and j + half of every 2 * half in one byte, from neighbours in one byte.

    Args:
        fields: uint8 [rows, columns / 2], columns a multiple of 2 * half.
        half: A multiple of 16.

    Returns:
        uint8 [rows, columns / 2].
    """
    wide = fields.astype(np.uint16)  # two codes a byte, then one
    wide |= wide << _HIGH_BYTE
    wide &= _LOW_NIBBLES
    count = half // _WORD  # words of half a block
    words = wide.view(np.uint64).reshape(len(fields), -1, 2, count)  # [rows, blocks, half, words]
    result = np.empty((len(fields), words.shape[1], count), dtype=np.uint64)
    for word in range(count):
        np.left_shift(words[:, :, 1, word], _NIBBLE, out=result[:, :, word])
        result[:, :, word] |= words[:, :, 0, word]
    return result.reshape(len(fields), -1).view(np.uint8)


def _q4_0(weight: PackedWeight) -> U8:
    blocks = _blocks(weight, _Q4_0, BLOCK, weight.fields(4, 8 - (1 << (weight.bits - 1))))
    _spread(blocks["d"], weight.scales)
    return _as_bytes(blocks)


def _q4_1(weight: PackedWeight) -> U8:
    blocks = _blocks(weight, _Q4_1, BLOCK, weight.fields(4))
    _spread(blocks["d"], weight.scales)
    _spread(blocks["m"], block_mins(weight)[0])
    return _as_bytes(blocks)


def _q4_k(weight: PackedWeight) -> U8:
    blocks = _blocks(weight, _Q4_K, SUPERBLOCK, weight.fields(4))
    numbers = q4_k_numbers(weight)
    blocks["d"], blocks["dmin"] = numbers.scales, numbers.mins
    shape = (*blocks.shape, -1)
    packed = pack_scales_q4_k(numbers.sub_scales.reshape(shape), numbers.sub_mins.reshape(shape))
    blocks["scales"] = packed.view("V12")[..., 0]
    return _as_bytes(blocks)


_DIRECT: Final[dict[str, Callable[[PackedWeight], U8]]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _blocks(weight: PackedWeight, kind: np.dtype[np.void], columns: int, fields: U8) -> npt.NDArray[np.void]:
    """Blocks [rows, blocks] with their codes filled in; bytes pair codes of the halves of 32 or of 64 columns."""
    blocks = np.empty((weight.out_features, weight.in_features // columns), dtype=kind)
    codes = paired(fields, 16 if columns == BLOCK else 32)
    blocks["qs"] = codes.view(kind["qs"])
    return blocks


def _spread(target: npt.NDArray[np.float16], values: npt.NDArray[np.float16]) -> None:
    """Give every block its group's value."""
    target.reshape(*values.shape, -1)[...] = values[:, :, None]


def _as_bytes(blocks: npt.NDArray[np.void]) -> U8:
    return blocks.view(np.uint8).reshape(len(blocks), -1)
