"""Codes along in_features to words along out_features, without one byte per code in between.

A checkpoint's row of 4-bit codes, read as little-endian uint32, is q[8w] | q[8w+1] << 4 | ... | q[8w+7] << 28. GPTQ's
words are these, transposed; those of AWQ and ONNX hold eight neighbouring rows instead, so every 8 x 8 square of
nibbles is transposed too. `exporters.words`, `exporters.awq.pack` and `exporters.onnx.pack` say the same code by code;
the tests compare the two on every shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from l4q.weight import U8

U32 = npt.NDArray[np.uint32]

PIECE_BYTES = 4 << 20
"""Bytes of a result that are in memory at a time."""
_STRIP = 16
"""Rows that are transposed at a time: a cache line of uint32, the fastest by measurement."""
_NIBBLES = 8
# One stage per bit of a nibble's index: (distance of the rows that trade, nibbles the upper one gives).
_STAGES = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))


def as_words(packed: U8) -> U32:
    """Rows of bytes as little-endian words, the last one filled up with zeros: uint32 [rows, ceil(bytes / 4)]."""
    missing = -packed.shape[1] % 4
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32, copy=False)


def transposed_words(words: U32) -> Iterator[U32]:
    """Rows of the transpose of uint32 [N, W], in order: uint32 [some of W, N]."""
    rows, count = words.shape
    for columns in _ranges(count, PIECE_BYTES // (4 * rows)):
        piece = np.empty((columns.stop - columns.start, rows), dtype=np.uint32)
        for strip in _ranges(rows, _STRIP):
            piece[:, strip] = words[strip, columns].T
        yield piece


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
    for chosen in _ranges(words.shape[1], PIECE_BYTES // (4 * len(words))):
        width = chosen.stop - chosen.start
        piece = np.empty((width, _NIBBLES, groups), dtype=np.uint32)
        for strip in _ranges(groups, _STRIP):
            rows = words[strip.start * _NIBBLES : strip.stop * _NIBBLES, chosen].reshape(-1, _NIBBLES, width)
            squares = _transposed_squares(rows[:, order].transpose(1, 0, 2))
            for position, square in enumerate(squares ^ mask if flip else squares):
                piece[:, position, strip] = square.T
        yield piece.reshape(-1, groups)[: columns - chosen.start * _NIBBLES]


def _transposed_squares(lines: U32) -> U32:
    """Transpose the squares of 8 x 8 nibbles whose rows are lines[0..7]: uint32 [8, groups, W], in a copy.

    Rows trade halves with those 4 apart, then quarters with those 2 apart, then single nibbles with their neighbours.
    """
    result = np.ascontiguousarray(lines)
    for distance, mask in _STAGES:
        shift, kept = np.uint32(4 * distance), np.uint32(mask)
        pairs = result.reshape(-1, 2, distance, *lines.shape[1:])
        low, high = pairs[:, 0], pairs[:, 1]
        traded = low >> shift
        traded ^= high
        traded &= kept
        high ^= traded
        traded <<= shift
        low ^= traded
    return result


def _ranges(count: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
