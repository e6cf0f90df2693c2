"""Write sharded safetensors one tensor after another: nothing but the piece at hand is in memory.

`write_shards` asks for what belongs into files whose layout is known beforehand, `PlannedWriter` is given it.
`ShardWriter` takes tensors whose sizes show only as they come: it keeps them in a file beside the shard and puts them
in order when the shard is full.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from l4q.ahead import made_ahead
from l4q.direct import DirectFile, read_blocks, write_at
from l4q.errors import UsageError
from l4q.file_table import FileFacts, FileTable
from l4q.prefix_hash import Advance, ignore
from l4q.shard_layout import (
    INDEX,
    MAX_SHARD_BYTES,
    ShardLayout,
    TensorSpec,
    Unit,
    index_json,
    plan_shards,
    plan_unit,
    shard_name,
)

if TYPE_CHECKING:
    import torch

Producer = Callable[[str], Iterable[tuple[str, "npt.NDArray[Any] | torch.Tensor"]]]
"""Unit name -> (tensor name, values) pairs; the rows of a large tensor may come as several pairs, in order."""

_COPY_BYTES = 1 << 20


def write_shards(
    folder: Path,
    layouts: Iterable[ShardLayout],
    produce: Producer,
    *,
    finished: Callable[[ShardLayout], bool] = lambda layout: False,
    follow: Callable[[Path, str], Advance] = lambda part, name: ignore,
    on_shard: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write the planned files and, if there are several, their index.

    A file has its final name only once it is complete and on the disk.

    Args:
        folder: An existing folder.
        layouts: From `plan_shards`.
        produce: Called once per unit: shard after shard, in the order in which the shard's file holds the units, by a
            thread that runs ahead of the writing. What it yields must stay as it is.
        finished: Whether an earlier call has completed a shard already; its units are not produced again.
        follow: Called with the file in the making and its final name; what it returns is told how much is final.
        on_shard: Called with the path of every shard this call has completed.

    Raises:
        UsageError: A unit's tensors are not as planned.
    """
    layouts = tuple(layouts)
    for layout in layouts:
        if not finished(layout):
            on_shard(_write_shard(folder, layout, produce, follow))
    if len(layouts) > 1:
        (folder / INDEX).write_text(index_json(layouts), encoding="utf-8")


def _write_shard(folder: Path, layout: ShardLayout, produce: Producer, follow: Callable[[Path, str], Advance]) -> Path:
    part, final = folder / f".{layout.file_name}.part", folder / layout.file_name
    with open(part, "wb", buffering=0) as file:
        with DirectFile(part, layout.nbytes) as target:
            shard = _ShardFile(target, layout, follow(part, layout.file_name))
            for tensor in layout.tensors:
                if tensor.constant:
                    shard.put(tensor, np.frombuffer(tensor.constant, dtype=np.uint8))
            units = sorted(layout.units, key=lambda unit: _first_place(layout, unit))
            with made_ahead(_pieces(units, produce), lambda piece: piece.values.nbytes) as pieces:
                for piece in pieces:
                    _write_piece(shard, piece)
            for tensor in layout.tensors:
                shard.require_whole(tensor)
        os.fsync(file.fileno())
    part.rename(final)
    return final


def _first_place(layout: ShardLayout, unit: Unit) -> int:
    """Where the file holds the first of a unit's tensors that must be produced."""
    return min((layout.offsets[tensor.name] for tensor in unit.tensors if not tensor.constant), default=0)


class _ShardFile:
    """A file that is filled in any order, and how far from its beginning it is final."""

    def __init__(self, file: DirectFile, layout: ShardLayout, advance: Advance) -> None:
        self._file = file
        self._layout = layout
        self._advance = advance
        self._written = dict.fromkeys(layout.offsets, 0)
        self._whole = 0
        file.write(np.frombuffer(layout.header, dtype=np.uint8), 0)

    def put(self, tensor: TensorSpec, data: npt.NDArray[np.uint8]) -> None:
        """Write a piece where its tensor's last piece ended.

        Raises:
            UsageError: The tensor is larger than planned.
        """
        written = self._written[tensor.name]
        if written + data.nbytes > tensor.nbytes:
            raise _wrong_size(tensor, written + data.nbytes)
        start = self._layout.offsets[tensor.name] + written
        self._file.write(data, start)
        self._written[tensor.name] += data.nbytes
        self._advance(self._final(), start, data)

    def require_whole(self, tensor: TensorSpec) -> None:
        """Check that all of a tensor is written.

        Raises:
            UsageError: It is not.
        """
        if self._written[tensor.name] != tensor.nbytes:
            raise _wrong_size(tensor, self._written[tensor.name])

    def _final(self) -> int:
        """The end of what is written without a gap."""
        tensors = self._layout.tensors
        while self._whole < len(tensors) and self._written[tensors[self._whole].name] == tensors[self._whole].nbytes:
            self._whole += 1
        if self._whole == len(tensors):
            return self._layout.nbytes
        return self._layout.offsets[tensors[self._whole].name] + self._written[tensors[self._whole].name]


