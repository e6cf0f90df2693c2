"""One module's integers on a checkpoint's grid: the same weights, or the reason why that grid cannot hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch

from l4q.config import GROUP_MULTIPLE, SUPPORTED_BITS, QuantConfig, ZeroPoint
from l4q.quant import snap_scales
from l4q.starts.grid import LinearGrid
from l4q.weight import QuantizedWeight

KINDS: tuple[ZeroPoint, ...] = get_args(ZeroPoint)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What deciding on a common grid needs to know of one module."""

    bits: int
    group_size: int
    """Coarsest group size that keeps the weights; the source's own unless `join` was asked for."""
    own: str
    """The source's grid in words."""
    columns: int
    seven: bool
    """Whether every scale is on the fp16_s7 grid."""
    refusals: dict[ZeroPoint, str]
    """Why a kind of zero-point cannot hold the module; kinds that can are absent."""

    @property
    def per_row(self) -> bool:
        """Whether a row is one group."""
        return self.group_size == self.columns


def survey(grid: LinearGrid, *, join: bool) -> Survey:
    """Look at a module's values once.

    Args:
        grid: Its integers.
        join: Join neighbouring groups that share their parameters, as far as they do: GGUF repeats those of a large
            group in each of its blocks of 32.
    """
    size, columns = grid.group_size, grid.codes.shape[1]
    if join or size % GROUP_MULTIPLE:
        size = coarsest(grid)
    common = _refused(grid, size)
    found = {kind: common or as_kind(grid, kind) for kind in KINDS}
    return Survey(
        bits=grid.bits,
        group_size=size,
        own=f"{grid.bits} bits, groups of {grid.group_size}, zero-point {grid.kind}",
        columns=columns,
        seven=torch.equal(snap_scales(grid.scales, "fp16_s7"), grid.scales),
        refusals={kind: reason for kind, reason in found.items() if isinstance(reason, str)},
    )


def fit(grid: LinearGrid, quant: QuantConfig, name: str) -> QuantizedWeight | str:
    """The module on the grid of a checkpoint, or why it does not fit.

    Every weight is kept: bits may only grow, groups only become finer or join others of equal parameters.

    Args:
        grid: The source's integers.
        quant: The checkpoint's grid.
        name: Module name.
    """
    size = quant.resolve_group_size(grid.codes.shape[1])
    grouped = grid.regroup(size)
    if grid.bits > quant.bits or grouped is None:
        return f"{grid.bits} bits in groups of {grid.group_size} are not {quant.bits} bits in groups of {size}"
    held = _refused(grouped, size) or as_kind(grouped, quant.zero_point)
    if isinstance(held, str):
        return held
    codes = held.codes
    if held.zeros is None and held.mins is None:  # the code of weight 0 moves to the wider midpoint
        codes = codes + ((1 << (quant.bits - 1)) - (1 << (held.bits - 1)))
    return QuantizedWeight(
        codes=codes.numpy(),
        scales=held.scales.half().numpy(),
        zeros=None if held.zeros is None else held.zeros.numpy(),
        mins=None if held.mins is None else held.mins.half().numpy(),
        bits=quant.bits,
        group_size=size,
        name=name,
    )


def as_kind(grid: LinearGrid, kind: ZeroPoint) -> LinearGrid | str:
    """The same weights with another kind of zero-point, or why that kind cannot hold them."""
    return {"none": _as_none, "integer": _as_integer, "float": _as_float}[kind](grid)


def coarsest(grid: LinearGrid) -> int:
    """The largest multiple of 32, or whole row, that groups can be joined to without changing a weight.

    The grid's own size if there is none.
    """
    columns = grid.codes.shape[1]
    sizes = [size for size in range(columns, GROUP_MULTIPLE - 1, -1) if columns % size == 0]
    whole = [size for size in sizes if size == columns or size % GROUP_MULTIPLE == 0]
    return next((size for size in whole if grid.regroup(size) is not None), grid.group_size)


def _as_none(grid: LinearGrid) -> LinearGrid | str:
    return grid if grid.kind == "none" else "it has zero-points off the midpoint"


def _as_integer(grid: LinearGrid) -> LinearGrid | str:
    """Zero-points in [1, 2**bits - 1]; where one is 0, codes and zero-point move up by one if no code is at the top."""
    if grid.mins is not None:
        return "its mins are not whole numbers of steps (a float zero-point)"
    zeros = grid.points().to(torch.uint8)
    low = zeros == 0
    if not bool(low.any()):
        return replace(grid, zeros=zeros)
    codes = grid.codes.view(*zeros.shape, grid.group_size)  # [out, groups, group_size]
    full = low & (codes.amax(-1) == (1 << grid.bits) - 1)
    if bool(full.any()):
        return f"zero-point 0 in {int(full.sum())} groups, and a checkpoint has those from 1"
    moved = (codes + low.unsqueeze(-1).to(torch.uint8)).view(grid.codes.shape)
    return replace(grid, codes=moved, zeros=zeros + low.to(torch.uint8))


def _as_float(grid: LinearGrid) -> LinearGrid | str:
    mins = grid.mins if grid.mins is not None else -(grid.points() * grid.scales)
    inexact = int((mins.half().float() != mins).sum())
    if inexact:
        return f"the value of code 0 is no fp16 number in {inexact} of {mins.numel()} groups"
    return replace(grid, zeros=None, mins=mins)


def _refused(grid: LinearGrid, size: int) -> str:
    """Why no kind of zero-point can hold a grid, or an empty string."""
    if grid.bits not in SUPPORTED_BITS:
        return f"{grid.bits} bits; a checkpoint holds {', '.join(map(str, SUPPORTED_BITS))}"
    if size % GROUP_MULTIPLE and size != grid.codes.shape[1]:
        return f"groups of {size} columns; a checkpoint has multiples of {GROUP_MULTIPLE}, or whole rows"
    if bool((grid.scales <= 0).any()):
        return "a negative scale beside a float min"
    inexact = int((grid.scales.half().float() != grid.scales).sum())
    return f"{inexact} of {grid.scales.numel()} scales are no fp16 numbers" if inexact else ""
