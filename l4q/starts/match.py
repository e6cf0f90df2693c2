"""From a start's own grid to trainable s and b whose forward reproduces its weights, if the asked grid allows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from l4q.config import QuantConfig
from l4q.init import Start
from l4q.quant import SCALE_MAX, SCALE_MIN, grid_params, snap_scales
from l4q.starts.grid import GridKind, LinearGrid

# kind of the start's grid -> kinds of zero-point that can hold it, the narrowest first
HELD_BY: dict[GridKind, tuple[str, ...]] = {
    "none": ("none", "integer", "float"),
    "integer": ("integer", "float"),
    "float": ("float",),
}


def match_grid(grid: LinearGrid, quant: QuantConfig) -> Start | str:
    """Initial s and b that give exactly the start's scales and zero-points, or why the grid cannot hold them.

    s is the start's scale; b = (2**(bits-1) - z) * s for integer zero-points and m + 2**(bits-1) * s for float mins.
    """
    if grid.bits != quant.bits or quant.zero_point not in HELD_BY[grid.kind]:
        return mismatch(grid, quant)
    grouped = grid.regroup(quant.resolve_group_size(grid.codes.shape[1]))
    if grouped is None:
        return mismatch(grid, quant)
    scales = grouped.scales
    if not torch.equal(snap_scales(scales, "fp16"), scales):
        return f"a scale is no fp16 number in [{SCALE_MIN:.3g}, {SCALE_MAX:g}], so that no grid holds it"
    if not torch.equal(snap_scales(scales, quant.scale_grid), scales):
        return f"scale_grid {quant.scale_grid} does not hold the start's scales; --scale-grid fp16 would"
    if grouped.mins is None:
        offsets = (quant.midpoint - grouped.points()) * scales
        wanted = -(grouped.points() * scales)
    else:
        offsets, wanted = grouped.mins + quant.midpoint * scales, grouped.mins
    params = grid_params(scales, offsets, quant)
    if not torch.equal(params.mins, wanted):
        limits = "an fp16 number" if quant.zero_point == "float" else f"in [1, {quant.max_code}]"
        return f"a zero-point is not {limits}"
    return Start(scales, offsets)


def mismatch(grid: LinearGrid, quant: QuantConfig) -> str:
    """One sentence: the grid asked for, and the one that would reproduce the start bit for bit."""
    asked = f"{quant.bits} bits, group size {quant.group_size}, zero-point {quant.zero_point}"
    if grid.bits == 8:
        return f"{asked} was asked for and the start has 8 bits, which no grid holds"
    size = -1 if grid.scales.shape[1] == 1 else grid.group_size
    own = f"--bits {grid.bits} --group-size {size} --zero-point {grid.kind} --scale-grid fp16"
    return f"{asked} was asked for; {own} would reproduce the start bit for bit"


def fit_scale_grid(grids: Iterable[LinearGrid], quant: QuantConfig) -> QuantConfig:
    """The asked grid, with scale_grid fp16 instead of fp16_s7 if that is what it takes to hold the start's scales."""
    if quant.scale_grid != "fp16_s7":  # K grids fix the group size, which the fp16 grid may not take
        return quant
    wide = replace(quant, scale_grid="fp16")
    for grid in grids:
        if isinstance(match_grid(grid, wide), Start) and isinstance(match_grid(grid, quant), str):
            return wide
    return quant
