"""int32 words as GPTQ, AWQ and compressed-tensors fill them: one little-endian bit stream along an axis.

Value k of the stream sits at bits [bits*k, bits*k + bits); bit b of the stream is bit b % 32 of word b // 32:

    4 bits:  word w = v[8w] | v[8w+1] << 4 | ... | v[8w+7] << 28
    3 bits:  32 values fill 3 words; v[10] straddles words 0 and 1, v[21] words 1 and 2

    word 0                    word 1                     word 2
    v0 v1 .. v9 v10(2 bits) | v10(1 bit) v11 .. v20 v21(1 bit) | v21(2 bits) v22 .. v31

The 3-bit layout is AutoGPTQ's and GPTQModel's (gptqmodel 7.7.0, nn_modules/qlinear/__init__.py, PackableQuantLinear).
"""

from __future__ import annotations

from math import gcd

import numpy as np
import numpy.typing as npt

from l4q.errors import UsageError
from l4q.weight import U8

I32 = npt.NDArray[np.int32]

WORD_BITS = 32


def run_length(bits: int) -> tuple[int, int]:
    """(values, words) of the shortest run of values that fills whole words: (8, 1) at 4 bits, (32, 3) at 3."""
    common = gcd(WORD_BITS, bits)
    return WORD_BITS // common, bits // common


def word_count(values: int, bits: int) -> int:
    """Words that hold `values` values without gaps."""
    return -(-values * bits // WORD_BITS)


def pack_rows(values: U8, bits: int) -> I32:
    """Pack along axis 0: uint8 [K, N] with values < 2**bits to int32 [K * bits / 32, N].

    Raises:
        UsageError: K * bits is not a multiple of 32, or a value needs more than `bits` bits.
    """
    per_run, words_per_run = run_length(bits)
    length, columns = values.shape
    if length % per_run:
        raise UsageError(
            "a packed axis must fill whole words", got=f"{length} values", expected=f"multiple of {per_run}"
        )
    if values.size and int(values.max()) >> bits:
        raise UsageError("a code does not fit its bits", got=int(values.max()), expected=f"< {1 << bits}")
    runs = values.reshape(length // per_run, per_run, columns)  # [runs, values per run, N]
    words = np.zeros((length // per_run, words_per_run, columns), dtype=np.uint32)
    for position in range(per_run):
        word, shift = divmod(position * bits, WORD_BITS)
        field = runs[:, position].astype(np.uint32)
        words[:, word] |= field << np.uint32(shift)
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= field >> np.uint32(WORD_BITS - shift)
    return words.reshape(-1, columns).view(np.int32)


def unpack_rows(words: I32, bits: int) -> U8:
    """Inverse of `pack_rows`: int32 [K * bits / 32, N] to uint8 [K, N].

    Raises:
        UsageError: The words do not hold whole runs of values.
    """
    per_run, words_per_run = run_length(bits)
    count, columns = words.shape
    if count % words_per_run:
        raise UsageError("packed words are cut off", got=f"{count} words", expected=f"multiple of {words_per_run}")
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    runs = unsigned.reshape(count // words_per_run, words_per_run, columns)  # [runs, words per run, N]
    values = np.empty((runs.shape[0], per_run, columns), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for position in range(per_run):
        word, shift = divmod(position * bits, WORD_BITS)
        field = runs[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            field = field | (runs[:, word + 1] << np.uint32(WORD_BITS - shift))
        values[:, position] = field & mask
    return values.reshape(-1, columns)


def pack_cols(values: U8, bits: int) -> I32:
    """Pack along axis 1: uint8 [G, N] to int32 [G, N * bits / 32], the layout of qzeros.

    Raises:
        UsageError: As `pack_rows`.
    """
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray(values.T), bits).T)


def unpack_cols(words: I32, bits: int) -> U8:
    """Inverse of `pack_cols`: int32 [G, N * bits / 32] to uint8 [G, N].

    Raises:
        UsageError: As `unpack_rows`.
    """
    return np.ascontiguousarray(unpack_rows(np.ascontiguousarray(words.T), bits).T)
