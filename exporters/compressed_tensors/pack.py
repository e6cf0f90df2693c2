"""compressed-tensors' pack-quantized words: codes along in_features, zero-points along out_features, both unsigned.

With N = out_features, K = in_features, G groups, at 4 bits:

    weight_packed      int32 [N, ceil(K / 8)]   word w of a row = q[8w] | q[8w+1] << 4 | ... | q[8w+7] << 28
    weight_zero_point  int32 [ceil(N / 8), G]   word w of a column = z[8w] | z[8w+1] << 4 | ... | z[8w+7] << 28

At 3 bits the words are dense, 32 values in 3 of them (exporters/words.py), as compressed-tensors >= 0.18 and vLLM's
loader have them; compressed-tensors 0.17 packed ten 3-bit values a word.

The fields hold q and z in [0, 2**bits). compressed-tensors' own functions speak of q - 2**(bits-1) and z - 2**(bits-1)
and add the offset while packing; mixing the two conventions shifts every weight by 8 steps without any error. A last
word that is not full is padded with zeros, which readers cut off (weight_shape).

Source: compressed-tensors 0.20.0, compressors/pack_quantized/helpers.py; vllm 0.32, compressed_tensors_wNa16.py.
"""

from __future__ import annotations

import numpy as np

from exporters.words import I32, WORD_BITS, pack_cols, pack_rows, run_length, unpack_cols, unpack_rows, word_count
from l4q.errors import UsageError
from l4q.weight import U8


def pack_codes(codes: U8, bits: int) -> I32:
    """uint8 [N, K] to weight_packed, int32 [N, ceil(K * bits / 32)].

    Raises:
        UsageError: A code needs more than `bits` bits.
    """
    per_run, _ = run_length(bits)
    words = pack_cols(np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_run))), bits)
    return np.ascontiguousarray(words[:, : word_count(codes.shape[1], bits)])


def unpack_codes(words: I32, bits: int, columns: int) -> U8:
    """Inverse of `pack_codes`, with K = `columns`.

    Raises:
        UsageError: The words are too few.
    """
    values = unpack_cols(np.pad(words, ((0, 0), (0, -words.shape[1] % run_length(bits)[1]))), bits)
    _check(words.shape[1] * WORD_BITS // bits, columns)
    return np.ascontiguousarray(values[:, :columns])


def pack_zeros(zeros: U8, bits: int) -> I32:
    """uint8 [N, G] to weight_zero_point, int32 [ceil(N * bits / 32), G].

    Raises:
        UsageError: A zero-point needs more than `bits` bits.
    """
    per_run, _ = run_length(bits)
    words = pack_rows(np.pad(zeros, ((0, -zeros.shape[0] % per_run), (0, 0))), bits)
    return words[: word_count(zeros.shape[0], bits)]


def unpack_zeros(words: I32, bits: int, rows: int) -> U8:
    """Inverse of `pack_zeros`, with N = `rows`.

    Raises:
        UsageError: The words are too few.
    """
    values = unpack_rows(np.pad(words, ((0, -words.shape[0] % run_length(bits)[1]), (0, 0))), bits)
    _check(words.shape[0] * WORD_BITS // bits, rows)
    return values[:rows]


def _check(got: int, expected: int) -> None:
    if got < expected:
        raise UsageError("packed words are cut off", got=f"{got} values", expected=f"at least {expected}")
