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
    """Pack codes uint8 [rows, in_features] into uint8 [rows, row_bytes].

    The codes of a word, one per byte, are read as one integer whose fields are joined pair by pair: every pass halves
    their number, over many codes at once, where picking every n-th code would walk through memory once for each.
    """
    rows, in_features = codes.shape
    per_word, word_bytes = _WORD[bits]
    padded = -(-in_features // per_word) * per_word
    if padded != in_features:
        codes = np.pad(codes, ((0, 0), (0, padded - in_features)))
    words = np.ascontiguousarray(codes).view(f"<u{per_word}")  # [rows, words]
    for lane in (8 << level for level in range(per_word.bit_length() - 1)):  # bits between the beginnings of two fields
        field = lane // 8 * bits
        words = words | words >> words.dtype.type(lane - field)
        words &= words.dtype.type(sum(((1 << 2 * field) - 1) << at for at in range(0, 8 * per_word, 2 * lane)))
    if word_bytes == 1:
        packed: U8 = words.astype(np.uint8)
    else:
        stream = words[:, :, None].view(np.uint8)[:, :, :word_bytes]  # [rows, words, bytes per word]
        packed = stream.reshape(rows, -1)
    return np.ascontiguousarray(packed[:, : row_bytes(in_features, bits)])


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
