"""What kernels are asked (`Problem`), what they answer (`Gradients`), and the interface of all of them (`Kernels`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from l4q.base import BaseWeight
from l4q.quant import GridParams, LoraUpdate


class Problem(NamedTuple):
    """One layer's quantized weight W_q = Q(W0 + scaling * B A), not yet computed."""

    weight: BaseWeight
    """W0 [out, in], dense or packed."""
    update: LoraUpdate
    """A, B and their scaling."""
    params: GridParams
    """Scales and mins [out, groups]; their dtype is the one everything is computed in."""
    max_code: int
    """2**bits - 1."""


class Gradients(NamedTuple):
    """What the backward pass of one layer needs beside dL/dx."""

    quantized: torch.Tensor
    """W_q [out, in] in the dtype of dL/dy, to multiply dL/dy with."""
    a: torch.Tensor
    """dL/dA [rank, in], in the dtype of the scales."""
    b: torch.Tensor
    """dL/dB [out, rank], likewise."""
    scales: torch.Tensor
    """dL/ds [out, groups]."""
    mins: torch.Tensor
    """dL/dm [out, groups]."""


class WeightGradients(NamedTuple):
    """The gradients of one layer whose weight itself trains, all in the dtype of the scales."""

    weight: torch.Tensor
    """dL/dW [out, in]."""
    scales: torch.Tensor
    """dL/ds [out, groups]."""
    mins: torch.Tensor
    """dL/dm [out, groups]."""


class Kernels(Protocol):
    """One way of doing the work."""

    @property
    def name(self) -> str:
        """As in `l4q.config.KernelChoice`."""
        ...

    def quantize(self, problem: Problem, dtype: torch.dtype) -> torch.Tensor:
        """W_q [out, in] in `dtype`."""
        ...

    def codes(self, problem: Problem) -> Iterator[tuple[slice, torch.Tensor]]:
        """The codes that W_q is computed from, for each run of rows: uint8 [rows, in]."""
        ...

    def gradients(self, problem: Problem, x: torch.Tensor, grad_y: torch.Tensor) -> Gradients:
        """Recompute W_q and differentiate it; x is [tokens, in], grad_y [tokens, out], both of one dtype."""
        ...

    def weight_gradients(
        self, weight: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor
    ) -> WeightGradients:
        """Differentiate Q(W) where W itself trains, in the dtype of the scales; grad_w is dL/dW_q [out, in]."""
        ...


def cast_update(update: LoraUpdate, dtype: torch.dtype) -> LoraUpdate:
    """A and B in the dtype of the scales, in which they are merged."""
    return LoraUpdate(update.a.to(dtype), update.b.to(dtype), update.scaling)
