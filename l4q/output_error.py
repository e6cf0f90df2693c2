"""How far a block's outputs are from those wanted: what the reconstruction lowers, block by block."""

from __future__ import annotations

import torch

SINK = 1e4
"""Squared size of a sink, in medians."""


def output_error(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error over squared size, large positions scaled down in both.

    Positions larger than the median count like one of its size. Attention sinks, single positions a hundred times
    longer than that, count like all positions of their sequence together: every later one reads them, and as one among
    hundreds a block that makes a sink would be trained as if it did not matter.

    Args:
        given: [batch, length, hidden], any float dtype.
        wanted: The same shape.

    Returns:
        Float32 scalar, with the gradient of `given`.
    """
    wanted = wanted.float()
    size = wanted.square().sum(-1, keepdim=True)  # [batch, length, 1]
    most = size.median() * torch.where(size > SINK * size.median(), size.shape[1], 1)
    share = (most / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1)
    return (share * (given.float() - wanted).square()).sum() / (share * size).sum()
