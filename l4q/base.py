"""How the frozen W0 is kept in memory: dense, or as packed integers that are dequantized while they are merged.

A packed base holds, per row, a dense little-endian bit stream of codes (`l4q.bitpack`) and one scale per block of
`block` columns. With g = i // block and every operation in float32:

    zeros and mins None:  W0[o, i] = (code[o, i] - 2**(bits-1)) * scale[o, g]
    zeros:                W0[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]
    mins:                 W0[o, i] = code[o, i] * scale[o, g] + min[o, g]

| storage | codes                    | block | scales                              | bytes per weight |
|---------|--------------------------|-------|-------------------------------------|------------------|
| `dense` |                          |       |                                     | 4 or 2           |
| `int8`  | round(w / s), -128..127  | 64    | fp16(e / -127)                      | 1.03125          |
| `int4`  | round(w / s), -8..7      | 32    | the best of fp16(e / -7, -8, -9)    | 0.5625           |
| `start` | the start's own integers | its   | its own, fp16 if that holds them    | 0.5625 for Q4_0  |

e is the block's weight of largest magnitude. Its sign makes it the lowest code, as there is one more below zero than
above; |s| is rounded up. "Best" is the least sum of squares: on SmolLM2 the three candidates leave a relative error of
8.0 %, max|w| / 7 alone 10.1 %. Whatever the storage, W0 *is* the dequantized values: training, freezing and resuming
all merge the same bits (docs/training.md).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from l4q.bitpack import pack_codes
from l4q.config import BaseStorage
from l4q.errors import UsageError

if TYPE_CHECKING:
    from l4q.starts.grid import LinearGrid

# storage -> (bits, columns per block, steps between zero and the largest weight to try)
BLOCKS: dict[str, tuple[int, int, tuple[int, ...]]] = {"int8": (8, 64, (127,)), "int4": (4, 32, (7, 8, 9))}
_SMALLEST = 2.0**-24
"""The least positive fp16 number: the scale of a block of zeros."""
_ALIGN = 8
"""Rows are padded to whole runs of 8 codes, which fill whole bytes at 2, 3, 4 and 8 bits."""


class PackedBase(nn.Module):
    """A frozen weight [out, in] as integers; `rows` dequantizes a run of rows, and no more than that exists at a time.

    Parameters, none trainable: `codes` uint8 [out, row bytes]; `block_scales` float16 or float32 [out, blocks];
    `block_zeros` uint8 or `block_mins` float16 or float32 [out, blocks], or neither.
    """

    dtype = torch.float32
    """Of the dequantized values."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int, columns: int) -> None:
        """Pack codes uint8 [out, blocks * block], of which the first `columns` columns count."""
        super().__init__()
        self.bits, self.block, self.columns = bits, block, columns
        padded = F.pad(codes, (0, -codes.shape[1] % _ALIGN))
        self.codes = _frozen(_pack(padded, bits))
        self.block_scales = _frozen(scales)
        self.block_zeros: nn.Parameter | None = None
        self.block_mins: nn.Parameter | None = None

    @classmethod
    def from_grid(cls, grid: LinearGrid) -> PackedBase:
        """Keep a pre-quantized start's own integers; `rows` gives `grid.dequantize()` bit for bit."""
        packed = cls(
            grid.codes, narrow(grid.scales), bits=grid.bits, block=grid.group_size, columns=grid.codes.shape[1]
        )
        if grid.zeros is not None:
            packed.block_zeros = _frozen(grid.zeros)
        if grid.mins is not None:
            packed.block_mins = _frozen(narrow(grid.mins))
        return packed

    @classmethod
    def quantize(cls, weight: torch.Tensor, storage: BaseStorage, name: str = "") -> PackedBase:
        """Round a weight [out, in] to `BLOCKS[storage]`; the last block of a row may be shorter.

        Raises:
            UsageError: A value is not finite, or too large for an fp16 scale.
        """
        bits, block, counts = BLOCKS[storage]
        columns = weight.shape[1]
        values = F.pad(weight.detach().float(), (0, -columns % block)).view(weight.shape[0], -1, block)
        extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))  # [out, blocks, 1]
        scales = _signed_scale(extreme, counts[0])
        if not bool(torch.isfinite(scales).all()):
            raise UsageError(
                "a weight is not finite or too large for a quantized base",
                where=name or None,
                got=f"largest magnitude {float(weight.abs().max()):g}",
                expected=f"at most {counts[0] * 65504}",
                remedy="use --base-storage dense",
            )
        least = _error(values, scales, bits)
        for count in counts[1:]:
            other = _signed_scale(extreme, count)
            error = _error(values, other, bits)
            scales, least = torch.where(error < least, other, scales), torch.minimum(error, least)
        codes = _round(values, scales, bits).add_(1 << (bits - 1)).to(torch.uint8)
        return cls(codes.view(weight.shape[0], -1), scales.squeeze(-1), bits=bits, block=block, columns=columns)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((self.codes.shape[0], self.columns))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and block parameters."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def part(self, take: Callable[[torch.Tensor], torch.Tensor]) -> PackedBase:
        """Another base of some of the rows, those that `take` gives of each parameter; they share memory."""
        part = copy(self)
        part._parameters = {
            name: None if parameter is None else nn.Parameter(take(parameter), requires_grad=False)
            for name, parameter in self._parameters.items()
        }
        return part

    def rows(self, rows: slice) -> torch.Tensor:
        """Dequantize a run of rows: float32 [rows, in]."""
        scales = self.block_scales[rows].float().unsqueeze(-1)  # [rows, blocks, 1]
        codes = _unpack(self.codes[rows], self.bits)[:, : scales.shape[1] * self.block]
        values = codes.reshape(*scales.shape[:2], self.block).float()  # [rows, blocks, block]
        if self.block_mins is not None:
            values.mul_(scales).add_(self.block_mins[rows].float().unsqueeze(-1))
        elif self.block_zeros is not None:
            values.sub_(self.block_zeros[rows].float().unsqueeze(-1)).mul_(scales)
        else:
            values.sub_(1 << (self.bits - 1)).mul_(scales)
        return values.view(values.shape[0], -1)[:, : self.columns]

    def dequantize(self) -> torch.Tensor:
        """The whole W0, float32 [out, in]."""
        return self.rows(slice(None))

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        return f"{list(self.shape)}, bits={self.bits}, block={self.block}, {self.nbytes} bytes"


