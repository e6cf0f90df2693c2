"""`QuantizedWeight`: the one value that training produces and every exporter packs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from l4q.config import SUPPORTED_BITS, ZeroPoint
from l4q.errors import UnsupportedError, UsageError
from l4q.k_grids import K_GRIDS, SUPERBLOCK

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


_MAGNITUDE, _INFINITE = 0x7FFF, 0x7C00
"""Bits of an fp16 number below its sign, and the least of them that stands for no finite number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupParameters:
    """What gives the codes of one linear layer their values; the equations are `QuantizedWeight`'s.

    Raises:
        UsageError: A shape, dtype or value breaks the equations' ranges; the message names field, got and expected.
    """

    scales: F16
    """[out_features, groups], finite and > 0; on a K grid [out_features, in_features / 256]."""
    zeros: U8 | None = None
    """[out_features, groups], values in [1, 2**bits - 1], so that GPTQ v1's zero - 1 fits too."""
    mins: F16 | None = None
    """[out_features, groups], finite: the value of code 0; on a K grid [out_features, in_features / 256] and <= 0."""
    sub_scales: U8 | None = None
    """[out_features, groups], on a K grid only: values in [1, 63] at 4 bits, [1, 31] at 3 bits."""
    sub_mins: U8 | None = None
    """[out_features, groups], values in [0, 63]; on a K grid with mins only."""
    bits: int
    group_size: int
    """Columns per group; divides in_features."""
    name: str = ""
    """Module name, used in error messages only."""

    def __post_init__(self) -> None:
        self._check(self.bits in SUPPORTED_BITS, "bits", self.bits, f"one of {SUPPORTED_BITS}")
        self._check_parameters()

    def _check_parameters(self) -> None:
        self._check(self.zeros is None or self.mins is None, "zeros and mins", "both", "at most one of them")
        grouped = (self.out_features, self.groups)
        shared = grouped if self.sub_scales is None else self._check_k_grid(self.sub_scales)
        paired = (self.sub_scales is not None and self.mins is not None) == (self.sub_mins is not None)
        self._check(paired, "sub_mins", "sub_mins without sub_scales and mins, or the reverse", "all three or none")
        self._check_array("scales", self.scales, np.float16, shared)
        if int(self.scales.view(np.int16).min(initial=1)) <= 0:  # patterns of positive numbers are positive integers
            self._check(False, "scales", float(self.scales.min()), "positive values")
        if self.zeros is not None:
            self._check_array("zeros", self.zeros, np.uint8, grouped)
            self._check_range("zeros", self.zeros, 1, (1 << self.bits) - 1)
        if self.mins is not None:
            self._check_array("mins", self.mins, np.float16, shared)
            positive = self.sub_mins is not None and bool((self.mins > 0).any())
            self._check(not positive, "mins", "values above 0", "values <= 0 on a K grid")

    def _check_k_grid(self, sub_scales: U8) -> tuple[int, int]:
        """Check the integers of a K grid; returns the shape of the fp16 numbers they multiply."""
        known = "; ".join(f"{grid.bits} bits in groups of {grid.group_size}" for grid in K_GRIDS.values())
        grid = K_GRIDS.get(str(self.k_grid))
        self._check(
            grid is not None and self.group_size == grid.group_size and self.in_features % SUPERBLOCK == 0,
            "sub_scales",
            f"{self.bits} bits in groups of {self.group_size}, in_features {self.in_features}",
            f"{known}; in_features a multiple of {SUPERBLOCK}",
        )
        kinds, top = K_GRIDS[str(self.k_grid)].zero_points, K_GRIDS[str(self.k_grid)].top
        self._check(self.zero_point in kinds, "zero_point", self.zero_point, f"one of {kinds} on this K grid")
        parts = {"sub_scales": (sub_scales, 1)} | ({} if self.sub_mins is None else {"sub_mins": (self.sub_mins, 0)})
        for field, (array, least) in parts.items():
            self._check_array(field, array, np.uint8, (self.out_features, self.groups))
            self._check_range(field, array, least, top)
        return (self.out_features, self.in_features // SUPERBLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.out_features, self.in_features)

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.scales.shape[0])

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.groups * self.group_size

    @property
    def groups(self) -> int:
        """Groups per row, in_features // group_size."""
        return int((self.scales if self.sub_scales is None else self.sub_scales).shape[1])

    @cached_property
    def zero_point(self) -> ZeroPoint:
        """Which of the three equations applies."""
        if self.mins is not None:
            return "float"
        return "none" if self.zeros is None else "integer"

    @cached_property
    def k_grid(self) -> str | None:
        """The K grid the weight is on, if it is on one."""
        if self.sub_scales is None:
            return None
        return next((name for name, grid in K_GRIDS.items() if grid.bits == self.bits), None)

    def group_scales(self) -> F32:
        """The scale of every group, float32 [out_features, groups]; exact."""
        return _group_values(self.scales, self.sub_scales)

    def group_mins(self) -> F32 | None:
        """The value of code 0 in every group, float32 [out_features, groups]; exact. None without mins."""
        return None if self.mins is None else _group_values(self.mins, self.sub_mins)

    def integer_zeros(self) -> U8:
        """Zero-points as codes, uint8 [out_features, groups]: `zeros`, or 2**(bits-1) everywhere for "none".

        Raises:
            UnsupportedError: The weight has float mins, which no integer zero-point can hold.
        """
        if self.mins is not None:
            raise UnsupportedError(
                "a float zero-point has no integer form",
                where=self.name or None,
                expected="zero_point none or integer",
                remedy="export to GGUF Q4_1, or train with --zero-point integer",
            )
        if self.zeros is not None:
            return self.zeros
        return np.full((self.out_features, self.groups), 1 << (self.bits - 1), dtype=np.uint8)

    def _check(self, holds: bool, field: str, got: object, expected: str) -> None:
        if not holds:
            raise UsageError(
                f"invalid quantized weight: {field}",
                where=f"{self.name}.{field}" if self.name else field,
                got=got,
                expected=expected,
                remedy="the file is damaged or was not written by l4q; write the checkpoint again",
            )

    def _check_array(
        self, field: str, array: npt.NDArray[np.generic], dtype: type[np.generic], expected: tuple[int, int]
    ) -> None:
        self._check(
            array.dtype == dtype and array.shape == expected,
            field,
            f"{array.dtype} {array.shape}",
            f"{np.dtype(dtype).name} {expected}",
        )
        if dtype == np.float16 and array.size:
            # Patterns of finite numbers lie below infinity's; comparing them is many times faster than fp16 arithmetic.
            patterns = array.view(np.uint16) & _MAGNITUDE
            if int(patterns.max()) >= _INFINITE:
                bad = int(np.count_nonzero(patterns >= _INFINITE))
                self._check(False, field, f"{bad} NaN or infinite values", "finite values")

    def _check_range(self, field: str, array: U8, low: int, high: int) -> None:
        smallest, largest = int(array.min()), int(array.max())
        self._check(low <= smallest and largest <= high, field, f"[{smallest}, {largest}]", f"[{low}, {high}]")


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight(GroupParameters):
    """Integer codes of one linear layer with the group parameters that give them their values.

    With g = i // group_size and every operation in float32:

        zeros and mins None:  weight[o, i] = (codes[o, i] - 2**(bits-1)) * scales[o, g]      ("none")
        zeros:                weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]       ("integer")
        mins:                 weight[o, i] = scales[o, g] * codes[o, i] + mins[o, g]          ("float")

    The first two are exact in float32 (16 significant bits at most); the third rounds once.

    On a K grid (`l4q.k_grids`), a superblock of 256 columns shares one value of scales and of mins, and with
    k = i // 256 the equations hold with scales[o, k] * sub_scales[o, g] in place of scales[o, g] and
    mins[o, k] * sub_mins[o, g] in place of mins[o, g]. Both products are exact in float32 (17 significant bits).

    Raises:
        UsageError: A shape, dtype or value breaks the equation's ranges; the message names field, got and expected.
    """

    codes: U8
    """[out_features, in_features], values in [0, 2**bits)."""

    def __post_init__(self) -> None:
        self._check(self.bits in SUPPORTED_BITS, "bits", self.bits, f"one of {SUPPORTED_BITS}")
        self._check(
            self.codes.dtype == np.uint8 and self.codes.ndim == 2 and self.codes.size > 0,
            "codes",
            f"{self.codes.dtype} {self.codes.shape}",
            "uint8 [out_features, in_features]",
        )
        self._check(
            self.group_size > 0 and self.in_features % self.group_size == 0,
            "group_size",
            self.group_size,
            f"a divisor of in_features {self.in_features}",
        )
        self._check_range("codes", self.codes, 0, (1 << self.bits) - 1)
        self._check_parameters()

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Columns."""
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        """Groups per row, in_features // group_size."""
        return self.in_features // self.group_size

    def dequantize(self) -> F32:
        """The float32 weight [out_features, in_features] by the class equation."""
        codes = self.codes.reshape(self.out_features, self.groups, self.group_size)  # [out, groups, group_size]
        scales, mins = self.group_scales()[:, :, None], self.group_mins()
        if mins is not None:
            values = codes.astype(np.float32) * scales + mins[:, :, None]
        else:
            values = (codes.astype(np.float32) - self.integer_zeros().astype(np.float32)[:, :, None]) * scales
        return values.reshape(self.shape)


def _group_values(shared: F16, integers: U8 | None) -> F32:
    """One number per group, float32 [out, groups]; on a K grid the superblock's fp16 number times the integers."""
    values = shared.astype(np.float32)
    if integers is None:
        return values
    return np.repeat(values, integers.shape[1] // values.shape[1], axis=1) * integers.astype(np.float32)
