"""The checkpoint's dense code rows: a little-endian bit stream along in_features, every row padded to whole bytes.

4 bits: byte j = code 2j | code 2j+1 << 4
3 bits: bytes 3j .. 3j+2, read as one little-endian 24-bit word = sum(code 8j+k << 3k, k = 0..7)
2 bits: byte j = code 4j | code 4j+1 << 2 | code 4j+2 << 4 | code 4j+3 << 6
"""

from __future__ import annotations

import numpy as np

from l4q.weight import U8

# bits -> (codes, bytes) of the smallest run of whole bytes
_WORD = {2: (4, 1), 3: (8, 3), 4: (2, 1)}


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of one packed row."""
    return (in_features * bits + 7) // 8


def pack_codes(codes: U8, bits: int) -> U8:
    """Pack codes uint8 [rows, in_features] into uint8 [rows, row_bytes]."""
    rows, in_features = codes.shape
    per_word, word_bytes = _WORD[bits]
    padded = -(-in_features // per_word) * per_word
    if padded != in_features:
        codes = np.pad(codes, ((0, 0), (0, padded - in_features)))
    fields = codes.reshape(rows, padded // per_word, per_word)  # [rows, words, codes per word]
    word = np.dtype("u1" if word_bytes == 1 else "<u4")  # no wider than needed: memory traffic is what packing costs
    words = np.zeros(fields.shape[:2], dtype=word)
    for k in range(per_word):
        words |= fields[:, :, k].astype(word) << word.type(bits * k)
    stream = words[:, :, None].view(np.uint8)[:, :, :word_bytes]  # [rows, words, bytes per word]
    return np.ascontiguousarray(stream.reshape(rows, -1)[:, : row_bytes(in_features, bits)])


def unpack_codes(packed: U8, in_features: int, bits: int) -> U8:
    """Inverse of `pack_codes`: uint8 [rows, row_bytes] to codes uint8 [rows, in_features]."""
    rows = packed.shape[0]
    per_word, word_bytes = _WORD[bits]
    words_per_row = -(-in_features // per_word)
    missing = words_per_row * word_bytes - packed.shape[1]
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    stream = packed.reshape(rows, words_per_row, word_bytes)
    words = np.zeros((rows, words_per_row), dtype=np.uint32)
    for k in range(word_bytes):
        words |= stream[:, :, k].astype(np.uint32) << np.uint32(8 * k)
    codes = np.empty((rows, words_per_row, per_word), dtype=np.uint8)
    for k in range(per_word):
        codes[:, :, k] = (words >> np.uint32(bits * k)) & np.uint32((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :in_features])
