"""Units and integers of K grids: the least that hold a superblock, dtypes, zeros, and what is on the grid already."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from l4q import k_snap
from l4q.k_grids import K_GRIDS, KGrid
from l4q.quant import ceil_scales

GRIDS = pytest.mark.parametrize("grid", K_GRIDS.values(), ids=K_GRIDS)
Split = Callable[..., k_snap.Units]
TINY = 2.0**-24


def on_grid(grid: KGrid, dtype: torch.dtype) -> torch.Tensor:
    """Values [2, 2 superblocks] that are units times integers, the largest integer among them."""
    generator = torch.Generator().manual_seed(0)
    units = (torch.rand(2, 2, generator=generator) * 0.01 + 0.001).to(torch.float16).to(dtype)
    integers = torch.randint(1, grid.top + 1, (2, 2 * grid.groups), generator=generator).to(dtype)
    integers[:, :: grid.groups] = grid.top
    return k_snap.join(k_snap.Units(units, integers))


@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", [k_snap.split, k_snap.split_above])
def test_grid_values_stay(split: Split, dtype: torch.dtype, grid: KGrid) -> None:
    """Value, unit and integer of what is on the grid already, in the dtype it came in."""
    values = on_grid(grid, dtype)
    parts = split(values, grid, least=1)
    assert (parts.units.dtype, parts.integers.dtype) == (dtype, dtype)
    assert torch.equal(k_snap.join(parts), values)
    assert parts.integers.max() == grid.top
    assert torch.equal(parts.units, values[:, :: grid.groups] / grid.top)


@GRIDS
@pytest.mark.parametrize("split", [k_snap.split, k_snap.split_above])
def test_a_superblock_of_zeros(split: Split, grid: KGrid) -> None:
    """No unit and no integer where zero is allowed; else the least of both."""
    zeros = torch.zeros(1, grid.groups)
    parts = split(zeros, grid, least=0)
    assert parts.units.tolist() == [[0.0]]
    assert parts.integers.tolist() == [[0.0] * grid.groups]
    parts = split(zeros, grid, least=1)
    assert parts.units.tolist() == [[TINY]]
    assert parts.integers.tolist() == [[1.0] * grid.groups]


@GRIDS
def test_split_above_is_the_least_that_is_not_below(grid: KGrid) -> None:
    """Neither unit nor integer could be one step less."""
    values = torch.rand(50, 3 * grid.groups, generator=torch.Generator().manual_seed(1)) + 1e-3
    parts = k_snap.split_above(values, grid, least=1)
    joined = k_snap.join(parts)
    assert (joined >= values).all()
    less = k_snap.join(parts._replace(integers=parts.integers - 1))
    assert ((less < values) | (parts.integers == 1)).all()
    half = parts.units.to(torch.float16)
    below = (half.view(torch.int16) - 1).view(torch.float16).float()
    largest = values.view(50, 3, grid.groups).amax(-1)
    assert torch.equal(half.float(), parts.units)
    assert (below * grid.top < largest).all()
    assert torch.equal(ceil_scales(values, "q4_k" if grid.top == 63 else "q3_k"), joined)
