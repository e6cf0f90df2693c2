"""int32 words that hold a little-endian bit stream: the packing of GPTQ and of compressed-tensors."""

from __future__ import annotations

import numpy as np
import torch

from l4q.bitpack import row_bytes, unpack_codes
from l4q.errors import UsageError


def unpack_words(words: torch.Tensor, count: int, bits: int, where: str) -> torch.Tensor:
    """Unpack rows of words: int32 [rows, ceil(count * bits / 32)] to uint8 [rows, count].

    Value k sits at bits [bits * k, bits * k + bits) of its row's stream; a value may straddle two words.

    Raises:
        UsageError: The words are not int32, or not as many as `count` values need.
    """
    needed = -(-count * bits // 32)
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != needed:
        raise UsageError(
            "packed integers of the wrong size",
            where=where,
            got=f"{str(words.dtype).removeprefix('torch.')} {list(words.shape)}",
            expected=f"int32 [rows, {needed}] for {count} values of {bits} bits",
            remedy="the file is damaged, or packed in another way (3-bit words must be dense: 32 values in 3 words)",
        )
    stream = np.ascontiguousarray(words.numpy().astype("<i4", copy=False)).view(np.uint8)  # [rows, 4 * words]
    if bits == 8:
        return torch.from_numpy(stream[:, :count].copy())
    return torch.from_numpy(unpack_codes(stream[:, : row_bytes(count, bits)], count, bits))
