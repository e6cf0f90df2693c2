"""GPTQ's two zero-point conventions; the words themselves are those of exporters/words.py."""

from __future__ import annotations

import numpy as np

from l4q.errors import UsageError
from l4q.weight import U8

# checkpoint_format -> what is subtracted from a zero-point before it is stored
ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}


def encode_zeros(zeros: U8, bits: int, checkpoint_format: str) -> U8:
    """Stored zero-points: z - 1 modulo 2**bits for "gptq" (v1), z for "gptq_v2"."""
    return (zeros - np.uint8(_offset(checkpoint_format))) & np.uint8((1 << bits) - 1)


def decode_zeros(stored: U8, bits: int, checkpoint_format: str) -> U8:
    """Inverse of `encode_zeros`."""
    return (stored + np.uint8(_offset(checkpoint_format))) & np.uint8((1 << bits) - 1)


def _offset(checkpoint_format: str) -> int:
    if checkpoint_format not in ZERO_OFFSET:
        raise UsageError(
            "unknown GPTQ checkpoint format", got=checkpoint_format, expected=f"one of {sorted(ZERO_OFFSET)}"
        )
    return ZERO_OFFSET[checkpoint_format]
