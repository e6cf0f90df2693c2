"""Facts about ggml's K grids, on which scales (and mins) are an fp16 number times a small integer.

Columns come in superblocks of 256 that share the fp16 numbers; each group in a superblock has its own integers. The
structs are `block_q4_K` and `block_q3_K` of ggml's `ggml-common.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SUPERBLOCK: Final = 256
"""Columns that share one fp16 scale (and one fp16 min)."""

FALLBACK_BITS: Final = 4
FALLBACK_GROUP: Final = 32
"""Grid of layers whose rows superblocks do not fill: GGUF keeps codes of 3 bits in 4-bit blocks all the same."""


@dataclass(frozen=True, kw_only=True)
class KGrid:
    """What a K grid fixes."""

    bits: int
    group_size: int
    """Columns per integer scale."""
    top: int
    """The largest integer scale and min; the smallest scale is 1, the smallest min 0."""
    zero_points: tuple[str, ...]
    """Kinds of zero-point it holds."""

    @property
    def groups(self) -> int:
        """Groups per superblock."""
        return SUPERBLOCK // self.group_size


K_GRIDS: Final[dict[str, KGrid]] = {
    "q4_k": KGrid(bits=4, group_size=32, top=63, zero_points=("none", "float")),
    "q3_k": KGrid(bits=3, group_size=16, top=31, zero_points=("none",)),
}
