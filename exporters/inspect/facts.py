"""The values between readers, counting and printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.plan import RuntimeSupport


@dataclass(frozen=True, kw_only=True, eq=False)
class GridValues:
    """The decoded integers of one quantized tensor, in whatever order the file has."""

    codes: npt.NDArray[np.uint8]
    """Stored codes, any shape; signed ones are raised by 2**(bits-1)."""
    scales: npt.NDArray[np.floating[Any]]
    """One per group, any shape."""
    bits: int
    group_size: int
    kind: str
    """Zero-point: "none", "integer" or "float"."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor, or one quantized module with all its parts."""

    name: str
    shape: tuple[int, ...]
    """Of the weight it stands for, not of its packing."""
    encoding: str
    """As the file's own format calls it: F16, Q4_0, gptq, int4, ..."""
    nbytes: int
    """All parts together."""
    values: Callable[[], GridValues] | None = None
    """Decodes it; None if it is no linear grid that can be read."""
    note: str = ""
    """Why it cannot be decoded, if it is quantized and cannot."""

    @property
    def weights(self) -> int:
        """How many weights it stands for."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened folder or file."""

    format: str
    """"l4q", "gptq", "awq", "compressed-tensors", "gguf", "onnx" or "safetensors"."""
    title: str
    facts: dict[str, str]
    """What the headers say of the whole: architecture, versions, producer."""
    entries: tuple[TensorEntry, ...]
    runtimes: Callable[[Grids], tuple[RuntimeSupport, ...]]
    """Which runtimes load it, given the grids that were found."""
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Grids:
    """Bits, group sizes and zero-point kinds of all decoded tensors, with how often each occurs."""

    bits: dict[int, int] = field(default_factory=dict)
    group_sizes: dict[int, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    undecoded: int = 0
    """Quantized tensors that could not be decoded."""
