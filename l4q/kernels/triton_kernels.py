"""CUDA kernels in Triton: one launch over the merged weight per direction.

A program takes several groups, in steps of a tile's columns, so any group size works, also one group per row. Codes
equal torch's bit for bit because nothing is left to the compiler's taste: div_rn is IEEE division (the plain `/` is
not), enable_fp_fusion=False keeps q * s + m two roundings, and adding and subtracting 1.5 * 2**23 rounds the clamped
position half to even. bfloat16 is rounded by integer arithmetic, so that it is the same function where Triton's
interpreter runs the kernels without a GPU (TRITON_INTERPRET=1), whose own conversion rounds differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from l4q.quant import GridParams, position_

# Neither package has types, and only machines with a GPU have them.
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")
if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr

TILE = 2048
"""Weights a program works on at a time."""
MAX_COLUMNS = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
ROUNDER = constexpr(12582912.0)
"""1.5 * 2**23: the float32 numbers around it are the integers."""


@triton.jit
def _store(pointer, values, mask, bfloat16: constexpr):  # type: ignore[no-untyped-def]
    """Store float32 values in the pointer's type; bfloat16 is given as its bits, int16."""
    if bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        tl.store(pointer, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _clamped(position, max_code):  # type: ignore[no-untyped-def]
    """clamp(w, 0, max_code), which a NaN passes unchanged as it does in torch."""
    low = tl.where(position < 0.0, 0.0, position)
    return tl.where(low > max_code, max_code, low)


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    merged, scales, mins, out, groups, size, max_code, bfloat16: constexpr, rows: constexpr, columns: constexpr
):
    """W_q of `groups` runs of `size` weights, in tiles of [rows, columns]."""
    group = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    present = group < groups
    s = tl.load(scales + group, mask=present, other=1.0)[:, None]
    m = tl.load(mins + group, mask=present, other=0.0)[:, None]
    for start in range(0, size, columns):
        column = start + tl.arange(0, columns)
        at = group[:, None] * size + column[None, :]
        mask = present[:, None] & (column < size)[None, :]
        position = tl.math.div_rn(tl.load(merged + at, mask=mask, other=0.0) - m, s)
        code = (_clamped(position, max_code) + ROUNDER) - ROUNDER
        _store(out + at, code * s + m, mask, bfloat16)


@triton.jit
def differentiate_kernel(  # type: ignore[no-untyped-def]
    merged,
    scales,
    mins,
    out,
    grad,
    grad_s,
    grad_m,
    groups,
    size,
    max_code,
    bfloat16: constexpr,
    rows: constexpr,
    columns: constexpr,
):
    """W_q to `out`, dL/dW over `merged`, and every group's sums dL/ds and dL/dm.

    Inside the clamp dW_q/dW = 1, dW_q/ds = q - w and dW_q/dm = 0; outside 0, q and 1.
    """
    group = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    present = group < groups
    s = tl.load(scales + group, mask=present, other=1.0)[:, None]
    m = tl.load(mins + group, mask=present, other=0.0)[:, None]
    sum_s = tl.zeros([rows, columns], tl.float32)
    sum_m = tl.zeros([rows, columns], tl.float32)
    for start in range(0, size, columns):
        column = start + tl.arange(0, columns)
        at = group[:, None] * size + column[None, :]
        mask = present[:, None] & (column < size)[None, :]
        position = tl.math.div_rn(tl.load(merged + at, mask=mask, other=0.0) - m, s)
        clamped = _clamped(position, max_code)
        inside = clamped == position
        code = (clamped + ROUNDER) - ROUNDER
        _store(out + at, code * s + m, mask, bfloat16)
        grad_w = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        sum_s += grad_w * (code - tl.where(inside, position, 0.0))
        sum_m += tl.where(inside, 0.0, grad_w)
        tl.store(merged + at, tl.where(inside, grad_w, 0.0), mask=mask)
    tl.store(grad_s + group, tl.sum(sum_s, axis=1), mask=present)
    tl.store(grad_m + group, tl.sum(sum_m, axis=1), mask=present)


class TritonPasses:
    """`l4q.kernels.fused.Passes` on CUDA, and on the CPU in Triton's interpreter."""

    name = "triton"

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """Write W_q of `merged` [rows, in] float32 to `out`."""
        self._launch(quantize_kernel, merged, params, max_code, out, ())

    def codes(self, merged: torch.Tensor, params: GridParams, max_code: int) -> torch.Tensor:
        """The codes of `merged` [rows, in] float32, uint8 [rows, in], by torch: it happens once a model."""
        position = position_(merged, params.scales, params.mins)
        return position.clamp_(0, max_code).round_().to(torch.uint8).view(merged.shape)

    def differentiate(
        self, merged: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write W_q to `out`, overwrite `merged` with dL/dW, return dL/ds and dL/dm [rows, groups]."""
        grad_s, grad_m = (torch.empty_like(params.scales) for _ in range(2))
        self._launch(differentiate_kernel, merged, params, max_code, out, (grad_w.contiguous(), grad_s, grad_m))
        return grad_s, grad_m

    @staticmethod
    def _launch(
        kernel: Any,
        merged: torch.Tensor,
        params: GridParams,
        max_code: int,
        out: torch.Tensor,
        others: tuple[torch.Tensor, ...],
    ) -> None:
        scales, mins = (values.detach().contiguous() for values in (params.scales, params.mins))
        groups, size = scales.numel(), merged.shape[1] // scales.shape[1]
        tile = tile_of(size)
        bfloat16 = out.dtype == torch.bfloat16
        target = out.view(torch.int16) if bfloat16 else out
        with _current_device(merged):
            kernel[(-(-groups // tile["rows"]),)](
                merged,
                scales,
                mins,
                target,
                *others,
                groups,
                size,
                float(max_code),
                bfloat16=bfloat16,
                **tile,
                **OPTIONS,
            )


def tile_of(size: int) -> dict[str, int]:
    """Groups ("rows") and "columns" of a tile for groups of `size` weights; powers of two, as Triton wants them."""
    columns = min(MAX_COLUMNS, 1 << (size - 1).bit_length())
    return {"rows": TILE // columns, "columns": columns}


def _current_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
