"""`QuantizedWeight`: the one value that training produces and every exporter packs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from l4q.config import SUPPORTED_BITS, ZeroPoint
from l4q.errors import UnsupportedError, UsageError

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """Integer codes of one linear layer with the group parameters that give them their values.

    With g = i // group_size and every operation in float32:

        zeros and mins None:  weight[o, i] = (codes[o, i] - 2**(bits-1)) * scales[o, g]      ("none")
        zeros:                weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]       ("integer")
        mins:                 weight[o, i] = scales[o, g] * codes[o, i] + mins[o, g]          ("float")

    The first two are exact in float32 (16 significant bits at most); the third rounds once.

    Raises:
        UsageError: A shape, dtype or value breaks the equation's ranges; the message names field, got and expected.
    """

    codes: U8
    """[out_features, in_features], values in [0, 2**bits)."""
    scales: F16
    """[out_features, groups], finite and > 0."""
    zeros: U8 | None = None
    """[out_features, groups], values in [1, 2**bits - 1], so that GPTQ v1's zero - 1 fits too."""
    mins: F16 | None = None
    """[out_features, groups], finite: the value of code 0."""
    bits: int
    group_size: int
    """Columns per group; divides in_features."""
    name: str = ""
    """Module name, used in error messages only."""

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
        self._check(self.zeros is None or self.mins is None, "zeros and mins", "both", "at most one of them")
        self._check_range("codes", self.codes, 0, (1 << self.bits) - 1)
        self._check_group_array("scales", self.scales, np.float16)
        self._check(bool((self.scales > 0).all()), "scales", float(self.scales.min()), "positive values")
        if self.zeros is not None:
            self._check_group_array("zeros", self.zeros, np.uint8)
            self._check_range("zeros", self.zeros, 1, (1 << self.bits) - 1)
        if self.mins is not None:
            self._check_group_array("mins", self.mins, np.float16)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

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

    @cached_property
    def zero_point(self) -> ZeroPoint:
        """Which of the three equations applies."""
        if self.mins is not None:
            return "float"
        return "none" if self.zeros is None else "integer"

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
        return np.full(self.scales.shape, 1 << (self.bits - 1), dtype=np.uint8)

    def dequantize(self) -> F32:
        """The float32 weight [out_features, in_features] by the class equation."""
        codes = self.codes.reshape(self.out_features, self.groups, self.group_size)  # [out, groups, group_size]
        scales = self.scales.astype(np.float32)[:, :, None]
        if self.mins is not None:
            values = codes.astype(np.float32) * scales + self.mins.astype(np.float32)[:, :, None]
        else:
            values = (codes.astype(np.float32) - self.integer_zeros().astype(np.float32)[:, :, None]) * scales
        return values.reshape(self.shape)

    def _check(self, holds: bool, field: str, got: object, expected: str) -> None:
        if not holds:
            raise UsageError(
                f"invalid quantized weight: {field}",
                where=f"{self.name}.{field}" if self.name else field,
                got=got,
                expected=expected,
                remedy="the file is damaged or was not written by l4q; write the checkpoint again",
            )

    def _check_group_array(self, field: str, array: npt.NDArray[np.generic], dtype: type[np.generic]) -> None:
        expected = (self.out_features, self.groups)
        self._check(
            array.dtype == dtype and array.shape == expected,
            field,
            f"{array.dtype} {array.shape}",
            f"{np.dtype(dtype).name} {expected}",
        )
        if np.issubdtype(dtype, np.floating):
            bad = int(np.count_nonzero(~np.isfinite(array.astype(np.float32))))
            self._check(bad == 0, field, f"{bad} NaN or infinite values", "finite values")

    def _check_range(self, field: str, array: U8, low: int, high: int) -> None:
        smallest, largest = int(array.min()), int(array.max())
        self._check(low <= smallest and largest <= high, field, f"[{smallest}, {largest}]", f"[{low}, {high}]")
