"""What training may put into a weight (`QuantConfig`) and how it is adapted (`LoraConfig`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from l4q.errors import UsageError
from l4q.k_grids import FALLBACK_BITS, FALLBACK_GROUP, K_GRIDS, SUPERBLOCK, KGrid

ZeroPoint = Literal["none", "integer", "float"]
ScaleGrid = Literal["fp16", "fp16_s7", "q4_k", "q3_k"]
Init = Literal["l4q", "lsq+", "symm", "asymm", "calibrated", "reconstructed"]
KernelChoice = Literal["auto", "eager", "numba", "triton"]
GradientScale = Literal["none", "lsq"]
BaseStorage = Literal["dense", "int8", "int4", "start"]

FORMAT_VERSION = 1
SUPPORTED_BITS = (2, 3, 4)
GROUP_MULTIPLE = 32
PER_ROW = -1
MOST_RANK = 1 << 16
MOST_GROUP = 1 << 30

# fp16_s7 keeps 7 significant bits, so that scale * zero (4 more bits) is exact in fp16 and GGUF's Q4_1 holds it.
DEFAULT_SCALE_GRID: dict[str, ScaleGrid] = {"none": "fp16", "integer": "fp16_s7", "float": "fp16"}


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The grid of every quantized linear: weight[o, i] = (q[o, i] - z[o, g]) * s[o, g], g = i // group_size.

    Raises:
        UsageError: A field has a value that no grid supports.
    """

    bits: int = 4
    """Bits per code; codes are integers in [0, 2**bits)."""
    group_size: int = 64
    """Columns that share one scale; a multiple of 32, or -1 for one group per row. K grids fix it: 32 or 16."""
    zero_point: ZeroPoint = "none"
    """"none": b = 0 (symmetric); "integer": b snapped to whole steps in the forward; "float": the paper's free b."""
    scale_grid: ScaleGrid | None = None
    """Values of scales: "fp16"; "fp16_s7", fp16 with 7 significant bits; or llama.cpp's "q4_k" and "q3_k", an fp16
    number per 256 columns times a small integer per group. None picks by zero_point."""

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in SUPPORTED_BITS:
            raise _bad("bits", self.bits, f"one of {SUPPORTED_BITS}")
        if self.k_grid is not None:
            self._check_k_grid(str(self.scale_grid), self.k_grid)
            return
        whole = _is_int(self.group_size)
        grouped = whole and 0 < self.group_size <= MOST_GROUP and self.group_size % GROUP_MULTIPLE == 0
        if not grouped and not (whole and self.group_size == PER_ROW):
            raise _bad("group_size", self.group_size, f"a positive multiple of {GROUP_MULTIPLE}, or {PER_ROW}")
        if self.zero_point not in get_args(ZeroPoint):
            raise _bad("zero_point", self.zero_point, f"one of {get_args(ZeroPoint)}")
        if self.scale_grid is None:
            object.__setattr__(self, "scale_grid", DEFAULT_SCALE_GRID[self.zero_point])
        if self.scale_grid not in get_args(ScaleGrid):
            raise _bad("scale_grid", self.scale_grid, f"one of {get_args(ScaleGrid)}")

    def _check_k_grid(self, name: str, grid: KGrid) -> None:
        if (self.bits, self.group_size) != (grid.bits, grid.group_size) or self.zero_point not in grid.zero_points:
            kinds = " or ".join(grid.zero_points)
            raise UsageError(
                f"scale_grid {name} fixes the bits, the group size and the kinds of zero-point",
                where="scale_grid",
                got=f"bits {self.bits}, group_size {self.group_size}, zero_point {self.zero_point}",
                expected=f"bits {grid.bits}, group_size {grid.group_size}, zero_point {kinds}",
                remedy=f"use --bits {grid.bits} --group-size {grid.group_size} --zero-point {grid.zero_points[-1]}",
            )

    @property
    def k_grid(self) -> KGrid | None:
        """What the scale grid fixes, if it is one of llama.cpp's K types."""
        return K_GRIDS.get(str(self.scale_grid))

    def for_layer(self, in_features: int) -> QuantConfig:
        """The grid of a layer with `in_features` columns.

        It is this one, except on a K grid whose superblocks of 256 do not fill the row. Such a layer takes the fp16
        grid with 4 bits and groups of 32, which GGUF stores in Q4_0 (zero_point "none") or Q4_1 ("float").
        """
        if self.k_grid is None or in_features % SUPERBLOCK == 0:
            return self
        return replace(self, bits=FALLBACK_BITS, group_size=FALLBACK_GROUP, scale_grid="fp16")

    @property
    def midpoint(self) -> int:
        """The code of weight 0 when b = 0: 2**(bits - 1), METHOD's -Q_N."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    def resolve_group_size(self, in_features: int) -> int:
        """Columns per group of a layer: `group_size`, or the whole row for -1."""
        return in_features if self.group_size == PER_ROW else self.group_size

    def to_dict(self) -> dict[str, Any]:
        """The grid as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: object = None) -> QuantConfig:
        """Read a grid from a config.json section, ignoring keys that belong to the container.

        Raises:
            UsageError: A field is missing or has a value that no grid supports.
        """
        missing = [name for name in ("bits", "group_size", "zero_point") if name not in values]
        if missing:
            raise UsageError(
                "the quantization config lacks required fields",
                where=where,
                got=sorted(values),
                expected=f"also {missing}",
                remedy="write the folder again with l4q-train or l4q.checkpoint.save_checkpoint",
            )
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank update that is merged before quantization: W = W0 + (alpha / rank) * B @ A  (paper eq. 7).

    Raises:
        UsageError: A field is out of range.
    """

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / rank, as in peft's lora_alpha."""
    dropout: float = 0.0
    """Probability that a training step drops an entry of A; the layer's input is never dropped."""
    target_modules: tuple[str, ...] = ("*",)
    """fnmatch patterns on a module's dotted name or its last part; they do not reach the output head."""

    def __post_init__(self) -> None:
        if not _is_int(self.rank) or not 1 <= self.rank <= MOST_RANK:
            raise _bad("rank", self.rank, f"an integer from 1 to {MOST_RANK}")
        if not math.isfinite(self.alpha):
            raise _bad("alpha", self.alpha, "a finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise _bad("dropout", self.dropout, "a probability in [0, 1)")
        if not self.target_modules:
            raise _bad("target_modules", self.target_modules, "at least one pattern")

    @property
    def scaling(self) -> float:
        """The factor on B @ A, alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class GridLearning:
    """What of the grid trains, and how its gradients are scaled.

    Raises:
        UsageError: A field has an unknown value.
    """

    train_scales: bool = True
    """Whether the scales s train."""
    train_offsets: bool = True
    """Whether the offsets b train; zero_point "none" has none to train."""
    move_base: bool = False
    """Whether W0 keeps its place on the grid when s and b change, see `l4q.base.MovingBase`; needs a grid that W0 was
    found with."""
    gradient_scale: GradientScale = "none"
    """"none": the plain gradients, as in the paper; "lsq": those of s and b times 1 / sqrt(N * Q_P), N weights per
    group (LSQ). Adam divides a constant factor out again, so it acts through gradient clipping and Adam's epsilon."""

    def __post_init__(self) -> None:
        if self.gradient_scale not in get_args(GradientScale):
            raise _bad("gradient_scale", self.gradient_scale, f"one of {get_args(GradientScale)}")

    def gradient_factor(self, quant: QuantConfig, in_features: int) -> float:
        """The factor on the gradients of s and b of a layer with `in_features` columns."""
        if self.gradient_scale == "none":
            return 1.0
        largest = quant.max_code - quant.midpoint  # Q_P
        return float((quant.resolve_group_size(in_features) * largest) ** -0.5)


def check_init(init: str, quant: QuantConfig) -> None:
    """Refuse an initialisation that is unknown or that the grid cannot start from.

    Raises:
        UsageError: See above.
    """
    if init not in get_args(Init):
        raise _bad("init", init, f"one of {get_args(Init)}")
    if init == "asymm" and quant.zero_point == "none":
        raise UsageError(
            "the asymm initialisation needs offsets, and zero_point none has none",
            where="init",
            got="asymm with zero_point none",
            expected="zero_point integer or float, or another initialisation",
            remedy="use --init l4q, the smallest scales that clip nothing without offsets, or --zero-point integer",
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(field: str, got: object, expected: str) -> UsageError:
    return UsageError(f"{field} has an unsupported value", where=field, got=repr(got), expected=expected)
