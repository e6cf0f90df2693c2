"""`FullLinear`: a linear layer whose every weight trains through the quantizer (full quantization-aware training)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from l4q.compensate import Compensated
from l4q.config import QuantConfig
from l4q.init import Start
from l4q.kernels.problem import Kernels, Problem
from l4q.kernels.select import kernels_for
from l4q.quant import GridParams, LoraUpdate, grid_params


class FullFunction(torch.autograd.Function):
    """W_q = Q(W) with the exact LSQ gradients of W, s and m."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor,
        max_code: int,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Quantize; W is [out, in] in the dtype of s and m [out, groups], the result [out, in] in `dtype`."""
        ctx.save_for_backward(weight, scales, mins)
        ctx.max_code, ctx.kernels = max_code, kernels
        nothing = LoraUpdate(weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0), 0.0)
        with torch.autocast(weight.device.type, enabled=False):
            return kernels.quantize(Problem(weight, nothing, GridParams(scales, mins, mins), max_code), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of W, s and m; what is recomputed is less than what would have to be kept."""
        weight, scales, mins = ctx.saved_tensors
        found = ctx.kernels.weight_gradients(weight, GridParams(scales, mins, mins), ctx.max_code, grads[0])
        return found.weight, found.scales, found.mins, None, None, None


class FullLinear(nn.Module):
    """Parameters: `weight` W [out, in], `scales` s and `offsets` b [out, groups], all float32; `bias` stays as it is.

    Args:
        weight: W and its grid, taken over, not copied.
        bias: Of the layer, or None.
        quant: The grid.
    """

    def __init__(self, weight: Compensated, bias: nn.Parameter | None, quant: QuantConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.weight)
        self.scales = nn.Parameter(weight.start.scales)
        self.offsets = nn.Parameter(weight.start.offsets, requires_grad=quant.zero_point != "none")
        self.bias, self.quant = bias, quant
        self.kept: torch.Tensor | None = None
        """The quantized weight, while it does not change."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out] through the quantized weight; under autocast in its dtype, as torch.nn.Linear."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weight = self.quantized(dtype) if self.kept is None else self.kept.to(dtype)
        return F.linear(x.to(dtype), weight, self.bias)

    def quantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in]; with gradients."""
        params = grid_params(self.scales, self.offsets, self.quant)
        kernels = kernels_for("auto", self.weight.device.type)
        found: torch.Tensor = FullFunction.apply(
            self.weight, params.scales, params.mins, self.quant.max_code, dtype, kernels
        )
        return found

    @torch.no_grad()
    def settled_weight(self, share: float) -> torch.Tensor:
        """W0 drawn that far towards the middles of its codes, [out, in]."""
        return self.weight.lerp(self.quantized(), share)

    @torch.no_grad()
    def start(self, share: float) -> Start:
        """S and b; those of integer zero-points drawn that far towards the middle of what rounds to them."""
        scales, offsets = self.scales.detach(), self.offsets.detach()
        if self.quant.zero_point == "integer":
            params = grid_params(scales, offsets, self.quant)
            offsets = offsets.lerp((self.quant.midpoint - params.zeros) * params.scales, share)
        return Start(scales, offsets)
