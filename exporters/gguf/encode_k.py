"""Q4_K and Q3_K: which weights they hold exactly, and the superblock numbers of those weights.

Made for checkpoints on the K grids, whose numbers are stored as they are. A fp16-grid weight whose groups are whole
superblocks fits too, with integer scales of 1: on request, as its default types have less activation noise.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from exporters.gguf.pack import F16, U8
from exporters.gguf.pack_k import Q3_K_GROUPS, Q4_K_GROUPS, pack_q3_k, pack_q4_k
from l4q.checkpoint import WeightInfo
from l4q.k_grids import SUPERBLOCK
from l4q.weight import GroupParameters, QuantizedWeight

_Scalar = TypeVar("_Scalar", np.float16, np.uint8)

TYPE_OF_GRID = {"q4_k": "Q4_K", "q3_k": "Q3_K"}
"""The block type that is a K grid."""


class Numbers(NamedTuple):
    """What a K type stores beside the codes, in the arguments' order of `pack_q4_k`."""

    scales: F16
    sub_scales: U8
    mins: F16
    sub_mins: U8


def off_superblocks(info: WeightInfo) -> str:
    """Why a weight's scales cannot be those of a K type, or ""."""
    if info.in_features % SUPERBLOCK:
        return f"in_features {info.in_features} is no multiple of {SUPERBLOCK}"
    if info.k_grid is None and info.group_size % SUPERBLOCK:
        return f"groups of {info.group_size} columns are on the fp16 grid, not on a K grid or in multiples of 256"
    return ""


def q4_k_numbers(weight: GroupParameters) -> Numbers:
    """D, sc, dmin and mn; dmin is infinite where fp16 cannot hold it.

    A symmetric weight has dmin = 2**(bits-1) * d and mn = sc, an integer zero-point dmin = d and mn = z: then every
    product is exact in float32, and the difference is (q - z) * s exactly.
    """
    scales = _per_superblock(weight, weight.scales)
    ones = np.ones((weight.out_features, weight.in_features // SUPERBLOCK * Q4_K_GROUPS), dtype=np.uint8)
    sub_scales = ones if weight.sub_scales is None else weight.sub_scales
    if weight.mins is not None:
        sub_mins = ones if weight.sub_mins is None else weight.sub_mins
        return Numbers(scales, sub_scales, -_per_superblock(weight, weight.mins), sub_mins)
    if weight.zeros is not None:
        zeros = np.repeat(_per_superblock(weight, weight.zeros), Q4_K_GROUPS, axis=1)
        return Numbers(scales, sub_scales, scales, zeros)
    with np.errstate(over="ignore"):
        mins = (scales.astype(np.float32) * (1 << (weight.bits - 1))).astype(np.float16)
    return Numbers(scales, sub_scales, mins, sub_scales)


def encode_q4_k(weight: QuantizedWeight) -> U8:
    """Rows of Q4_K superblocks."""
    return pack_q4_k(weight.codes, *q4_k_numbers(weight))


def encode_q3_k(weight: QuantizedWeight) -> U8:
    """Rows of Q3_K superblocks; a symmetric weight of two bits moves to Q3_K's midpoint."""
    codes = weight.codes + np.uint8(4 - (1 << (weight.bits - 1)))
    scales = _per_superblock(weight, weight.scales)
    ones = np.ones((weight.out_features, weight.in_features // SUPERBLOCK * Q3_K_GROUPS), dtype=np.uint8)
    return pack_q3_k(codes, scales, ones if weight.sub_scales is None else weight.sub_scales)


def _per_superblock(weight: GroupParameters, values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """One value per superblock from one per group of whole superblocks."""
    return np.repeat(values, weight.in_features // SUPERBLOCK // values.shape[1], axis=1)
