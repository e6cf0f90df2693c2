"""GGUF files: every tensor by its block type; integers of the linear types, decoded block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.inspect.facts import GridValues, Source, TensorEntry
from exporters.inspect.runtimes import of_gguf
from l4q.errors import UsageError
from l4q.guards import foreign
from l4q.starts.gguf_blocks import LINEAR_TYPES, integer_points
from l4q.starts.gguf_header import check_gguf

BLOCK = 32
PLAIN = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")
SHOWN = {
    "name": "general.name",
    "architecture": "general.architecture",
    "file type": "general.file_type",
    "tokenizer": "tokenizer.ggml.model",
    "splitting": "tokenizer.ggml.pre",
}


def open_source(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
        UsageError: It is truncated, damaged or no GGUF file.
    """
    from gguf import GGUFReader

    check_gguf(path)
    with foreign("the GGUF file is truncated or damaged", where=path):
        reader = GGUFReader(path)
        facts = {label: str(field.contents()) for label, key in SHOWN.items() if (field := reader.get_field(key))}
    architecture = facts.get("architecture", "")
    return Source(
        format="gguf",
        title="GGUF file",
        facts=facts | {"file": f"{path.stat().st_size:,} bytes"},
        entries=tuple(_entry(tensor, path) for tensor in reader.tensors),
        runtimes=lambda _: of_gguf(architecture),
    )


def _entry(tensor: Any, path: Path) -> TensorEntry:
    kind = tensor.tensor_type.name
    linear = kind in LINEAR_TYPES and len(tensor.shape) == 2
    note = "" if linear or kind in PLAIN else f"{kind} is no linear grid"

    def values() -> GridValues:
        bits, read = LINEAR_TYPES[kind]
        data = np.asarray(tensor.data)
        codes, scales, mins = read(data.reshape(-1, data.shape[-1]))
        if not np.isfinite(scales).all() or (mins is not None and not np.isfinite(mins).all()):
            raise UsageError(
                "a block has a NaN or infinite scale or min", where=f"{path}: {tensor.name}", remedy="copy it again"
            )
        zero = "none"
        if mins is not None:
            points = integer_points(torch.from_numpy(scales), torch.from_numpy(mins), (1 << bits) - 1)
            zero = "float" if points is None else "integer"
        return GridValues(codes=codes, scales=scales, bits=bits, group_size=BLOCK, kind=zero)

    return TensorEntry(
        name=tensor.name,
        shape=tuple(int(size) for size in reversed(tensor.shape)),
        encoding=kind,
        nbytes=int(tensor.n_bytes),
        values=values if linear else None,
        note=note,
    )
