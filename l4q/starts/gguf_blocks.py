"""The integers of GGUF's linear block types, 32 columns a block.

Q4_0: d, 32 nibbles                value = d * (q - 8)          d may be negative, see `LinearGrid.build`
Q4_1: d, m, 32 nibbles             value = d * q + m            integer zero-points where m = -z * d throughout
Q8_0: d, 32 signed bytes           value = d * q                read as codes q + 128
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 32
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Fields = tuple[U8, F32, F32 | None]
"""Codes [rows, columns], scales and mins [rows, blocks]."""


def q4_0_fields(data: U8) -> Fields:
    """Codes and scales of Q4_0 rows, uint8 [rows, blocks * 18]."""
    blocks = data.reshape(len(data), -1, 2 + BLOCK // 2)
    return _nibbles(blocks[..., 2:]), _halves(blocks[..., :2]), None


def q4_1_fields(data: U8) -> Fields:
    """Codes, scales and mins of Q4_1 rows, uint8 [rows, blocks * 20]."""
    blocks = data.reshape(len(data), -1, 4 + BLOCK // 2)
    return _nibbles(blocks[..., 4:]), _halves(blocks[..., :2]), _halves(blocks[..., 2:4])


def q8_0_fields(data: U8) -> Fields:
    """Codes (raised by 128) and scales of Q8_0 rows, uint8 [rows, blocks * 34]."""
    blocks = data.reshape(len(data), -1, 2 + BLOCK)
    codes: U8 = blocks[..., 2:] ^ np.uint8(128)
    return codes.reshape(len(data), -1), _halves(blocks[..., :2]), None


# GGML type -> (bits, reader of its blocks)
LINEAR_TYPES: dict[str, tuple[int, Callable[[U8], Fields]]] = {
    "Q4_0": (4, q4_0_fields),
    "Q4_1": (4, q4_1_fields),
    "Q8_0": (8, q8_0_fields),
}


def integer_points(scales: torch.Tensor, mins: torch.Tensor, top: int) -> torch.Tensor | None:
    """Zero-points z with m = -z * d exactly and z in [0, top] in every block, or None."""
    live = scales != 0
    zeros = torch.where(live, -mins / torch.where(live, scales, 1), 0).round()
    exact = (-zeros * scales == mins) & (zeros >= 0) & (zeros <= top)
    return zeros.to(torch.int64) if bool(exact.all()) else None


def _nibbles(packed: U8) -> U8:
    """[rows, blocks, 16] bytes to codes [rows, blocks * 32]: byte j holds columns j (low) and j + 16 (high)."""
    codes: U8 = np.concatenate((packed & 15, packed >> 4), axis=-1)
    return codes.reshape(len(packed), -1)


def _halves(data: U8) -> F32:
    """[rows, blocks, 2] bytes to float32 [rows, blocks]."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)
