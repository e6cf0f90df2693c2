"""AWQ's words: eight 4-bit values of neighbouring columns each, in an order of their own.

Nibble j of word w, counted from the lowest, holds column 8w + ORDER[j]:

    word w = v[8w+0] | v[8w+2] << 4 | v[8w+4] << 8 | v[8w+6] << 12 | v[8w+1] << 16 | v[8w+3] << 20 | ...

Both codes [K, N] and zero-points [G, N] are packed so, along N = out_features.

Source: vllm 0.32, layers/quantization/auto_awq.py, whose _REVERSE_AWQ_PACK_ORDER [0, 4, 1, 5, 2, 6, 3, 7] is the
inverse of ORDER.
"""

from __future__ import annotations

import numpy as np

from exporters.words import I32, pack_cols, unpack_cols
from l4q.errors import UsageError
from l4q.weight import U8

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(values: U8) -> I32:
    """uint8 [rows, N] with values < 16 to int32 [rows, N / 8].

    Raises:
        UsageError: N is not a multiple of 8, or a value needs more than 4 bits.
    """
    rows, columns = values.shape
    if columns % PER_WORD:
        raise UsageError(
            "a packed axis must fill whole words", got=f"{columns} values", expected=f"multiple of {PER_WORD}"
        )
    words = values.reshape(rows, columns // PER_WORD, PER_WORD)[:, :, ORDER]  # [rows, words, nibbles]
    return pack_cols(words.reshape(rows, columns), BITS)


def unpack_awq(words: I32) -> U8:
    """Inverse of `pack_awq`: int32 [rows, N / 8] to uint8 [rows, N]."""
    rows, count = words.shape
    nibbles = unpack_cols(words, BITS).reshape(rows, count, PER_WORD)
    values = np.empty_like(nibbles)
    values[:, :, ORDER] = nibbles
    return values.reshape(rows, count * PER_WORD)
