"""Post-training grids of the baselines: min-max with an integer zero-point, and torchao's symmetric one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from l4q.quant import SCALE_MAX, SCALE_MIN
from l4q.weight import QuantizedWeight


class Grid(NamedTuple):
    """Scales [out, groups] that are exact in fp16, and whole zero-points [out, groups], both float32."""

    scales: torch.Tensor
    zeros: torch.Tensor


def minmax_grid(weight: torch.Tensor, bits: int, group_size: int) -> Grid:
    """The usual asymmetric grid: s = (max - min) / (2**bits - 1), z = round(-min / s), zero inside the range.

    Zero-points are kept in [1, 2**bits - 1], which GPTQ's first format can store.

    Args:
        weight: [out, in] float32.
        bits: Bits per code.
        group_size: Columns per scale, dividing in.
    """
    top = (1 << bits) - 1
    grouped = weight.view(weight.shape[0], -1, group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = fp16((high - low) / top)
    return Grid(scales, (-low / scales).round().clamp(1, top))


def torchao_grid(weight: torch.Tensor, bits: int, group_size: int) -> Grid:
    """torchao's symmetric IntX grid: s = max|W| / ((2**bits - 1) / 2), zero-point in the middle."""
    grouped = weight.view(weight.shape[0], -1, group_size)
    scales = fp16(grouped.abs().amax(-1) / (((1 << bits) - 1) / 2))
    return Grid(scales, torch.full_like(scales, float(1 << (bits - 1))))


def fp16(scales: torch.Tensor) -> torch.Tensor:
    """Nearest positive fp16 values, as float32."""
    return scales.clamp(SCALE_MIN, SCALE_MAX).half().float()


def codes_on(weight: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    """Nearest codes, float32 [out, in]: clamp(round(W / s + z), 0, 2**bits - 1)."""
    grouped = weight.view(*grid.scales.shape, -1)
    position = grouped / grid.scales.unsqueeze(-1) + grid.zeros.unsqueeze(-1)
    return position.round().clamp(0, (1 << bits) - 1).view(weight.shape)


def pack(codes: torch.Tensor, grid: Grid, bits: int, name: str) -> QuantizedWeight:
    """Codes and grid as the value that exporters pack."""
    return QuantizedWeight(
        codes=codes.to(torch.uint8).cpu().numpy(),
        scales=grid.scales.half().cpu().numpy(),
        zeros=grid.zeros.to(torch.uint8).cpu().numpy(),
        bits=bits,
        group_size=codes.shape[1] // grid.scales.shape[1],
        name=name,
    )


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int, name: str = "") -> QuantizedWeight:
    """Round-to-nearest on the min-max grid."""
    plain = weight.detach().float()
    grid = minmax_grid(plain, bits, group_size)
    return pack(codes_on(plain, grid, bits), grid, bits, name)


def stored_bits(weight: QuantizedWeight) -> int:
    """Bits the weight takes in its own checkpoint: codes, fp16 scales, zero-points."""
    per_group = 16
    if weight.zeros is not None and not np.all(weight.zeros == 1 << (weight.bits - 1)):
        per_group += weight.bits
    if weight.mins is not None:
        per_group += 16
    return weight.bits * weight.codes.size + per_group * weight.scales.size
