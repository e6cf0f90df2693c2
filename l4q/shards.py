"""Sharded safetensors: a reader that checks all headers before any data, a writer that holds one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4q.errors import UsageError
from l4q.shard_index import read_index

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1_000_000_000


class ShardReader:
    """Tensors of all shards of a folder by name, memory-mapped."""

    def __init__(self, folder: Path, handles: dict[str, Any]) -> None:
        self.folder = folder
        self._handle_of: dict[str, Any] = {}
        for file_name, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                if name in self._handle_of:
                    raise UsageError("a tensor stands in two shards", where=folder / file_name, got=name)
                self._handle_of[name] = handle
        self.names: frozenset[str] = frozenset(self._handle_of)

    @classmethod
    def open(cls, folder: Path) -> ShardReader:
        """Map model.safetensors, or the shards its index names.

        Raises:
            UsageError: A shard is missing, truncated or malformed, or the index and the shards disagree.
        """
        from safetensors import SafetensorError, safe_open

        weight_map = read_index(folder, INDEX, SINGLE)
        handles = {}
        for file_name in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            path = folder / file_name
            try:
                handles[file_name] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise UsageError(
                    "a weight file is missing", where=path, remedy="copy the whole folder again"
                ) from error
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    "a weight file is not valid safetensors",
                    where=path,
                    got=error,
                    expected="a complete safetensors file",
                    remedy="it is truncated or damaged: copy or write it again",
                ) from error
        reader = cls(folder, handles)
        if weight_map and set(weight_map) != reader.names:
            odd = sorted(set(weight_map) ^ reader.names)[:5]
            raise UsageError("the index and the shards name different tensors", where=folder / INDEX, got=odd)
        return reader

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        tensor: torch.Tensor = self._handle_of[name].get_tensor(name)
        return tensor

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor as a NumPy array; not for bfloat16."""
        array: npt.NDArray[Any] = self.tensor(name).numpy()
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header."""
        return tuple(self._handle_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype from the header in safetensors' words: "F32", "U8", ..."""
        return str(self._handle_of[name].get_slice(name).get_dtype())

    def metadata(self, name: str) -> dict[str, str]:
        """The free-form metadata of the shard that holds a tensor."""
        return dict(self._handle_of[name].metadata() or {})


class ShardWriter:
    """Collects tensors and writes a shard whenever the next addition would exceed the limit."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._tensors: dict[str, torch.Tensor] = {}
        self._metadata: dict[str, str] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Add tensors that belong together; they share a shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._bytes + size > self._limit:
            self._flush()
        self._tensors.update(tensors)
        self._metadata.update(metadata)
        self._bytes += size

    def close(self) -> None:
        """Write the last shard, give the shards their final names and write the index if there are several."""
        if self._tensors or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        part = self._part(len(self._shards))
        save_file(self._tensors, part, metadata={"format": "pt", **self._metadata})
        sort_metadata(part)
        part.chmod(0o644)  # save_file leaves 0600
        self._shards.append(list(self._tensors))
        self._total += self._bytes
        self._tensors, self._metadata, self._bytes = {}, {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f".shard-{number:05d}.part"


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata keys in order, in place.

    The library writes them in the order of a randomly seeded hash map, so equal content would give unequal bytes.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(size))  # the format pads headers with spaces