@dataclass(frozen=True)
class _Piece:
    """Values of a unit's tensor that follow those before."""

    unit: Unit
    name: str
    values: npt.NDArray[Any] | torch.Tensor


def _pieces(units: Iterable[Unit], produce: Producer) -> Iterator[_Piece]:
    for unit in units:
        for name, values in produce(unit.name):
            yield _Piece(unit, name, values)


def _write_piece(shard: _ShardFile, piece: _Piece) -> None:
    """Put a piece where its tensor's last piece ended."""
    planned = {tensor.name: tensor for tensor in piece.unit.tensors}
    if piece.name not in planned:
        raise UsageError("a tensor is not in the plan", where=piece.unit.name, got=piece.name, expected=sorted(planned))
    tensor, dtype = planned[piece.name], dtype_word(piece.values)
    if dtype != tensor.dtype:
        raise UsageError("not the planned dtype", where=piece.name, got=dtype, expected=tensor.dtype)
    shard.put(tensor, as_bytes(piece.values))


class PlannedWriter:
    """Takes units one after another and writes their tensors where the plan says they belong.

    A context manager; leaving it waits for the thread that hashes complete files, whatever happened.

    Args:
        folder: An existing folder.
        units: What will be added, in that order.
        max_shard_bytes: Bytes of tensors per file.
    """

    def __init__(self, folder: Path, units: Iterable[Unit], max_shard_bytes: int | None = None) -> None:
        self._folder = folder
        self._layouts = plan_shards(units, MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
        self._planned = iter([(layout, unit) for layout in self._layouts for unit in layout.units])
        self._file: DirectFile | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="l4q-shard")
        self._facts: list[Future[FileFacts]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._thread.shutdown(cancel_futures=True)

    def add(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Write a unit's tensors.

        Raises:
            UsageError: They are not what the plan has next.
        """
        unit = _unit(tensors, metadata)
        layout, planned = next(self._planned, (None, None))
        if layout is None or planned is None:
            raise UsageError("not the planned tensors", got=unit.name, expected="nothing more")
        got, expected = (unit.tensors, unit.metadata), (planned.tensors, planned.metadata)
        if got != expected:
            raise UsageError("not the planned tensors", where=layout.file_name, got=got, expected=expected)
        file = self._open(layout) if self._file is None else self._file
        for name, value in tensors.items():
            file.write(as_bytes(value), layout.offsets[name])
        if planned is layout.units[-1]:
            self._complete(layout)

    def close(self) -> FileTable:
        """Write the index if there are several files.

        Returns:
            Their sizes and hashes.

        Raises:
            UsageError: A unit is missing.
        """
        missing = next(self._planned, None)
        if missing is not None:
            raise UsageError("a planned tensor was not written", where=missing[0].file_name, got=missing[1].name)
        if len(self._layouts) > 1:
            (self._folder / INDEX).write_text(index_json(self._layouts), encoding="utf-8")
        return {layout.file_name: facts.result() for layout, facts in zip(self._layouts, self._facts, strict=True)}

    def _open(self, layout: ShardLayout) -> DirectFile:
        path = self._folder / layout.file_name
        path.touch()
        self._file = DirectFile(path, layout.nbytes)
        self._file.write(np.frombuffer(layout.header, dtype=np.uint8), 0)
        return self._file

    def _complete(self, layout: ShardLayout) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._facts.append(self._thread.submit(_facts, self._folder / layout.file_name))


def _facts(path: Path) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    for block in read_blocks(path):
        digest.update(block.data)
        size += block.nbytes
    return FileFacts(sha256=digest.hexdigest(), size=size)


class ShardWriter:
    """Takes tensors one after another and completes a shard whenever the next addition would exceed the limit.

    A shard is completed by a thread of its own: it waits for the disk most of the time, while the next shard's tensors
    are computed. One at a time, so that no more than two shards' worth of collected tensors lies on the disk.

    A context manager; leaving it waits for that thread, whatever happened.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._shard = _Collected(folder, 0)
        self._shards: list[tuple[Unit, ...]] = []
        self._facts: list[FileFacts] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="l4q-shard")
        self._completing: Future[FileFacts] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def add(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Add tensors that belong together; they share a shard."""
        unit = _unit(tensors, metadata)
        if self._shard.units and self._shard.nbytes + unit.nbytes > self._limit:
            self._complete()
        self._shard.append(unit, tensors)

    def close(self) -> FileTable:
        """Complete the last shard, give the shards their final names and write the index if there are several.

        Returns:
            Sizes and hashes of the shards.
        """
        if self._shard.units or not self._shards:
            self._complete()
        self._wait()
        count = len(self._shards)
        layouts = []
        for number, units in enumerate(self._shards):
            layouts.append(ShardLayout(file_name=shard_name(number, count), units=units))
            _part(self._folder, number).rename(self._folder / layouts[-1].file_name)
        if count > 1:
            (self._folder / INDEX).write_text(index_json(layouts), encoding="utf-8")
        return {layout.file_name: facts for layout, facts in zip(layouts, self._facts, strict=True)}

    def _complete(self) -> None:
        """Hand the shard to the thread, once that has completed the one before."""
        self._wait()
        self._completing = self._thread.submit(self._shard.complete)
        self._shards.append(tuple(self._shard.units))
        self._shard = _Collected(self._folder, len(self._shards))

    def _wait(self) -> None:
        if self._completing is not None:
            self._facts.append(self._completing.result())
            self._completing = None


class _Collected:
    """The tensors of one shard as they came, in a file beside it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.units: list[Unit] = []
        self.nbytes = 0
        self._places: dict[str, int] = {}
        self._spool = folder / f".shard-{number:05d}.spool"
        self._part = _part(folder, number)

    def append(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a unit's tensors."""
        with open(self._spool, "ab", buffering=0) as file:
            for name, value in tensors.items():
                data = as_bytes(value)
                write_at(file.fileno(), data, self.nbytes)
                self._places[name] = self.nbytes
                self.nbytes += data.nbytes
        self.units.append(unit)

    def complete(self) -> FileFacts:
        """Write header and tensors in file order, copied from where they were collected."""
        layout = ShardLayout(file_name=self._part.name, units=tuple(self.units))
        self._spool.touch()
        digest = hashlib.sha256(layout.header)
        self._part.touch()
        with open(self._spool, "rb", buffering=0) as source, DirectFile(self._part, layout.nbytes) as target:
            target.write(np.frombuffer(layout.header, dtype=np.uint8), 0)
            for tensor in layout.tensors:
                place = layout.offsets[tensor.name]
                for block in _blocks(source.fileno(), self._places[tensor.name], tensor.nbytes):
                    digest.update(block.data)
                    target.write(block, place)
                    place += block.nbytes
        self._spool.unlink()
        return FileFacts(sha256=digest.hexdigest(), size=layout.nbytes)


def _unit(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Unit:
    return plan_unit({name: (dtype_word(value), tuple(value.shape)) for name, value in tensors.items()}, metadata)


def _part(folder: Path, number: int) -> Path:
    return folder / f".shard-{number:05d}.part"


def dtype_word(values: npt.NDArray[Any] | torch.Tensor) -> str:
    """safetensors' word for an array's or a tensor's dtype.

    Raises:
        UsageError: The format has no such dtype.
    """
    name = str(values.dtype).removeprefix("torch.")
    if name not in _WORDS:
        raise UsageError("a dtype has no place in safetensors files", got=name, expected=f"one of {sorted(_WORDS)}")
    return _WORDS[name]


_WORDS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64",
}  # fmt: skip


def as_bytes(values: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of an array or tensor in row-major order, little-endian; no copy if they lie so already."""
    if not isinstance(values, np.ndarray):
        import torch

        flat: npt.NDArray[np.uint8] = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return flat
    array = np.ascontiguousarray(values).reshape(-1)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8)


def _blocks(file: int, start: int, count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """So many bytes of an open file, in pieces that stay in the processor's cache."""
    for done in range(0, count, _COPY_BYTES):
        yield np.frombuffer(os.pread(file, min(_COPY_BYTES, count - done), start + done), dtype=np.uint8)


def _wrong_size(tensor: TensorSpec, got: int) -> UsageError:
    return UsageError("not the planned size", where=tensor.name, got=f"{got} bytes", expected=f"{tensor.nbytes} bytes")
