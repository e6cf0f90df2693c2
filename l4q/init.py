"""Where the grid starts: the four initialisations the paper compares (eqs 31-38), on plain tensors.

Each takes the weights of every group and returns s and b, from which `l4q.quant.grid_params` makes the grid. Two of
them promise that no weight is clipped at the start; they round s *up* onto the scale grid (`ceil_scales`), because
rounded to nearest the extreme weight of about half the groups would land outside and lose its gradient. The other two
clip by design and take the nearest scale.

| name    | s                                        | b                    | clips at the start |
|---------|------------------------------------------|----------------------|--------------------|
| `l4q`   | max(|min W / Q_N|, |max W / Q_P|)        | 0                    | no                 |
| `lsq+`  | max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(n-1) | 0               | yes                |
| `symm`  | max|W| / 2^(n-1)                         | 0                    | yes                |
| `asymm` | (max W - min W) / (Q_P - Q_N)            | max W - s Q_P        | no                 |

Two more are ours: `calibrated` (`l4q.calibrate`) searches s and b on real inputs, and clips where that pays;
`reconstructed` (`l4q.reconstruct`) starts from that and trains W0, s and b block by block before L4Q begins.

`asymm` follows the kind of zero-point. "float": b as in the table, with m = b + Q_N s rounded down and s up.
"integer": only whole steps are possible, so of all z in [1, 2^n - 1] the one whose smallest non-clipping s is least.
"none": refused, as b is zero there and the smallest non-clipping s is that of `l4q`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from l4q import k_snap
from l4q.config import Init, QuantConfig, ScaleGrid, check_init
from l4q.k_grids import K_GRIDS
from l4q.quant import SCALE_MAX, SCALE_MIN, ceil_scales, snap_scales


class Start(NamedTuple):
    """Initial scales s and offsets b, each [out, groups]."""

    scales: torch.Tensor
    offsets: torch.Tensor


Initialiser = Callable[[torch.Tensor, QuantConfig], Start]


def init_qparams(
    weight: torch.Tensor, quant: QuantConfig, init: Init = "l4q", moments: torch.Tensor | None = None
) -> Start:
    """Initial s and b of a weight; s lies on the scale grid.

    Args:
        weight: [out, in], any float dtype.
        quant: The grid.
        init: A key of `INITIALISATIONS`, "calibrated", or "reconstructed", which for a single layer is the same.
        moments: E[x_j^2] of the layer's inputs, [in], for "calibrated"; None weighs all columns alike.

    Returns:
        scales, offsets: float32 (float64 for float64 weights), each [out, in / group_size].

    Raises:
        UsageError: The name is unknown, or the grid has no offsets where the initialisation needs them.
    """
    check_init(init, quant)
    if init in ("calibrated", "reconstructed"):  # of the latter, layers that lie in no block come here
        from l4q.calibrate import search_grid

        return search_grid(weight, quant, moments)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    group_size = quant.resolve_group_size(weight.shape[1])
    grouped = weight.detach().to(dtype).view(weight.shape[0], -1, group_size)  # [out, groups, group_size]
    return INITIALISATIONS[init](grouped, quant)


def l4q_init(grouped: torch.Tensor, quant: QuantConfig) -> Start:
    """The paper's own (eqs 36-38): the smallest scale that clips nothing with b = 0."""
    low = grouped.amin(-1) / -quant.midpoint
    high = grouped.amax(-1) / (quant.max_code - quant.midpoint)
    return _symmetric(ceil_scales(torch.maximum(low, high).clamp(min=SCALE_MIN), quant.scale_grid))


def lsq_plus_init(grouped: torch.Tensor, quant: QuantConfig) -> Start:
    """LSQ+ (eqs 31-32): three standard deviations, of the group's weights as the whole population."""
    mean, spread = grouped.mean(-1), 3 * grouped.std(-1, correction=0)
    widest = torch.maximum((mean - spread).abs(), (mean + spread).abs())
    return _symmetric(snap_scales(widest / quant.midpoint, quant.scale_grid))


def symm_init(grouped: torch.Tensor, quant: QuantConfig) -> Start:
    """Symm (eqs 33-34): the largest magnitude on code Q_N; positive extremes beyond Q_P are clipped."""
    return _symmetric(snap_scales(grouped.abs().amax(-1) / quant.midpoint, quant.scale_grid))


def asymm_init(grouped: torch.Tensor, quant: QuantConfig) -> Start:
    """Asymm (eqs 34-35): from the smallest weight to the largest, for "float" and "integer" zero-points."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if quant.zero_point == "float":
        limit = torch.finfo(torch.float16).max
        mins = floor_mins(low.clamp(-limit, limit), quant.scale_grid)
        scales = ceil_scales(((high - mins) / quant.max_code).clamp(min=SCALE_MIN), quant.scale_grid)
        return Start(scales, mins + quant.midpoint * scales)
    scales = torch.full_like(low, float("inf"))
    zeros = torch.full_like(low, float(quant.midpoint))
    for zero in range(1, quant.max_code + 1):
        above = high / (quant.max_code - zero) if zero < quant.max_code else high.sign() * SCALE_MAX
        needed = torch.maximum(low / -zero, above)
        zeros = torch.where(needed < scales, float(zero), zeros)
        scales = torch.minimum(scales, needed)
    scales = ceil_scales(scales.clamp(min=SCALE_MIN), quant.scale_grid)
    return Start(scales, (quant.midpoint - zeros) * scales)


def floor_mins(mins: torch.Tensor, grid: ScaleGrid | None) -> torch.Tensor:
    """Mins on the grid that are not above `mins`, which lie in fp16's range; a K grid holds none above 0."""
    if grid in K_GRIDS:
        return -k_snap.join(k_snap.split_above((-mins).clamp(min=0), K_GRIDS[grid], least=0))
    return floor_half(mins)


def floor_half(values: torch.Tensor) -> torch.Tensor:
    """The largest fp16 values that are not above `values`, which lie in fp16's range; in the dtype of `values`."""
    half = values.to(torch.float16)
    # One step down is one pattern further from zero for negative numbers, one nearer for positive ones.
    step = torch.where(values < 0, 1, -1).to(torch.int16)
    below = (half.view(torch.int16) + step).view(torch.float16)
    return torch.where(half.to(values.dtype) > values, below, half).to(values.dtype)


def _symmetric(scales: torch.Tensor) -> Start:
    return Start(scales, torch.zeros_like(scales))


INITIALISATIONS: dict[Init, Initialiser] = {
    "l4q": l4q_init,
    "lsq+": lsq_plus_init,
    "symm": symm_init,
    "asymm": asymm_init,
}
