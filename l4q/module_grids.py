"""Grids of single modules in a checkpoint: `modules` in config.json's quantization_config (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from l4q.config import GROUP_MULTIPLE, PER_ROW, QuantConfig, ZeroPoint
from l4q.errors import UsageError

MODULES_KEY = "modules"
"""Module name -> its grid, for the modules that are not on the common one."""


class Grid(Protocol):
    """What a record says of a weight: `l4q.weight.GroupParameters`, or a weight's sizes alone."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def group_size(self) -> int:
        """Columns per group."""
        ...

    @property
    def groups(self) -> int:
        """Groups per row."""
        ...

    @property
    def zero_point(self) -> ZeroPoint:
        """Kind of zero-point."""
        ...

    @property
    def k_grid(self) -> str | None:
        """Name of its K grid, if it is on one."""
        ...


def module_grids(section: Mapping[str, Any], *, where: object = None) -> dict[str, QuantConfig]:
    """Grids of the modules that are not on the common one, from a quantization_config.

    Raises:
        UsageError: The entry is damaged.
    """
    entries = section.get(MODULES_KEY, {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UsageError(
            "the grids of single modules cannot be read",
            where=where,
            got=entries,
            expected='{"module": {"bits": …, "group_size": …, "zero_point": …}}',
        )
    return {module: QuantConfig.from_dict(entry, where=f"{where}: {module}") for module, entry in entries.items()}


def grid_record(weight: Grid, quant: QuantConfig) -> dict[str, Any]:
    """The weight's own grid, with the scale grid of `quant` if the weight is on `quant`: the values do not tell."""
    whole_row = weight.groups == 1 and (quant.group_size == PER_ROW or weight.group_size % GROUP_MULTIPLE > 0)
    group_size = PER_ROW if whole_row else weight.group_size
    record: dict[str, Any] = {"bits": weight.bits, "group_size": group_size, "zero_point": weight.zero_point}
    if weight.k_grid is not None or quant.k_grid is not None:
        return {**record, "scale_grid": weight.k_grid or "fp16"}
    on_grid = {**quant.to_dict(), **record} == quant.to_dict()
    return {**record, "scale_grid": quant.scale_grid} if on_grid else record


def grids_entry(records: Mapping[str, Mapping[str, Any]], quant: QuantConfig) -> dict[str, Any]:
    """{`MODULES_KEY`: records that differ from the common grid}, or nothing if none does."""
    own = quant.to_dict()
    others = {module: dict(record) for module, record in records.items() if {**own, **record} != own}
    return {MODULES_KEY: others} if others else {}
