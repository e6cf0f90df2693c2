"""L4Q's mathematics on plain tensors: grids, fake quantization, freezing (initialisation: `l4q.init`).

Symbols follow the paper (arXiv 2402.04902, eqs 3-30), with unsigned codes. Q_N = -2**(n-1), Q_P = 2**(n-1)-1, n bits:

    paper:  w = (W - b) / s,   w~ = round(clamp(w, Q_N, Q_P)),        W_q = w~ * s + b
    here:   w = (W - m) / s,   q  = round(clamp(w, 0, 2**n - 1)),     W_q = q * s + m,     m = b + Q_N * s

The two agree because q = w~ - Q_N. The second form is the one GGUF's Q4_1 stores (d = s, m), and with an integer
zero-point z (m = -z * s) it equals (q - z) * s exactly: s has 11 significant bits at most and q - z five, so no
operation rounds in float32. That is why the training forward, the checkpoint and the exports can agree bit for bit.

Shapes: weights [out, in]; scales s, offsets b and mins m [out, groups]; groups split the rows of W into runs of
in / groups consecutive columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from l4q import k_snap
from l4q.base import BaseWeight, base_rows
from l4q.bitpack import pack_codes, row_bytes
from l4q.config import QuantConfig, ScaleGrid
from l4q.k_grids import K_GRIDS
from l4q.packed_weight import PackedWeight
from l4q.weight import QuantizedWeight

# Smallest value both scale grids hold (2**-20 is the least fp16 subnormal with its four low bits clear), and a bound
# that keeps 15 * s finite in fp16. They make s positive and finite whatever the optimizer does.
SCALE_MIN = 2.0**-20
SCALE_MAX = 4096.0
# 1 MiB of float32: stays in the cache of current processors, and is much longer than torch takes to start its threads.
BLOCK_ELEMENTS = 1 << 18


class GridParams(NamedTuple):
    """What the forward really uses: scales and mins on the grid, and the zero-points if they are integers."""

    scales: torch.Tensor
    """[out, groups], on the scale grid."""
    mins: torch.Tensor
    """[out, groups], the value of code 0."""
    zeros: torch.Tensor
    """[out, groups], -mins / scales: whole numbers unless zero_point is float."""


class LoraUpdate(NamedTuple):
    """The low-rank update W - W0 = scaling * B @ A."""

    a: torch.Tensor
    """A [rank, in]."""
    b: torch.Tensor
    """B [out, rank]."""
    scaling: float
    """alpha / rank."""


class StraightThrough(torch.autograd.Function):
    """Value of `snapped`, gradient of `value`. Exact, unlike value + (snapped - value).detach()."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, snapped: torch.Tensor) -> torch.Tensor:
        """Return `snapped`."""
        return snapped.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Hand the gradient to `value`."""
        return grads[0], None


class ScaleGradient(torch.autograd.Function):
    """The value unchanged, its gradient times a constant: LSQ's gradient scaling."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        """Return `value`."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale the gradient."""
        return grads[0] * ctx.factor, None


def snap_scales(scales: torch.Tensor, grid: ScaleGrid | None) -> torch.Tensor:
    """Nearest scales on the grid, within [SCALE_MIN, SCALE_MAX], in the dtype of `scales`.

    "fp16" and "fp16_s7" are subsets of fp16; the latter also clears the four low mantissa bits (round half to even),
    leaving 7 significant bits, so that s * z is exact in fp16 for every 4-bit z. The K grids are those of `l4q.k_snap`.
    """
    bounded = scales.detach().clamp(SCALE_MIN, SCALE_MAX)
    if grid in K_GRIDS:
        return k_snap.join(k_snap.split(bounded, K_GRIDS[grid], least=1))
    half = bounded.to(torch.float16)
    if grid == "fp16_s7":
        bits = half.view(torch.int16).to(torch.int32)
        half = ((bits + 7 + ((bits >> 4) & 1)) & ~15).to(torch.int16).view(torch.float16)
    return half.to(scales.dtype)


