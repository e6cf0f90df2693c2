"""Codes along in_features to words along out_features, without one byte per code in between.

A checkpoint's row of 4-bit codes, read as little-endian uint32, is q[8w] | q[8w+1] << 4 | ... | q[8w+7] << 28. GPTQ's
words are these, transposed; those of AWQ and ONNX hold eight neighbouring rows instead, so every 8 x 8 square of
nibbles is transposed too. `exporters.words`, `exporters.awq.pack` and `exporters.onnx.pack` say the same code by code;
the tests compare the two on every shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from l4q.ahead import spread
from l4q.weight import U8

U32 = npt.NDArray[np.uint32]
Scalar = TypeVar("Scalar", bound=np.generic)

PIECE_BYTES = 2 << 20
"""Bytes of a result that are made at a time, by each thread."""
STRIP_BYTES = 256 << 10
"""Bytes whose squares are transposed at a time: they stay in the processor's cache."""
_NIBBLES = 8
_LINES = 4
# Distance of the rows that trade, and the nibbles that the upper one gives.
_STAGES = ((2, 0x00FF00FF), (1, 0x0F0F0F0F))


def as_words(packed: U8) -> U32:
    """Rows of bytes as little-endian words, the last one filled up with zeros: uint32 [rows, ceil(bytes / 4)]."""
    missing = -packed.shape[1] % 4
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32, copy=False)


def transposed_words(words: U32) -> Iterator[U32]:
    """Rows of the transpose of uint32 [N, W], in order: uint32 [some of W, N]."""
    rows, count = words.shape
    pieces = _ranges(count, PIECE_BYTES // (4 * rows))
    yield from spread(lambda columns: transposed(words[:, columns]), pieces)


def transposed_nibbles(
    packed: U8, columns: int, order: Sequence[int] = range(_NIBBLES), flip: int = 0
) -> Iterator[U32]:
    """Rows of 4-bit codes along in_features to rows along out_features.

    Args:
        packed: uint8 [N, ceil(K / 2)], N a multiple of 8.
        columns: K.
        order: Which of eight neighbouring rows each nibble of a word holds, lowest first.
        flip: Bits to turn over in every nibble.

    Yields:
        uint32 [some of K, N / 8], in order.
    """
    words = as_words(packed)
    groups = len(words) // _NIBBLES
    mask = np.uint32(flip * 0x11111111)

    def piece_of(chosen: slice) -> U32:
        width = chosen.stop - chosen.start
        lines = np.empty((_LINES, groups, 2, width), dtype=np.uint32)
        for number, row in enumerate(order):
            half, line = divmod(number, _LINES)
            np.bitwise_xor(words[row::_NIBBLES, chosen], mask, out=lines[line, :, half])
        # Of two rows that lie 4 apart, the halves of their words come together: four columns of both in a word.
        halves = transposed(lines.reshape(-1, width).view(np.uint16))
        piece = halves.view(np.uint32).reshape(2 * width, _LINES, groups)
        for strip in _ranges(len(piece), STRIP_BYTES // (2 * len(words))):
            _transpose_squares(piece[strip])
        return piece.reshape(-1, groups)[: columns - chosen.start * _NIBBLES]

    yield from spread(piece_of, _ranges(words.shape[1], PIECE_BYTES // (4 * len(words))))


def transposed(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """A transposed copy of [rows, columns], by torch, whose kernel is some times faster than NumPy's."""
    import torch

    whole = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}"))
    copy: npt.NDArray[Scalar] = whole.t().contiguous().numpy().view(array.dtype)
    return copy


def _transpose_squares(lines: U32) -> None:
    """Transpose squares of 4 x 4 nibbles in place: uint32 [columns / 4, 4, groups] with two squares a word.

    The rows of a square, along axis 1, trade halves with those 2 apart, then single nibbles with their neighbours.
    """
    traded = np.empty((lines.shape[0], _LINES // 2, lines.shape[2]), dtype=np.uint32)
    for distance, nibbles in _STAGES:
        shift, kept = np.uint32(4 * distance), np.uint32(nibbles)
        pairs = lines.reshape(len(lines), -1, 2, distance, lines.shape[2])
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        swapped = traded.reshape(low.shape)
        np.right_shift(low, shift, out=swapped)
        swapped ^= high
        swapped &= kept
        high ^= swapped
        swapped <<= shift
        low ^= swapped


def _ranges(count: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
