"""Scales and mins on a K grid, on plain tensors: value = unit * index.

A superblock of 256 columns shares one fp16 unit (ggml's d or dmin); each of its groups has an integer index (sc or mn).
The unit is the smallest fp16 number whose largest multiple reaches the largest value of the superblock; every index is
the nearest, except that of the largest value, which is rounded up, so that the widest group never gets narrower.
Splitting what `join` returns gives the same units and indices again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from l4q.k_grids import KGrid

# Float32 noise must not push a unit to the next fp16 number: values may be this much larger than a grid value and still
# count as it. It is less than what the last sentence above needs, 1 / (63 * 1024): a unit of k * 2**-24, k < 1024, is
# kept as long as the largest index exceeds 63 * (k - 1) / k, and if it does, it does so by 1 / k at least.
_TOLERANCE = 1 - 2.0**-17


class Units(NamedTuple):
    """Values on a K grid, taken apart; both in the dtype of the values."""

    units: torch.Tensor
    """[rows, superblocks], fp16 numbers >= 0."""
    integers: torch.Tensor
    """[rows, groups], whole numbers."""


def split(values: torch.Tensor, grid: KGrid, *, least: int) -> Units:
    """The nearest grid values.

    Args:
        values: [rows, groups], >= 0, groups a multiple of `grid.groups`.
        grid: The K grid.
        least: Smallest index: 1 for scales, which must stay positive, 0 for mins.
    """
    grouped, top = _superblocks(values, grid)
    units = _ceil_half(top * (_TOLERANCE / grid.top), least)
    ratio = torch.where(units > 0, grouped / units, 0)
    index = torch.where(grouped == top, (ratio * _TOLERANCE).ceil(), ratio.round())
    return Units(units.squeeze(-1), index.clamp(least, grid.top).flatten(1))


def split_above(values: torch.Tensor, grid: KGrid, *, least: int) -> Units:
    """Grid values that are not below `values`; arguments as of `split`, which leaves the result as it is."""
    grouped, top = _superblocks(values, grid)
    units = _ceil_half(top / grid.top, least)
    units = torch.where(units * grid.top < top, _next_half(units), units)
    index = torch.where(units > 0, grouped / units, 0).ceil()
    index = torch.where(index * units < grouped, index + 1, index)
    return Units(units.squeeze(-1), index.clamp(least, grid.top).flatten(1))


def join(parts: Units) -> torch.Tensor:
    """Values [rows, groups]; exact in float32, 11 and 6 significant bits."""
    (rows, superblocks), groups = parts.units.shape, parts.integers.shape[1]
    return (parts.integers.view(rows, superblocks, groups // superblocks) * parts.units.unsqueeze(-1)).flatten(1)


def _superblocks(values: torch.Tensor, grid: KGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, superblocks, groups] and the largest of each superblock."""
    rows, groups = values.shape
    grouped = values.detach().reshape(rows, groups // grid.groups, grid.groups)
    return grouped, grouped.amax(-1, keepdim=True)


def _ceil_half(values: torch.Tensor, least: int) -> torch.Tensor:
    """The smallest fp16 numbers not below `values`; if `least` is 1, positive ones."""
    half = values.to(torch.float16).to(values.dtype)
    above = torch.where(half < values, _next_half(half), half)
    return above.clamp(min=least * 2.0**-24)


def _next_half(values: torch.Tensor) -> torch.Tensor:
    """The fp16 numbers one above non-negative fp16 numbers."""
    return (values.to(torch.float16).view(torch.int16) + 1).view(torch.float16).to(values.dtype)
