"""`L4QLinear`: a linear layer that trains Q(W0 + scaling * B A) with LoRA's memory.

The autograd function keeps only (x, W0, A, B, s, m) and recomputes W, w, q and the mask in backward; the dense
dL/dW_q lives for one layer at a time (paper section 3.2, eqs 16-30). `l4q.kernels` does the elementwise work.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from l4q.base import BaseWeight, MovingBase, PackedBase, base_linear, dense_base
from l4q.checkpoint import WeightInfo
from l4q.config import GridLearning, Init, KernelChoice, LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.init import Start, init_qparams
from l4q.kernels.problem import Kernels, Problem
from l4q.kernels.select import EAGER, kernels_for, require_kernels
from l4q.packed_weight import PackedWeight
from l4q.quant import (
    GridParams,
    LoraUpdate,
    ScaleGradient,
    fake_quantize,
    grid_params,
    merge_lora,
    pack_blocks,
    row_blocks,
)
from l4q.weight import QuantizedWeight

Origin = tuple[torch.Tensor, torch.Tensor]
"""Scales and mins [out, groups] of the grid that a moving W0 was found with."""


def moved(weight: torch.Tensor | PackedBase, origin: Origin | None, params: GridParams) -> BaseWeight:
    """W0 where the grid is now, or where it was if it has no origin."""
    if origin is None:
        return weight
    return MovingBase(
        kept=weight, origin_scales=origin[0], origin_mins=origin[1], scales=params.scales, mins=params.mins
    )


class L4QFunction(torch.autograd.Function):
    """y = x @ W_q^T with W_q = Q(W0 + scaling * B A), and the exact LSQ gradients of s and m."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | PackedBase,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor,
        scaling: float,
        max_code: int,
        kernels: Kernels = EAGER,
        origin: Origin | None = None,
    ) -> torch.Tensor:
        """Merge, quantize, multiply; x is [..., in], the result [..., out] in x's dtype.

        With an `origin` W0 moves with s and m, see `l4q.base.MovingBase`.
        """
        ctx.packed = weight if isinstance(weight, PackedBase) else None
        ctx.save_for_backward(x, None if ctx.packed is not None else weight, lora_a, lora_b, scales, mins)
        ctx.scaling, ctx.max_code, ctx.kernels, ctx.origin = scaling, max_code, kernels, origin
        params = GridParams(scales, mins, mins)
        problem = Problem(moved(weight, origin, params), LoraUpdate(lora_a, lora_b, scaling), params, max_code)
        with torch.autocast(x.device.type, enabled=False):  # it would merge in 16 bits, and freeze does not
            return F.linear(x, kernels.quantize(problem, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A, B, s and m, in float32 but for x's, whatever autocast says around the call."""
        x, weight, lora_a, lora_b, scales, mins = ctx.saved_tensors
        weight = weight if ctx.packed is None else ctx.packed
        update = LoraUpdate(lora_a, lora_b, ctx.scaling)
        params = GridParams(scales, mins, mins)
        problem = Problem(moved(weight, ctx.origin, params), update, params, ctx.max_code)
        with torch.autocast(x.device.type, enabled=False):
            grad_y = grads[0].reshape(-1, grads[0].shape[-1])  # [tokens, out]
            found = ctx.kernels.gradients(problem, x.reshape(-1, x.shape[-1]), grad_y)
            grad_x = (grad_y @ found.quantized).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = found.a.to(lora_a.dtype), found.b.to(lora_b.dtype)
        return grad_x, None, grad_a, grad_b, found.scales, found.mins, None, None, None, None


class L4QLinear(nn.Module):
    """A frozen linear layer with trainable A, B, scales s and offsets b, quantized in every forward.

    Parameters: `weight` W0 [out, in] and `bias` [out] frozen in their own dtype; in float32 `lora_A` [rank, in],
    `lora_B` [out, rank], `scales` s and `offsets` b [out, groups], the last frozen at zero for zero_point "none".

    `start_warmup` turns the layer into plain LoRA, x @ (W0 + scaling * B A)^T, until `start_quantization` initialises s
    and b from the merged weight.

    Args:
        weight: W0, shared, not copied; dense or packed (`l4q.base`).
        bias: Of the layer, or None.
        quant: The grid.
        lora: Rank, scaling and dropout.
        init: How s and b start, see `l4q.init`.
        learning: What of the grid trains.
        qparams: s and b of a pre-quantized start, used instead of `init`; also a LoRA warm-up leaves them.
        moments: E[x_j^2] of the inputs, [in], for init "calibrated".
        kernels: How W_q and its gradients are computed, see `l4q.kernels`; the weights are the same bits either way.

    Raises:
        UsageError: The kernels' compiler is not installed.
    """

    origin_scales: torch.Tensor
    """s and m that W0 was found with, [out, groups]; only if W0 moves with s and b."""
    origin_mins: torch.Tensor
    """See `origin_scales`."""
    quantizing: bool
    """Whether the forward quantizes; False during a LoRA warm-up. Not part of the state dict."""
    adapting: bool
    """False while the layer is to be the original one, x @ W0^T, see `l4q.distill`. Not part of the state dict."""

    def __init__(
        self,
        weight: nn.Parameter | PackedBase,
        bias: nn.Parameter | None,
        quant: QuantConfig,
        lora: LoraConfig,
        *,
        init: Init = "l4q",
        learning: GridLearning | None = None,
        qparams: Start | None = None,
        moments: torch.Tensor | None = None,
        kernels: KernelChoice = "auto",
    ) -> None:
        super().__init__()
        self.moments = moments
        self.quant, self.lora, self.init, self.learning = quant, lora, init, learning or GridLearning()
        self.quantizing = self.adapting = True
        require_kernels(kernels)
        self.kernels = kernels
        self.out_features, self.in_features = weight.shape
        self.gradient_factor = self.learning.gradient_factor(quant, self.in_features)
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(lora.rank, self.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, lora.rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # peft's and torch.nn.Linear's choice of a
        self.keeps_grid = qparams is not None
        start = qparams or init_qparams(dense_base(weight), quant, init, moments)
        self.scales = nn.Parameter(start.scales, requires_grad=self.learning.train_scales)
        trained = self.learning.train_offsets and quant.zero_point != "none"
        self.offsets = nn.Parameter(start.offsets, requires_grad=trained)
        if self.learning.move_base:
            self._remember_grid()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant: QuantConfig,
        lora: LoraConfig,
        *,
        init: Init = "l4q",
        learning: GridLearning | None = None,
        base: nn.Parameter | PackedBase | None = None,
        qparams: Start | None = None,
        moments: torch.Tensor | None = None,
        kernels: KernelChoice = "auto",
    ) -> L4QLinear:
        """Wrap a linear layer, sharing its weight and bias; at step 0 it is round-to-nearest of the same grid.

        `base` replaces the weight, for example by a packed copy of it.
        """
        weight, bias = cast(nn.Parameter, linear.weight), cast("nn.Parameter | None", linear.bias)
        chosen = weight if base is None else base
        grid: dict[str, Any] = {"init": init, "learning": learning, "qparams": qparams, "moments": moments}
        return cls(chosen, bias, quant, lora, kernels=kernels, **grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out] through the quantized merged weight (in a warm-up: the merged weight).

        Under autocast x is cast to its dtype and so is the result, as torch.nn.Linear does; the grid stays in float32.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        lora_a = F.dropout(self.lora_A, self.lora.dropout, self.training) if self.lora.dropout else self.lora_A
        y: torch.Tensor
        if not self.adapting:
            y = base_linear(x, self.weight)
        elif self.quantizing:
            params = self.grid()
            kernels = EAGER if is_compiling() else kernels_for(self.kernels, x.device.type, params.scales.dtype)
            scaling, max_code = self.lora.scaling, self.quant.max_code
            y = L4QFunction.apply(
                x, self.weight, lora_a, self.lora_B, params.scales, params.mins, scaling, max_code, kernels, self.origin
            )
        else:
            low = F.linear(F.linear(x, lora_a.to(x.dtype)), self.lora_B.to(x.dtype))
            y = base_linear(x, self.weight) + self.lora.scaling * low
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def update(self) -> LoraUpdate:
        """A, B and their scaling."""
        return LoraUpdate(self.lora_A, self.lora_B, self.lora.scaling)

    def grid(self) -> GridParams:
        """Scales, mins and zero-points as the forward uses them."""
        scales, offsets = self.scales, self.offsets
        if self.gradient_factor != 1.0:
            scales = ScaleGradient.apply(scales, self.gradient_factor)
            offsets = ScaleGradient.apply(offsets, self.gradient_factor)
        return grid_params(scales, offsets, self.quant)

    @property
    def origin(self) -> Origin | None:
        """The grid that W0 was found with, if W0 moves with s and b."""
        return (self.origin_scales, self.origin_mins) if self.learning.move_base else None

    def base(self) -> BaseWeight:
        """W0 [out, in] as the forward merges it now."""
        return moved(self.weight, self.origin, self.grid())

    @torch.no_grad()
    def _remember_grid(self) -> None:
        if not self.keeps_grid:
            raise UsageError(
                "W0 can only move with a grid that it was found with",
                where="move_base",
                expected="init reconstructed",
                remedy="train with --init reconstructed, or without --move-base",
            )
        params = self.grid()
        # Known to whoever builds the layer again, so no part of its state.
        self.register_buffer("origin_scales", params.scales.clone(), persistent=False)
        self.register_buffer("origin_mins", params.mins.clone(), persistent=False)

    def start_warmup(self) -> None:
        """Compute with W0 + scaling * B A, unquantized, from the next forward on; s and b get no gradient."""
        self.quantizing = False

    @torch.no_grad()
    def start_quantization(self) -> None:
        """Initialise s and b from the merged weight W0 + scaling * B A and quantize from the next forward on."""
        for rows in () if self.keeps_grid else row_blocks(self.weight):
            merged = merge_lora(self.weight, self.update(), rows, self.scales.dtype)
            self.scales[rows], self.offsets[rows] = init_qparams(merged, self.quant, self.init, self.moments)
        self.quantizing = True

    @torch.no_grad()
    def regrid(self, quant: QuantConfig) -> None:
        """Continue on another kind of zero-point or scale grid, from the grid the forward uses now.

        s is snapped onto the new scale grid and b, the offset of the present grid, onto the new zero-points; the codes
        are taken anew from the merged weight in the next forward or freeze (snap and recode), not converted.

        Raises:
            UsageError: Bits or group size differ.
        """
        if (quant.bits, quant.group_size) != (self.quant.bits, self.quant.group_size):
            raise UsageError(
                "a trained grid cannot change its bits or group size",
                got=f"{quant.bits} bits, group_size {quant.group_size}",
                expected=f"{self.quant.bits} bits, group_size {self.quant.group_size}",
                remedy="train with the other values",
            )
        params = self.grid()
        if self.learning.move_base:  # it was trained here, and this is where it is coded anew
            self.weight = nn.Parameter(dense_base(self.base()), requires_grad=False)
            self.learning = replace(self.learning, move_base=False)
        offsets = params.mins + self.quant.midpoint * params.scales
        self.scales.copy_(params.scales)
        self.offsets.copy_(torch.zeros_like(offsets) if quant.zero_point == "none" else offsets)
        self.quant = quant

    @torch.no_grad()
    def quantized_weight(self) -> torch.Tensor:
        """W_q exactly as the evaluation forward multiplies with it, [out, in] in the dtype of the scales."""
        self._require_quantizing()
        return fake_quantize(self.base(), self.update(), self.grid(), self.quant.max_code)

    @torch.no_grad()
    def freeze(self, name: str = "") -> QuantizedWeight:
        """The layer as integers; dequantizing them gives `quantized_weight()` bit for bit.

        Raises:
            UsageError: The layer is in its LoRA warm-up, so no grid has been chosen yet.
        """
        return self.freeze_packed(name).unpack()

    @torch.no_grad()
    def freeze_packed(self, name: str = "") -> PackedWeight:
        """As `freeze`, the integers packed as they are stored.

        Raises:
            UsageError: As `freeze`.
        """
        self._require_quantizing(name)
        params = self.grid()
        kernels = kernels_for(self.kernels, self.weight.device.type, params.scales.dtype)
        blocks = kernels.codes(Problem(self.base(), self.update(), params, self.quant.max_code))
        return pack_blocks(blocks, self.weight.shape, params, self.quant, name)

    def info(self) -> WeightInfo:
        """Sizes and grid of what `freeze` returns."""
        out_features, in_features = self.weight.shape
        return WeightInfo(
            out_features=out_features,
            in_features=in_features,
            bits=self.quant.bits,
            group_size=self.quant.resolve_group_size(in_features),
            zero_point=self.quant.zero_point,
            k_grid=None if self.quant.k_grid is None else self.quant.scale_grid,
        )

    def _require_quantizing(self, name: str = "") -> None:
        if not self.quantizing:
            raise UsageError(
                "the layer is in its LoRA warm-up and has no grid yet",
                where=name or None,
                expected="a layer that quantizes",
                remedy="call start_quantization() first, or train past --lora-warmup-steps",
            )

    def extra_repr(self) -> str:
        """Sizes and grid for print(model)."""
        grid = f"bits={self.quant.bits}, group_size={self.quant.group_size}, zero_point={self.quant.zero_point}"
        return f"{self.in_features}, {self.out_features}, rank={self.lora.rank}, {grid}"
