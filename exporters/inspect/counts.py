"""Count codes and scales of a source, tensor after tensor, and fold its layers into rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporters.inspect.facts import Grids, GridValues, Source, TensorEntry
from l4q.errors import UsageError

# part of the model -> pattern on tensor names, Hugging Face's and GGUF's; the first that matches counts
PARTS: tuple[tuple[str, str], ...] = (
    ("norms", r"norm|\bln_"),
    ("embeddings", r"embed_tokens|token_embd|\bwte\b|\bwpe\b|embeddings?\b"),
    ("output head", r"lm_head|^output\.weight$|embed_out"),
    ("attention", r"attn|attention"),
    ("experts", r"expert|_exps\b"),
    ("mlp", r"mlp|ffn|feed_forward|fc\d"),
)
OTHER = "other"


@dataclass(kw_only=True)
class Row:
    """Tensors that differ only in their layer number."""

    pattern: str
    shape: tuple[int, ...]
    encoding: str
    grid: str
    """Bits/group size and zero-point, as in "4-bit/32 integer"; a note where it could not be decoded."""
    count: int = 0
    nbytes: int = 0


@dataclass(kw_only=True)
class Part:
    """One part of the model."""

    tensors: int = 0
    weights: int = 0
    nbytes: int = 0


@dataclass(kw_only=True)
class Counts:
    """Everything counted over a source."""

    rows: list[Row] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    grids: Grids = field(default_factory=Grids)
    codes: dict[int, list[int]] = field(default_factory=dict)
    """bits -> how often each code occurs."""
    scales: dict[int, int] = field(default_factory=dict)
    """e -> scales with 2**e <= |scale| < 2**(e + 1)."""
    negative_scales: int = 0
    zero_scales: int = 0
    read: bool = True
    """False if only headers were read."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts.values())


def count(source: Source, *, read: bool = True, progress: Callable[[int, int], None] = lambda *_: None) -> Counts:
    """Go through a source once.

    Args:
        source: What a reader opened.
        read: Decode the quantized tensors; without it only headers count and there are no histograms.
        progress: Called as progress(done, total) after every tensor.

    Raises:
        UsageError: A tensor is damaged.
    """
    counts = Counts(read=read)
    rows: dict[tuple[Any, ...], Row] = {}
    for number, entry in enumerate(source.entries):
        values = entry.values() if read and entry.values is not None else None
        grid = _add_values(counts, entry, values)
        pattern = fold(entry.name)
        row = rows.setdefault(
            (pattern, entry.shape, entry.encoding, grid),
            Row(pattern=pattern, shape=entry.shape, encoding=entry.encoding, grid=grid),
        )
        row.count += 1
        row.nbytes += entry.nbytes
        part = counts.parts.setdefault(part_of(entry.name), Part())
        part.tensors, part.weights = part.tensors + 1, part.weights + entry.weights
        part.nbytes += entry.nbytes
        progress(number + 1, len(source.entries))
    counts.rows = list(rows.values())
    return counts


def fold(name: str) -> str:
    """A tensor name with its numbers as stars."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def part_of(name: str) -> str:
    """The part of the model a tensor belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), OTHER)


def _add_values(counts: Counts, entry: TensorEntry, values: GridValues | None) -> str:
    """Count one tensor's values; the short description of its grid."""
    if values is None:
        counts.grids.undecoded += bool(entry.note)
        return entry.note or ("not read" if entry.values is not None else "")
    if not np.isfinite(values.scales).all():
        raise UsageError("a scale is NaN or infinite", where=entry.name, remedy="the file is damaged: copy it again")
    grids = counts.grids
    grids.bits[values.bits] = grids.bits.get(values.bits, 0) + 1
    grids.group_sizes[values.group_size] = grids.group_sizes.get(values.group_size, 0) + 1
    grids.kinds[values.kind] = grids.kinds.get(values.kind, 0) + 1
    own = counts.codes.setdefault(values.bits, [0] * (1 << values.bits))
    occurring = np.bincount(values.codes.reshape(-1), minlength=len(own))
    counts.codes[values.bits] = [a + int(b) for a, b in zip(own, occurring, strict=True)]
    scales = values.scales.astype(np.float64).reshape(-1)
    counts.negative_scales += int((scales < 0).sum())
    counts.zero_scales += int((scales == 0).sum())
    exponents, times = np.unique(np.floor(np.log2(np.abs(scales[scales != 0]))).astype(int), return_counts=True)
    for exponent, many in zip(exponents.tolist(), times.tolist(), strict=True):
        counts.scales[exponent] = counts.scales.get(exponent, 0) + many
    return f"{values.bits}-bit/{values.group_size} {values.kind}"
