"""Where every byte of a sharded safetensors export goes, decided from names, dtypes and shapes alone.

A file is 8 bytes with the header's length (little-endian), the header as JSON padded with spaces to a multiple of 8,
and the tensors' bytes without gaps. Within a file tensors stand as safetensors' own writer puts them: by dtype, widest
first, then by name (safetensors 0.8, src/tensor.rs, `prepare`); the metadata's keys are sorted, which the library
leaves to a randomly seeded hash map.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from l4q.errors import UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1_000_000_000

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8,
    "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes of one value by safetensors' word for the dtype, in the order in which the format ranks dtypes."""
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor before it exists."""

    name: str
    dtype: str
    """safetensors' word: a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]
    constant: bytes = b""
    """Its data, if that is known now; the tensor is not produced then."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors that belong together: they share a shard and are produced together."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the shard's free-form metadata says of them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_unit(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Unit:
    """A unit of tensors given as name -> (dtype in safetensors' words, shape)."""
    specs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in tensors.items())
    return Unit(name=",".join(tensors), tensors=specs, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """One file: what it holds, and where."""

    file_name: str
    units: tuple[Unit, ...]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors in file order."""
        return tuple(sorted((t for unit in self.units for t in unit.tensors), key=lambda t: (-_RANK[t.dtype], t.name)))

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor: the length and the padded JSON."""
        metadata = {"format": "pt"}
        for unit in self.units:
            metadata |= unit.metadata
        entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Position of every tensor's first byte in the file."""
        positions, position = {}, len(self.header)
        for tensor in self.tensors:
            positions[tensor.name] = position
            position += tensor.nbytes
        return positions

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(unit.nbytes for unit in self.units)


def group_units(units: Iterable[Unit], max_bytes: int) -> list[list[Unit]]:
    """Fill shards in order; a new one starts when the next unit would exceed the limit of one that holds any."""
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.nbytes
    return shards


def plan_shards(units: Iterable[Unit], max_bytes: int = MAX_SHARD_BYTES) -> tuple[ShardLayout, ...]:
    """Lay out all files; their names say how many there are.

    Args:
        units: In the order in which they will be produced.
        max_bytes: Bytes of tensors per file; a larger unit gets a file of its own.

    Raises:
        UsageError: Two tensors have one name.
    """
    shards = group_units(units, max_bytes)
    names = [tensor.name for shard in shards for unit in shard for tensor in unit.tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError("a tensor is written twice", got=twice, expected="one tensor of each name")
    return tuple(
        ShardLayout(file_name=shard_name(number, len(shards)), units=tuple(shard))
        for number, shard in enumerate(shards)
    )


def row_slices(shape: tuple[int, ...], value_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Ranges of a tensor's first axis with at most `max_bytes` (or one row) each; everything at once if it has none."""
    if not shape:
        yield slice(None)
        return
    step = max(1, max_bytes // max(1, math.prod(shape[1:]) * value_bytes))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def shard_name(number: int, count: int) -> str:
    """File name of a shard, counted from 0."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_json(layouts: Sequence[ShardLayout]) -> str:
    """Content of the index beside several shards."""
    weight_map = {tensor.name: layout.file_name for layout in layouts for tensor in layout.tensors}
    total = sum(unit.nbytes for layout in layouts for unit in layout.units)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )
