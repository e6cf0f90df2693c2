"""Which linears are quantized, and on which grid: per-module overrides, modules left dense, the output head.

Patterns are fnmatch patterns on a module's dotted name or its last part, as in `LoraConfig.target_modules`. Of several
overrides that match a module the *first* wins, as in GPTQ's `dynamic` rules; it replaces the fields that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from l4q.config import MOST_GROUP, QuantConfig, ScaleGrid, ZeroPoint
from l4q.errors import UsageError

WHOLE = ("bits", "group_size")
FORM = "PATTERN:bits=3,group_size=32,zero_point=none"

# Last part of a module's name -> the layer that vLLM fuses it into, which needs one group size for all its members.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True, kw_only=True)
class Override:
    """Another grid for the modules that a pattern matches.

    Raises:
        UsageError: The pattern is empty, no field is replaced, or a value is one that no grid supports.
    """

    pattern: str
    """fnmatch pattern on a module's dotted name or its last part."""
    bits: int | None = None
    """Bits per code; None keeps the common value, as in the other fields."""
    group_size: int | None = None
    zero_point: ZeroPoint | None = None
    scale_grid: ScaleGrid | None = None
    """None: the common value, or the default of another zero_point."""

    def __post_init__(self) -> None:
        if not self.pattern or not self.changes:
            raise UsageError("an override needs a pattern and a field", where="override", got=self, expected=FORM)
        self.apply(QuantConfig())

    @property
    def changes(self) -> dict[str, Any]:
        """The fields it replaces."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "pattern"}
        return {name: value for name, value in values.items() if value is not None}

    def apply(self, quant: QuantConfig) -> QuantConfig:
        """The grid with this override's fields in place of its own."""
        changes = self.changes
        if "scale_grid" not in changes and changes.get("zero_point", quant.zero_point) != quant.zero_point:
            changes["scale_grid"] = None  # the default of the new kind of zero-point
        return replace(quant, **changes)

    def describe(self) -> str:
        """The form the command line reads."""
        return f"{self.pattern}:{','.join(f'{name}={value}' for name, value in self.changes.items())}"

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read `FORM`.

        Raises:
            UsageError: The text has another form, or a field or value is unknown.
        """
        pattern, _, rest = text.rpartition(":")
        pairs = [part.partition("=") for part in rest.split(",")]
        values = {name.strip(): value.strip() for name, _, value in pairs}
        known = [field.name for field in fields(cls) if field.name != "pattern"]
        if not pattern or len(values) != len(pairs) or not set(values) <= set(known):
            raise UsageError(
                "an override cannot be read",
                where="--override",
                got=text,
                expected=f"{FORM}, each of {known} at most once",
            )
        typed = {
            name: _whole(name, value) if name in ("bits", "group_size") else value for name, value in values.items()
        }
        return cls(pattern=pattern, **typed)  # type: ignore[arg-type]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module's dotted name or the last part of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def grid_of(name: str, quant: QuantConfig, overrides: Iterable[Override]) -> QuantConfig:
    """The grid of one module: that of the first override that matches it, else `quant`."""
    first = next((override for override in overrides if matches(name, override.pattern)), None)
    return quant if first is None else first.apply(quant)


def grids_of(names: Sequence[str], quant: QuantConfig, overrides: Sequence[Override]) -> dict[str, QuantConfig]:
    """The grid of every module.

    Raises:
        UsageError: An override matches none of them.
    """
    require_used("override", [override.pattern for override in overrides], names)
    return {name: grid_of(name, quant, overrides) for name in names}


def require_used(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse patterns that match nothing, which would be a typing error that goes unnoticed.

    Raises:
        UsageError: See above.
    """
    unused = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
    if unused:
        raise UsageError(
            "a pattern matches no layer to quantize",
            where=option,
            got=unused,
            expected=f"patterns such as *.q_proj; the layers are {sorted({n.rpartition('.')[2] for n in names})}",
        )


def split_siblings(group_sizes: Mapping[str, int | None]) -> list[str]:
    """Layers that vLLM fuses whose members differ in group size, or of which only some are quantized.

    Members may differ in bits and in the kind of zero-point: 4-bit fields with zero-points hold them all.

    Args:
        group_sizes: Group size by module; None for a linear left dense.
    """
    fused: dict[str, dict[str, str]] = {}
    for name, size in group_sizes.items():
        parent, dot, leaf = name.rpartition(".")
        if leaf in FUSED:
            kind = "dense" if size is None else f"group_size {size}"
            fused.setdefault(f"{parent}{dot}{FUSED[leaf]}", {})[leaf] = kind
    return [
        f"{layer} ({', '.join(f'{leaf} {kind}' for leaf, kind in members.items())})"
        for layer, members in fused.items()
        if len(set(members.values())) > 1
    ]


def _whole(name: str, value: str) -> int:
    try:
        if len(value) > len(str(-MOST_GROUP)):
            raise ValueError("too many digits")
        return int(value)
    except ValueError as error:
        raise UsageError(
            "an override cannot be read",
            where="--override",
            got=f"{name}={value}",
            expected=f"a whole number for {name}",
        ) from error
