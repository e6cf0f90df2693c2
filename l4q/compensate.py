"""Rounding whose errors later columns make up for (GPTQ, Frantar et al., arXiv 2210.17323, algorithm 1).

Columns are rounded one after another. What column c loses is spread over the columns not yet rounded, so that the
layer's output on the calibration inputs changes least; the inverse of their Gram matrix says how. The weight that comes
out is what every column was at the moment it was rounded: round-to-nearest of it gives GPTQ's codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from l4q.calibrate import search_grid
from l4q.config import QuantConfig
from l4q.init import Start
from l4q.quant import grid_params

DAMPING = 0.01
"""Of the Gram matrix's mean diagonal, added to its diagonal."""

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""One column's weights [out] -> the same rounded to the grid of its group."""


class Compensated(NamedTuple):
    """A weight with its grid."""

    weight: torch.Tensor
    """[out, in] float32."""
    start: Start
    """Its s and b, [out, groups] each."""


@torch.no_grad()
def compensate(weight: torch.Tensor, gram: torch.Tensor, quant: QuantConfig) -> Compensated:
    """A layer's weight and searched grid after error compensation.

    Args:
        weight: [out, in], any float dtype.
        gram: Sum of x x^T over the layer's inputs, [in, in] float32.
        quant: The grid, no K grid: there a group's grid depends on its neighbours', which are not chosen yet.
    """
    found: list[Start] = []
    moments = gram.diagonal()

    def begin(group: torch.Tensor, columns: slice) -> Rounding:
        start = search_grid(group, quant, moments[columns])
        found.append(start)
        params = grid_params(start.scales, start.offsets, quant)
        s, m = params.scales[:, 0], params.mins[:, 0]
        return lambda column: ((column - m) / s).round_().clamp_(0, quant.max_code) * s + m

    moved = spread_errors(weight, gram, quant.resolve_group_size(weight.shape[1]), begin)
    scales, offsets = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return Compensated(moved, Start(scales, offsets))


@torch.no_grad()
def spread_errors(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, begin: Callable[[torch.Tensor, slice], Rounding]
) -> torch.Tensor:
    """Every column as it was when it was rounded.

    Args:
        weight: [out, in], any float dtype.
        gram: As in `compensate`; columns that no input reaches become 0.
        group_size: Columns per group, dividing in.
        begin: Called with each group's columns [out, group_size] as they are when the first of them is reached, and
            which they are; returns how they are rounded.

    Returns:
        [out, in] float32.
    """
    work = weight.detach().float().clone()
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    work[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)  # rows hold how an error spreads to later columns
    for start in range(0, work.shape[1], group_size):
        columns = slice(start, start + group_size)
        rounded = begin(work[:, columns].contiguous(), columns)
        errors = torch.empty(work.shape[0], group_size, device=work.device)
        for column in range(start, columns.stop):
            error = (work[:, column] - rounded(work[:, column])) / factor[column, column]
            work[:, column + 1 : columns.stop].addr_(error, factor[column, column + 1 : columns.stop], alpha=-1)
            errors[:, column - start] = error
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return work
