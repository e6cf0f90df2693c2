"""Tensors of a saved state: one safetensors file, or one per process of a sharded model, read back as one mapping."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l4q.errors import UsageError

if TYPE_CHECKING:
    import torch

ROWS = "rows"
"""Metadata key of a part: {tensor name: [first row, rows of the whole tensor]} as JSON."""
_DAMAGED = "resume from another state, or start the run anew"


class Piece(NamedTuple):
    """Consecutive rows of a tensor in one file."""

    start: int
    stop: int
    total: int
    handle: Any


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, from any device."""
    from safetensors.torch import save

    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        # safetensors refuses shared memory, and bitsandbytes' parameters share their code tables.
        plain[name] = kept.clone() if kept.data_ptr() in seen and kept.numel() else kept
        seen.add(kept.data_ptr())
    # Not save_file: it leaves the file readable by its owner only.
    path.write_bytes(save(plain, metadata=dict(metadata) if metadata else None))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def save_sharded(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors that may be sharded; called by every process, nothing is gathered.

    Without sharded tensors process 0 writes `path` itself. Otherwise every process writes the rows it keeps to a file
    of its own beside it, and process 0 also what all processes hold alike.
    """
    from l4q.distributed import is_main, is_sharded_tensor, own_rows, process_count, process_index

    if not any(is_sharded_tensor(tensor) for tensor in tensors.values()):
        if is_main():
            save_tensors(path, tensors)
        return
    rows = {name: own_rows(tensor) for name, tensor in tensors.items() if is_sharded_tensor(tensor)}
    kept = {name: part.tensor for name, part in rows.items() if part.tensor.shape[0]}
    if is_main():
        kept |= {name: tensor for name, tensor in tensors.items() if name not in rows}
    where = {name: [rows[name].start, rows[name].total] for name in kept if name in rows}
    save_tensors(part_path(path, process_index(), process_count()), kept, {ROWS: json.dumps(where, sort_keys=True)})


def part_path(path: Path, index: int, count: int) -> Path:
    """Where process `index` of `count` writes its rows of `path`."""
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


class SavedTensors(Mapping[str, "torch.Tensor"]):
    """The tensors that `save_sharded` wrote, by name and whole, read when asked for."""

    def __init__(self, path: Path, pieces: Mapping[str, list[Piece]]) -> None:
        """Use `saved_tensors`, which finds and checks the pieces."""
        self._path = path
        self._pieces = pieces

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = self._pieces[name]
        return self._rows(name, 0, pieces[0].total)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, from the headers."""
        first = self._pieces[name][0]
        stored = tuple(first.handle.get_slice(name).get_shape())
        return (first.total, *stored[1:]) if stored else stored

    def part(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A tensor as it is kept beside `parameter`: sharded alike if it has the same shape, else whole."""
        from l4q.distributed import is_sharded_tensor, like, own_rows

        if not is_sharded_tensor(parameter) or self.shape(name) != tuple(parameter.shape):
            return self[name]
        own = own_rows(parameter)
        return like(self._rows(name, own.start, own.start + own.tensor.shape[0]), parameter)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        pieces = self._pieces[name]
        if not self.shape(name):
            whole: torch.Tensor = pieces[0].handle.get_tensor(name)
            return whole
        wanted = [piece for piece in pieces if piece.start < stop and piece.stop > start]
        found = [
            piece.handle.get_slice(name)[max(start - piece.start, 0) : min(stop, piece.stop) - piece.start]
            for piece in wanted
        ]
        if not found:  # more processes than rows
            return pieces[0].handle.get_slice(name)[:1][:0]  # type: ignore[no-any-return]
        return found[0] if len(found) == 1 else torch.cat(found)


def saved_tensors(path: Path) -> SavedTensors:
    """Open what `save_sharded` wrote under `path`, by however many processes.

    Raises:
        UsageError: Files or rows are missing.
    """
    from safetensors import SafetensorError, safe_open

    pieces: dict[str, list[Piece]] = {}
    for file in _files(path):
        try:
            handle = safe_open(file, framework="pt")
            rows = json.loads((handle.metadata() or {}).get(ROWS, "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError("a saved state cannot be read", where=file, got=error, remedy=_DAMAGED) from error
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
            shape = handle.get_slice(name).get_shape()
            length = shape[0] if shape else 1
            start, total = rows.get(name, (0, length))
            pieces.setdefault(name, []).append(Piece(start, start + length, total, handle))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece.start)
        ends = [0, *(piece.stop for piece in found)]
        if ends[:-1] != [piece.start for piece in found] or ends[-1] != found[0].total:
            raise UsageError(
                "a saved state lacks rows of a tensor",
                where=f"{path.parent}: {name}",
                got=[(piece.start, piece.stop) for piece in found],
                expected=f"rows 0 to {found[0].total}",
                remedy=_DAMAGED,
            )
    return SavedTensors(path, pieces)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+)-of-(\d+){re.escape(path.suffix)}")
    matches = {file: pattern.fullmatch(file.name) for file in sorted(path.parent.iterdir())}
    counts = {int(match.group(2)) for match in matches.values() if match}
    found = [file for file, match in matches.items() if match]
    if len(counts) != 1 or len(found) != counts.pop():
        raise UsageError(
            "a saved state is not complete",
            where=path,
            got=[file.name for file in found] or "no such file",
            expected=f"{path.name}, or all parts of it",
            remedy=_DAMAGED,
        )
    return found
