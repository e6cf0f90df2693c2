"""Dense tensors from a file: a NaN in one of them is a NaN in every answer of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from l4q.errors import UsageError

if TYPE_CHECKING:
    import torch


def require_finite(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor itself, of any shape and dtype, unless it holds NaN or infinity. Takes no memory of its own.

    Raises:
        UsageError: It does.
    """
    if tensor.numel() and tensor.is_floating_point():
        wide = tensor if tensor.element_size() > 1 else tensor.float()  # torch has no extremes of float8
        low, high = (float(value) for value in wide.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UsageError(
                "a dense tensor holds NaN or infinite values",
                where=where,
                got=f"[{low}, {high}]",
                expected="finite values",
                remedy="the file is damaged, or its training diverged: use another checkpoint",
            )
    return tensor
