"""Sharded safetensors: a reader that checks all headers before any data (`l4q.shard_writer` writes them).

Tensors are read with pread into memory of their own, not mapped: what was read and dropped again does not stay in the
process's resident memory, however large the files are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4q.errors import UsageError
from l4q.shard_layout import INDEX, SINGLE

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
"""NumPy's dtype by safetensors' word; those it lacks are torch's."""
_TORCH = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
ALL = slice(None)
"""Every row."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor lies, from a header."""

    path: Path
    start: int
    """Position of its first byte in the file."""
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class ShardReader:
    """Tensors of all shards of a folder by name."""

    def __init__(self, folder: Path, file_names: list[str]) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        for file_name in file_names:
            places, self._metadata[folder / file_name] = _read_header(folder / file_name)
            twice = sorted(set(places) & set(self._places))
            if twice:
                raise UsageError("a tensor stands in two shards", where=folder / file_name, got=twice[0])
            self._places |= places
        self.names: frozenset[str] = frozenset(self._places)

    @classmethod
    def open(cls, folder: Path) -> ShardReader:
        """Read the headers of model.safetensors, or of the shards its index names.

        Raises:
            UsageError: A shard is missing, truncated or malformed, or the index and the shards disagree.
        """
        weight_map = _read_index(folder)
        reader = cls(folder, sorted(set(weight_map.values())) if weight_map else [SINGLE])
        if weight_map and set(weight_map) != reader.names:
            odd = sorted(set(weight_map) ^ reader.names)[:5]
            raise UsageError("the index and the shards name different tensors", where=folder / INDEX, got=odd)
        return reader

    def tensor(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Read one tensor, or a range of its first axis.

        Raises:
            UsageError: Its dtype is none of torch's, or the file was cut after it was opened.
        """
        import torch

        place = self._places[name]
        if place.dtype in _NUMPY:
            return torch.from_numpy(self.numpy(name, rows))
        if place.dtype not in _TORCH:
            raise UsageError(
                "a tensor has a dtype that is not read", where=f"{place.path}: {name}", got=place.dtype,
                expected=f"one of {[*_NUMPY, *_TORCH]}",
            )  # fmt: skip
        data, shape = _read(place, rows)
        return torch.from_numpy(data).view(getattr(torch, _TORCH[place.dtype])).reshape(shape)

    def numpy(self, name: str, rows: slice = ALL) -> npt.NDArray[Any]:
        """Read one tensor as a NumPy array, or a range of its first axis; not for bfloat16."""
        data, shape = _read(self._places[name], rows)
        return data.view(_NUMPY[self._places[name].dtype]).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """Dtype from the header in safetensors' words: "F32", "U8", ..."""
        return self._places[name].dtype

    def metadata(self, name: str) -> dict[str, str]:
        """The free-form metadata of the shard that holds a tensor."""
        return self._metadata[self._places[name].path]


def _read(place: _Place, rows: slice) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """The bytes of a tensor's rows, and their shape."""
    first, last, _ = rows.indices(place.shape[0]) if place.shape else (0, 1, 1)
    shape = (last - first, *place.shape[1:]) if place.shape else ()
    row_bytes = place.nbytes // max(1, place.shape[0]) if place.shape else place.nbytes
    data = np.empty((last - first) * row_bytes, dtype=np.uint8)
    view, position = data.data, place.start + first * row_bytes
    with open(place.path, "rb", buffering=0) as file:
        while view.nbytes:
            count = os.preadv(file.fileno(), [view], position)
            if not count:
                raise UsageError("a weight file was cut while it was read", where=place.path, remedy="copy it again")
            view, position = view[count:], position + count
    return data, shape


def _read_header(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Places of a file's tensors and its free-form metadata, once the library has accepted the header.

    Raises:
        UsageError: The file is missing, truncated or malformed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"), open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
    except FileNotFoundError as error:
        raise UsageError("a weight file is missing", where=path, remedy="copy the whole folder again") from error
    except (SafetensorError, OSError) as error:
        raise UsageError(
            "a weight file is not valid safetensors",
            where=path,
            got=error,
            expected="a complete safetensors file",
            remedy="it is truncated or damaged: copy or write it again",
        ) from error
    metadata = entries.pop("__metadata__", None) or {}
    places = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        places[name] = _Place(
            path=path,
            start=8 + size + begin,
            nbytes=end - begin,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
        )
    return places, metadata


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            "the shard index cannot be read", where=path, got=error, expected='{"weight_map": {…}}'
        ) from error
    outside = sorted(name for name in set(pairs.values()) if Path(name).name != name or name.startswith("."))
    if outside:
        raise UsageError(
            "the shard index points outside its folder", where=path, got=outside, expected="plain file names"
        )
    return pairs