@dataclass(frozen=True, eq=False, kw_only=True)
class MovingBase:
    """A W0 that keeps its place on the grid when the grid moves: W0 = (kept - m_0) * s / s_0 + m.

    Where W0 is the integers of a grid, which is what a reconstructed start settles it on, s and b alone can then change
    the weights without changing a code: dW_q/ds = q and dW_q/dm = 1, EfficientQAT's second stage (arXiv 2407.11062),
    where with a W0 that stays, LSQ's are q - w and 0.
    """

    kept: torch.Tensor | PackedBase
    """W0 [out, in] on the grid it was found with."""
    origin_scales: torch.Tensor
    """s_0 [out, groups], that grid's scales."""
    origin_mins: torch.Tensor
    """m_0, likewise."""
    scales: torch.Tensor
    """s as the forward uses it now."""
    mins: torch.Tensor
    """m, likewise."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.kept.shape

    @property
    def device(self) -> torch.device:
        """Where W0 is."""
        return self.kept.device

    @property
    def nbytes(self) -> int:
        """Bytes of W0 as it is kept."""
        return int(self.kept.nbytes)

    def rows(self, rows: slice) -> torch.Tensor:
        """A run of rows of W0, [rows, in] in the dtype of the scales."""
        ratio = self.scales[rows] / self.origin_scales[rows]
        moved = self._distances(rows).mul_(ratio.unsqueeze(-1)).add_(self.mins[rows].unsqueeze(-1))
        return moved.view(moved.shape[0], -1)

    def dequantize(self) -> torch.Tensor:
        """The whole W0, [out, in] in the dtype of the scales."""
        return self.rows(slice(None))

    def gradients(self, rows: slice, grad_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What s and m get through W0 from dL/dW of a run of rows [rows, in]: [rows, groups] each."""
        places = self._distances(rows).div_(self.origin_scales[rows].unsqueeze(-1))
        grouped = grad_w.view_as(places)
        return places.mul_(grouped).sum(-1), grouped.sum(-1)

    def _distances(self, rows: slice) -> torch.Tensor:
        """Kept - m_0, a new tensor [rows, groups, size]."""
        mins = self.origin_mins[rows].unsqueeze(-1)
        return base_rows(self.kept, rows, self.scales.dtype).view(*mins.shape[:2], -1) - mins


