"""`LinearGrid`: the integers of a pre-quantized linear layer, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from l4q.errors import UsageError
from l4q.quant import SCALE_MIN

GridKind = Literal["none", "integer", "float"]
GRID_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearGrid:
    """One linear layer on a linear grid.

    With g = i // group_size and every operation in float32:

        zeros and mins None:  weight[o, i] = (codes[o, i] - 2**(bits-1)) * scales[o, g]      ("none")
        zeros:                weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]       ("integer")
        mins:                 weight[o, i] = codes[o, i] * scales[o, g] + mins[o, g]          ("float")

    Unlike `QuantizedWeight` it takes what files hold: any zero-point, any float scales, 8 bits. Make one with `build`.
    """

    codes: torch.Tensor
    """uint8 [out, in]."""
    scales: torch.Tensor
    """float32 [out, groups], finite; positive unless mins are given."""
    zeros: torch.Tensor | None
    """uint8 [out, groups]."""
    mins: torch.Tensor | None
    """float32 [out, groups]."""
    bits: int
    group_size: int
    """Columns per group, resolved."""

    @classmethod
    def build(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        mins: torch.Tensor | None = None,
        *,
        bits: int,
        where: str,
        order: torch.Tensor | None = None,
    ) -> LinearGrid:
        """Check shapes and ranges and write the same weights with positive scales.

        A group of scale 0 gets the smallest scale and codes of value 0 (or its min). One of negative scale is mirrored:
        (q - z) * s = ((2**bits - 1 - q) - (2**bits - 1 - z)) * -s, so a symmetric group then has the zero-point
        2**(bits-1) - 1 and the layer integer zero-points. Zero-points that are all 2**(bits-1) are dropped.

        Args:
            codes: uint8 [out, in].
            scales: [out, groups], any float dtype.
            zeros: [out, groups], any integer dtype; None: 2**(bits-1), unless mins are given.
            mins: [out, groups], any float dtype.
            bits: Bits per code, one of `GRID_BITS`.
            where: File and module, for messages.
            order: int64 [in], the group of every column, if groups are not runs of neighbours (activation order); the
                grid then has groups of one column, each with its group's parameters.

        Raises:
            UsageError: A shape, range or value cannot be a grid.
        """
        _check(bits in GRID_BITS, where, "bits", bits, f"one of {GRID_BITS}")
        groups = scales.shape[1] if scales.ndim == 2 else 0
        fits = groups > 0 and scales.shape[0] == codes.shape[0] and codes.shape[1] % groups == 0
        _check(fits, where, "scales", list(scales.shape), f"[{codes.shape[0]}, a divisor of {codes.shape[1]}]")
        for label, part in (("zero-points", zeros), ("mins", mins)):
            good = part is None or part.shape == scales.shape
            _check(good, where, label, None if part is None else list(part.shape), list(scales.shape))
        for label, part in (("scales", scales), ("mins", mins)):
            floats = part is None or part.is_floating_point()
            _check(floats, where, label, None if part is None else part.dtype, "floating-point numbers")
            good = part is None or bool(torch.isfinite(part).all())
            _check(good, where, label, "NaN or infinite values", "finite numbers")
        if order is not None:
            scales, groups = scales[:, order], codes.shape[1]
            zeros, mins = (None if part is None else part[:, order] for part in (zeros, mins))
        size, scales = codes.shape[1] // groups, scales.float()
        if mins is not None:
            empty = scales == 0
            codes = codes.masked_fill(_spread(empty, size), 0)
            scales = scales.masked_fill(empty, SCALE_MIN)
            return cls(codes=codes, scales=scales, zeros=None, mins=mins.float(), bits=bits, group_size=size)
        points = torch.full(scales.shape, 1 << (bits - 1)) if zeros is None else zeros.to(torch.int64)
        low, high = int(points.min()), int(points.max())
        _check(low >= 0 and high < 1 << bits, where, "zero-points", f"[{low}, {high}]", f"[0, {(1 << bits) - 1}]")
        codes, scales, points = _positive(codes, scales, points.to(torch.uint8), bits)
        kept = None if bool((points == 1 << (bits - 1)).all()) else points
        return cls(codes=codes, scales=scales, zeros=kept, mins=None, bits=bits, group_size=size)

    @property
    def kind(self) -> GridKind:
        """Which of the three equations applies."""
        if self.mins is not None:
            return "float"
        return "none" if self.zeros is None else "integer"

    def points(self) -> torch.Tensor:
        """Zero-points float32 [out, groups] of a grid without mins."""
        if self.zeros is None:
            return torch.full_like(self.scales, float(1 << (self.bits - 1)))
        return self.zeros.float()

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [out, in] by the class equation."""
        values = self.codes.view(*self.scales.shape, self.group_size).float()  # [out, groups, group_size]
        if self.mins is not None:
            values.mul_(self.scales.unsqueeze(-1)).add_(self.mins.unsqueeze(-1))
        else:
            values.sub_(self.points().unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))
        return values.view(self.codes.shape)

    def regroup(self, group_size: int) -> LinearGrid | None:
        """The same weights with other groups: finer ones always, coarser ones if the groups they join are alike."""
        parts = {"scales": self.scales, "zeros": self.zeros, "mins": self.mins}
        if self.group_size % group_size == 0:
            times = self.group_size // group_size
            changed = {k: None if v is None else v.repeat_interleave(times, dim=1) for k, v in parts.items()}
        elif group_size % self.group_size == 0 and self.codes.shape[1] % group_size == 0:
            times = group_size // self.group_size
            joined = {k: None if v is None else v.view(v.shape[0], -1, times) for k, v in parts.items()}
            if any(v is not None and bool((v != v[..., :1]).any()) for v in joined.values()):
                return None
            changed = {k: None if v is None else v[..., 0].contiguous() for k, v in joined.items()}
        else:
            return None
        return replace(self, group_size=group_size, **changed)  # type: ignore[arg-type]


def _positive(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero-points of the same weights with every scale > 0."""
    size, top = codes.shape[1] // scales.shape[1], (1 << bits) - 1
    empty, negative = scales == 0, scales < 0
    if bool(empty.any()):
        middle = 1 << (bits - 1)
        codes = codes.masked_fill(_spread(empty, size), middle)
        zeros, scales = zeros.masked_fill(empty, middle), scales.masked_fill(empty, SCALE_MIN)
    if bool(negative.any()):
        codes = torch.where(_spread(negative, size), top - codes, codes)
        zeros = torch.where(negative, top - zeros, zeros)
        scales = scales.abs()
    return codes, scales, zeros


def _spread(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.repeat_interleave(size, dim=1)


def _check(holds: bool, where: str, field: str, got: object, expected: object) -> None:
    if not holds:
        raise UsageError(
            f"invalid pre-quantized weight: {field}",
            where=where,
            got=got,
            expected=expected,
            remedy="the file is damaged, or its quantization config describes another one",
        )