def ceil_scales(scales: torch.Tensor, grid: ScaleGrid | None) -> torch.Tensor:
    """Smallest scales on the grid that are not below `scales`; on a K grid, smallest for the units it chooses."""
    if grid in K_GRIDS:
        return k_snap.join(k_snap.split_above(scales.detach().clamp(SCALE_MIN, SCALE_MAX), K_GRIDS[grid], least=1))
    snapped = snap_scales(scales, grid)
    step = 16 if grid == "fp16_s7" else 1
    above = (snapped.to(torch.float16).view(torch.int16) + step).view(torch.float16).to(scales.dtype)
    return torch.where(snapped < scales, above, snapped).clamp(max=SCALE_MAX)


def snap_mins(mins: torch.Tensor, grid: ScaleGrid | None) -> torch.Tensor:
    """Nearest mins on the grid: fp16 numbers, or on a K grid non-positive fp16 numbers times 6-bit integers."""
    limit = torch.finfo(torch.float16).max
    if grid in K_GRIDS:
        return -k_snap.join(k_snap.split((-mins.detach()).clamp(0, limit), K_GRIDS[grid], least=0))
    return mins.detach().clamp(-limit, limit).to(torch.float16).to(mins.dtype)


def grid_params(scales: torch.Tensor, offsets: torch.Tensor, quant: QuantConfig) -> GridParams:
    """Snap trainable s and b onto the grid, with straight-through gradients.

    "none": m = Q_N * s.  "integer": z = clamp(round(-Q_N - b / s), 1, 2**n - 1), m = -z * s.
    "float": m = fp16(b + Q_N * s), or the nearest value of the K grid.
    """
    snapped = StraightThrough.apply(scales, snap_scales(scales, quant.scale_grid))
    if quant.zero_point == "none":
        zeros = torch.full_like(snapped, float(quant.midpoint))
        return GridParams(snapped, -quant.midpoint * snapped, zeros)
    if quant.zero_point == "integer":
        free = quant.midpoint - offsets / snapped
        zeros = StraightThrough.apply(free, free.detach().round().clamp(1, quant.max_code))
        return GridParams(snapped, -(zeros * snapped), zeros)
    free = offsets - quant.midpoint * snapped
    mins = StraightThrough.apply(free, snap_mins(free, quant.scale_grid))
    return GridParams(snapped, mins, -mins / snapped)