BaseWeight = torch.Tensor | PackedBase | MovingBase
"""W0 [out, in] in any storage."""


def base_rows(weight: BaseWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """A run of rows of W0, [rows, in] in `dtype`; may share memory with a dense W0."""
    block = weight[rows] if isinstance(weight, torch.Tensor) else weight.rows(rows)
    return block.to(dtype)


def dense_base(weight: BaseWeight) -> torch.Tensor:
    """The whole W0 [out, in]: a dense one as it is, another in float32."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def follow_(weight: BaseWeight, rows: slice, grad_w: torch.Tensor, grad_s: torch.Tensor, grad_m: torch.Tensor) -> None:
    """Add what s and m get through a W0 that moves with them to their gradients [out, groups]; others get nothing.

    Args:
        weight: W0.
        rows: A run of its rows.
        grad_w: dL/dW of that run, [rows, in].
        grad_s: dL/ds of the layer, changed in place.
        grad_m: dL/dm, likewise.
    """
    if isinstance(weight, MovingBase):
        through_s, through_m = weight.gradients(rows, grad_w)
        grad_s[rows] += through_s
        grad_m[rows] += through_m


def base_linear(x: torch.Tensor, weight: torch.Tensor | PackedBase) -> torch.Tensor:
    """X @ W0^T in x's dtype, [..., in] -> [..., out]; a packed W0 is dequantized again in backward, not kept."""
    if isinstance(weight, PackedBase):
        y: torch.Tensor = _PackedLinear.apply(x, weight)
        return y
    return F.linear(x, weight.to(x.dtype))


class _PackedLinear(torch.autograd.Function):
    """x @ W0^T with a packed W0 that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedBase) -> torch.Tensor:
        ctx.packed = weight
        return F.linear(x, weight.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.packed.dequantize().to(grads[0].dtype), None


def base_nbytes(weight: BaseWeight) -> int:
    """Bytes W0 occupies."""
    return int(weight.nbytes)


def narrow(values: torch.Tensor) -> torch.Tensor:
    """Values as fp16 if that loses none of them, else as they are."""
    half = values.to(torch.float16)
    return half if torch.equal(half.to(values.dtype), values) else values


def _signed_scale(extreme: torch.Tensor, count: int) -> torch.Tensor:
    """fp16 scale that puts the block's extreme weight `count` steps below zero."""
    return _ceil_half(extreme.abs() / count).copysign(-extreme.to(torch.float16))


def _round(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes as float numbers."""
    return (values / scales.float()).round_().clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _error(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Sum of squared errors per block, [out, blocks, 1]."""
    return _round(values, scales, bits).mul_(scales.float()).sub_(values).square_().sum(-1, keepdim=True)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _ceil_half(values: torch.Tensor) -> torch.Tensor:
    """The least positive fp16 numbers that are not below `values` (>= 0)."""
    half = values.clamp(min=_SMALLEST).to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < values, above, half)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, columns] to bytes uint8 [rows, columns * bits / 8], on the same device."""
    if bits == 8:
        return codes
    return torch.from_numpy(pack_codes(codes.cpu().numpy(), bits)).to(codes.device)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_pack` for 2, 3, 4 and 8 bits."""
    if bits == 8:
        return packed
    if bits == 3:  # 8 codes in every 3 bytes
        parts = packed.view(packed.shape[0], -1, 3).to(torch.int32)
        words = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
        return (words.unsqueeze(-1) >> shifts & 7).to(torch.uint8).flatten(1)
    fields = [packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(1)
