"""`PackedWeight`: a quantized linear with its codes as the checkpoint stores them, for what moves them in bulk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from l4q.bitpack import pack_codes, row_bytes, unpack_codes
from l4q.weight import U8, GroupParameters, QuantizedWeight

PIECE_CODES = 1 << 20
"""Codes that are unpacked at a time where rows are taken one piece after another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight(GroupParameters):
    """Codes as rows of bits (`l4q.bitpack`) and their group parameters; any bit pattern is a valid code.

    Raises:
        UsageError: As `QuantizedWeight`.
    """

    packed: U8
    """[out_features, row_bytes(in_features, bits)]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (self.out_features, row_bytes(self.in_features, self.bits))
        got = f"{self.packed.dtype} {self.packed.shape}"
        self._check(self.packed.dtype == np.uint8 and self.packed.shape == expected, "codes", got, f"uint8 {expected}")

    @classmethod
    def of(cls, weight: QuantizedWeight) -> PackedWeight:
        """A weight that is in memory."""
        return cls(packed=pack_codes(weight.codes, weight.bits), **_parameters(weight, slice(None)))

    def unpack(self, rows: slice = slice(None)) -> QuantizedWeight:
        """The weight with one code per byte, or some of its rows."""
        codes = unpack_codes(self.packed[rows], self.in_features, self.bits)
        return QuantizedWeight(codes=codes, **_parameters(self, rows))

    def take(self, rows: slice | npt.NDArray[np.integer[Any]]) -> PackedWeight:
        """Some of the rows, in the order given."""
        taken = object.__new__(PackedWeight)  # rows of a weight that was checked are not checked again
        vars(taken).update(packed=self.packed[rows], **_parameters(self, rows))
        return taken

    def row_slices(self) -> Iterator[slice]:
        """Ranges of rows with at most `PIECE_CODES` codes (or one row) each."""
        step = max(1, PIECE_CODES // self.in_features)
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def fields(self, width: int, shift: int = 0) -> U8:
        """The codes plus `shift` as rows of `width`-bit fields, at least their own width.

        Returns:
            uint8 [out_features, row_bytes(in_features, width)].
        """
        if width == self.bits and not shift:
            return self.packed
        rows = np.empty((self.out_features, row_bytes(self.in_features, width)), dtype=np.uint8)
        for piece in self.row_slices():
            codes = unpack_codes(self.packed[piece], self.in_features, self.bits)
            rows[piece] = pack_codes(codes + np.uint8(shift), width)
        return rows


def _parameters(weight: GroupParameters, rows: slice | npt.NDArray[np.integer[Any]]) -> dict[str, Any]:
    """The keyword arguments of a weight with the same parameters, or those of some rows."""
    arrays = {part: getattr(weight, part) for part in ("scales", "zeros", "mins", "sub_scales", "sub_mins")}
    taken = {part: None if array is None else array[rows] for part, array in arrays.items()}
    return {**taken, "bits": weight.bits, "group_size": weight.group_size, "name": weight.name}