def row_blocks(weight: BaseWeight) -> Iterator[slice]:
    """Runs of rows that fit a CPU core's cache, so that the elementwise passes over a weight read memory once.

    On other devices the whole weight is one block. Training and freezing walk the same blocks, so that B @ A is
    multiplied in the same shapes and rounds to the same bits.
    """
    rows, columns = weight.shape
    step = max(1, BLOCK_ELEMENTS // columns) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def merge_lora(weight: BaseWeight, update: LoraUpdate, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """W = W0 + scaling * B @ A (eq 7) for a run of rows: a new [rows, in] tensor in `dtype`.

    Args:
        weight: W0 [out, in], dense or packed (`l4q.base`).
        update: A, B and the scaling.
        rows: The rows to merge.
        dtype: float32 in training and freezing, whatever the dtype of W0.
    """
    base = base_rows(weight, rows, dtype)
    with torch.autocast(base.device.type, enabled=False):  # it would add in 16 bits, wherever the caller stands
        return torch.addmm(base, update.b[rows].to(dtype), update.a.to(dtype), alpha=update.scaling)


def position_(weight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    """w = (W - m) / s in place on `weight` [rows, in], returned as a view [rows, groups, group_size]."""
    grouped = _grouped(weight, weight.shape[1] // scales.shape[1])
    return grouped.sub_(mins.unsqueeze(-1)).div_(scales.unsqueeze(-1))


def fake_quantize(
    weight: BaseWeight, update: LoraUpdate, params: GridParams, max_code: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W_q = q * s + m with q = round(clamp(w, 0, max_code)) of the merged weight (eqs 7-10), without gradients.

    Args:
        weight: W0 [out, in].
        update: The low-rank update merged before quantization.
        params: The grid.
        max_code: 2**bits - 1.
        dtype: Of the result; that of the scales by default, which is exact.

    Returns:
        [out, in].
    """
    values = torch.empty(weight.shape, dtype=dtype or params.scales.dtype, device=weight.device)
    for rows, codes in _rounded_blocks(weight, update, params, max_code):
        block = codes.mul_(params.scales[rows].unsqueeze(-1)).add_(params.mins[rows].unsqueeze(-1))
        values[rows] = block.view(-1, weight.shape[1])
    return values


def freeze_weight(
    weight: BaseWeight, update: LoraUpdate, params: GridParams, quant: QuantConfig, name: str = ""
) -> QuantizedWeight:
    """Turn a merged weight into integers.

    Freezing is the only step that may lose information, and it loses nothing that `fake_quantize` has not lost in every
    training forward already: both take their codes from the same blocks.

    Raises:
        UsageError: Scales or mins are not finite (training diverged).
    """
    return pack_blocks(code_blocks(weight, update, params, quant.max_code), weight.shape, params, quant, name).unpack()


def pack_blocks(
    blocks: Iterable[tuple[slice, torch.Tensor]], shape: torch.Size, params: GridParams, quant: QuantConfig, name: str
) -> PackedWeight:
    """A weight from the codes of its runs of rows, packed one run after another.

    Args:
        blocks: Rows and their codes, uint8 [rows, in].
        shape: Of the weight.
        params: The grid.
        quant: Bits, group size and kind of zero-point.
        name: Of the layer, for error messages.

    Raises:
        UsageError: Scales or mins are not finite (training diverged).
    """
    out_features, in_features = shape
    packed = np.empty((out_features, row_bytes(in_features, quant.bits)), dtype=np.uint8)
    for rows, codes in blocks:
        packed[rows] = pack_codes(codes.cpu().numpy(), quant.bits)
    group_size = quant.resolve_group_size(in_features)
    return PackedWeight(
        packed=packed, **_group_arrays(params, quant), bits=quant.bits, group_size=group_size, name=name
    )


def _group_arrays(params: GridParams, quant: QuantConfig) -> dict[str, Any]:
    """The group parameters as `GroupParameters` keeps them, NumPy arrays by field."""
    parts: dict[str, torch.Tensor] = {"scales": params.scales}
    if quant.zero_point == "integer":
        parts["zeros"] = params.zeros
    if quant.zero_point == "float":
        parts["mins"] = params.mins
    if quant.k_grid is not None:
        parts["scales"], parts["sub_scales"] = k_snap.split(params.scales, quant.k_grid, least=1)
        if quant.zero_point == "float":
            units, parts["sub_mins"] = k_snap.split(-params.mins, quant.k_grid, least=0)
            parts["mins"] = -units
    halves = ("scales", "mins")
    return {
        name: part.detach().to(torch.float16 if name in halves else torch.uint8).cpu().numpy()
        for name, part in parts.items()
    }


def code_blocks(
    weight: BaseWeight, update: LoraUpdate, params: GridParams, max_code: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Codes of each run of rows, uint8 [rows, in]."""
    for rows, codes in _rounded_blocks(weight, update, params, max_code):
        yield rows, codes.to(torch.uint8).view(-1, weight.shape[1])


def _rounded_blocks(
    weight: BaseWeight, update: LoraUpdate, params: GridParams, max_code: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Codes of each run of rows as whole float numbers [rows, groups, group_size], free to be overwritten."""
    for rows in row_blocks(weight):
        merged = merge_lora(weight, update, rows, params.scales.dtype)
        yield rows, position_(merged, params.scales[rows], params.mins[rows]).clamp_(0, max_code).round_()


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, group_size)
