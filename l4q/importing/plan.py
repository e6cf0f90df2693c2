"""Which grid a checkpoint gets, and what becomes of each module of the source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from l4q.config import GROUP_MULTIPLE, PER_ROW, QuantConfig, ZeroPoint
from l4q.errors import InexactError, UnsupportedError
from l4q.importing.fit import KINDS, Survey, survey
from l4q.importing.source import Source


@dataclass(frozen=True, kw_only=True)
class ImportedModule:
    """What becomes of one quantized module of the source."""

    name: str
    own: str
    """Its grid in the source, in words."""
    reason: str
    """Why it cannot be integers of the checkpoint; empty: every integer is taken over."""

    @property
    def exact(self) -> bool:
        """Whether it stays quantized."""
        return not self.reason


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """The grid of the checkpoint and the fate of every module."""

    source: str
    format: str
    quant: QuantConfig | None
    """None: no module fits any grid."""
    modules: tuple[ImportedModule, ...]
    notes: tuple[str, ...]

    @property
    def exact(self) -> tuple[str, ...]:
        """Modules whose integers are taken over."""
        return tuple(module.name for module in self.modules if module.exact)

    @property
    def refused(self) -> tuple[ImportedModule, ...]:
        """Modules that the grid cannot hold."""
        return tuple(module for module in self.modules if not module.exact)

    def check(self, *, allow_dense: bool) -> None:
        """Stop before anything is written.

        Raises:
            UnsupportedError: No module can be taken over.
            InexactError: Some cannot, and keeping them dense was not allowed.
        """
        reasons = "; ".join(f"{count} modules: {reason}" for reason, count in self.reasons().items())
        if self.quant is None:
            raise UnsupportedError(
                "no module of the source is on a grid of L4Q",
                where=self.source,
                got=reasons,
                expected=f"2 to 4 bits, fp16 scales, groups of a multiple of {GROUP_MULTIPLE} neighbouring columns",
                remedy="fine-tune it with l4q-train instead, which accepts it as MODEL",
            )
        if self.refused and not allow_dense:
            raise InexactError(
                f"{len(self.refused)} of {len(self.modules)} modules cannot be taken over exactly",
                where=f"{self.source}: {self.refused[0].name}",
                got=reasons,
                expected=f"modules on the grid of the others: {grid_words(self.quant)}",
                remedy="--allow-dense keeps these as dense float32 weights; --dry-run lists them",
            )

    def reasons(self) -> dict[str, int]:
        """How many modules each reason keeps out."""
        return dict(Counter(module.reason for module in self.refused))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "source": self.source,
            "format": self.format,
            "grid": None if self.quant is None else self.quant.to_dict(),
            "exact": len(self.exact),
            "refused": len(self.refused),
            "notes": list(self.notes),
            "modules": [
                {"name": m.name, "source_grid": m.own, "exact": m.exact, "reason": m.reason} for m in self.modules
            ],
        }


def make_plan(source: Source, zero_point: ZeroPoint | None = None) -> ImportPlan:
    """Read every module of a source once, one in memory at a time, and decide.

    Args:
        source: The opened source.
        zero_point: The checkpoint's kind of zero-point; None: the narrowest of those that hold most modules.
    """
    surveys: dict[str, Survey] = {}
    refused: dict[str, str] = {}
    for module in source.modules:
        grid = source.grid(module)
        if grid is None:
            refused[module] = source.obstacle(module)
        else:
            surveys[module] = survey(grid, join=source.joins)
    quant, reasons = common_grid(surveys, zero_point)
    refused |= reasons
    return ImportPlan(
        source=str(source.path),
        format=source.format,
        quant=quant,
        modules=tuple(
            ImportedModule(
                name=module,
                own=surveys[module].own if module in surveys else "",
                reason=refused.get(module, ""),
            )
            for module in source.modules
        ),
        notes=source.notes,
    )


def common_grid(
    surveys: dict[str, Survey], zero_point: ZeroPoint | None = None
) -> tuple[QuantConfig | None, dict[str, str]]:
    """The grid that holds most modules, and why the others do not fit: {module: reason}.

    Bits are the widest and groups the greatest common divisor of what fits, so that mixed ones lose nothing.
    """
    counts = [sum(kind not in s.refusals for s in surveys.values()) for kind in KINDS]
    kind = zero_point or KINDS[counts.index(max(counts))]
    refused = {name: s.refusals[kind] for name, s in surveys.items() if kind in s.refusals}
    fitting = {name: s for name, s in surveys.items() if name not in refused}
    size = _common_size(fitting.values())
    if size != PER_ROW:
        odd = {name: s for name, s in fitting.items() if s.group_size % GROUP_MULTIPLE}
        refused |= {name: f"whole rows of {s.columns} columns beside groups of {size}" for name, s in odd.items()}
        fitting = {name: s for name, s in fitting.items() if name not in odd}
    if not fitting:
        return None, refused
    seven = kind == "integer" and all(s.seven for s in fitting.values())
    bits = max(s.bits for s in fitting.values())
    quant = QuantConfig(bits=bits, group_size=size, zero_point=kind, scale_grid="fp16_s7" if seven else "fp16")
    return quant, refused


def _common_size(surveys: Iterable[Survey]) -> int:
    found = list(surveys)
    sizes = [s.group_size for s in found if s.group_size % GROUP_MULTIPLE == 0]
    return PER_ROW if all(s.per_row for s in found) or not sizes else math.gcd(*sizes)


def grid_words(quant: QuantConfig) -> str:
    """A grid in words."""
    groups = "one group per row" if quant.group_size == PER_ROW else f"groups of {quant.group_size}"
    return f"{quant.bits} bits, {groups}, zero_point {quant.zero_point}, scale_grid {quant.scale_grid}"
