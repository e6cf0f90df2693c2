"""Folders of safetensors: L4Q checkpoints, GPTQ, AWQ, compressed-tensors, and models that are not quantized."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from exporters.inspect.facts import GridValues, Source, TensorEntry
from exporters.inspect.runtimes import of_checkpoint, of_folder
from l4q.checkpoint import QUANT_METHOD, L4QCheckpoint, natural_order
from l4q.errors import UnsupportedError, UsageError
from l4q.model_folder import read_config
from l4q.shards import ShardReader
from l4q.starts import DECODERS, open_start, quantization_section
from l4q.starts.grid import LinearGrid

BITS_OF = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
BITS_OF |= {"F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "U32": 32, "U64": 64}
SHOWN = ("bits", "group_size", "sym", "zero_point", "desc_act", "version", "checkpoint_format", "format", "scale_grid")


def open_source(path: Path) -> Source:
    """Open a folder by its config's quant_method.

    Raises:
        UsageError: config.json or a safetensors file is damaged.
    """
    section = quantization_section(path)
    method = str(section.get("quant_method")) if section else "safetensors"
    if method == QUANT_METHOD:
        return _checkpoint(path)
    shards = ShardReader.open(path)
    notes: list[str] = []
    modules: dict[str, TensorEntry] = {}
    if section is not None:
        try:
            modules = _quantized(path, method, shards)
        except UnsupportedError as error:
            notes.append(f"codes are not decoded: {error.what}")
    parts = {name for module in modules for name in _parts_of(module, method, shards)}
    dense = {name: _dense(name, shards) for name in shards.names - parts}
    entries = modules | dense
    return Source(
        format=method,
        title=_TITLES.get(method, f"folder quantized by {method}"),
        facts=_facts(path, section),
        entries=tuple(entries[name] for name in sorted(entries, key=natural_order)),
        runtimes=lambda grids: of_folder(method, grids),
        notes=tuple(notes),
    )


_TITLES = {
    "gptq": "GPTQ folder",
    "awq": "AWQ folder",
    "compressed-tensors": "compressed-tensors folder",
    "safetensors": "model that is not quantized",
}


def _checkpoint(path: Path) -> Source:
    checkpoint = L4QCheckpoint.open(path)
    shards = ShardReader.open(path)
    entries: list[TensorEntry] = []
    for module in checkpoint.modules:
        info = checkpoint.info(module)
        names = [name for part in ("codes", "scales", "zeros", "mins") if (name := f"{module}.{part}") in shards.names]

        def values(module: str = module) -> GridValues:
            weight = checkpoint.quantized(module)
            return GridValues(
                codes=weight.codes,
                scales=weight.scales,
                bits=weight.bits,
                group_size=weight.group_size,
                kind=weight.zero_point,
            )

        entries.append(
            TensorEntry(
                name=module,
                shape=(info.out_features, info.in_features),
                encoding="l4q",
                nbytes=sum(_nbytes(name, shards) for name in names),
                values=values,
            )
        )
    entries += [_dense(name, shards) for name in checkpoint.dense_names]
    return Source(
        format="l4q",
        title="L4Q checkpoint",
        facts=_facts(path, checkpoint.config["quantization_config"]),
        entries=tuple(sorted(entries, key=lambda entry: natural_order(entry.name))),
        runtimes=lambda _: of_checkpoint(checkpoint),
    )


def _quantized(path: Path, method: str, shards: ShardReader) -> dict[str, TensorEntry]:
    """Quantized modules of a foreign folder, decoded by the readers of `l4q.starts`."""
    start = open_start(str(path))
    if start is None:
        return {}
    found = {}
    for module in start.modules():
        try:
            grid = start.grid(module)
            note = "" if grid is not None else "activation order"
        except UnsupportedError as error:
            grid, note = None, error.what
        names = _parts_of(module, method, shards)

        def values(module: str = module) -> GridValues:
            decoded = start.grid(module)
            if decoded is None:
                raise UsageError("a module changed while it was read", where=f"{path}: {module}")
            return _values(decoded)

        found[module] = TensorEntry(
            name=module,
            shape=tuple(grid.codes.shape) if grid is not None else (),
            encoding=method,
            nbytes=sum(_nbytes(name, shards) for name in names),
            values=values if grid is not None else None,
            note=note,
        )
    return found


def _parts_of(module: str, method: str, shards: ShardReader) -> list[str]:
    parts = importlib.import_module(DECODERS[method]).PARTS
    return [name for part in parts if (name := f"{module}.{part}") in shards.names]


def _values(grid: LinearGrid) -> GridValues:
    return GridValues(
        codes=grid.codes.numpy(),
        scales=grid.scales.numpy(),
        bits=grid.bits,
        group_size=grid.group_size,
        kind=grid.kind,
    )


def _dense(name: str, shards: ShardReader) -> TensorEntry:
    return TensorEntry(name=name, shape=shards.shape(name), encoding=shards.dtype(name), nbytes=_nbytes(name, shards))


def _nbytes(name: str, shards: ShardReader) -> int:
    bits = BITS_OF.get(shards.dtype(name), 0)
    return int(np.prod(shards.shape(name), dtype=np.int64)) * bits // 8


def _facts(path: Path, section: dict[str, Any] | None) -> dict[str, str]:
    config = read_config(path)
    facts = {"architecture": ", ".join(config.get("architectures") or ["unknown"])}
    facts |= {key: str(section[key]) for key in SHOWN if section and section.get(key) is not None}
    files = sorted(path.glob("*.safetensors"))
    return facts | {"files": f"{len(files)} safetensors, {sum(file.stat().st_size for file in files):,} bytes"}
