"""A written GGUF file back to Hugging Face modules, decoded by gguf-py."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from exporters.gguf.metadata import QUANTIZED_KEY
from exporters.gguf.names import architecture_of_file, module_names, permuted_heads_of_file, unpermute_rows
from l4q.errors import UsageError


def read_back(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Decode every quantized module of the folder's GGUF file, or those of `only`: (module, float32 [out, in]).

    Rows are in Hugging Face's order.
    Only the file is consulted: block count, head counts and the list of quantized tensors come from its metadata.

    Raises:
        UsageError: The folder does not hold exactly one .gguf file, or the file lacks a key or a tensor.
    """
    reader = gguf.GGUFReader(find_file(folder))
    architecture = architecture_of_file(str(_value(reader, gguf.Keys.General.ARCHITECTURE)))
    n_layers = _value(reader, gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture.name))
    modules = module_names(architecture, int(str(n_layers)))
    wanted = _value(reader, QUANTIZED_KEY)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    missing = [target for target in wanted if target not in tensors or target not in modules]
    if missing:
        raise UsageError("the file lacks quantized tensors it lists", where=folder, got=", ".join(missing))
    for target in wanted:
        if only is not None and modules[target] not in only:
            continue
        tensor = tensors[target]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        values = values + np.float32(0)  # a block with a negative scale has negative zeros
        heads = permuted_heads_of_file(architecture, reader, target)
        yield modules[target], values if heads is None else unpermute_rows(values, heads)
        _forget(reader)


def _forget(reader: gguf.GGUFReader) -> None:
    """Give the pages that were read back to the system, or the reader of a large file comes to hold all of it."""
    mapped: Any = reader.data
    mapped._mmap.madvise(mmap.MADV_DONTNEED)  # NumPy has no public name for a memmap's mapping


def find_file(folder: Path) -> Path:
    """The one .gguf file of a folder.

    Raises:
        UsageError: There is none, or there are several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(
            "expected exactly one .gguf file", where=folder, got=[file.name for file in files] or "none", expected="one"
        )
    return files[0]


def _value(reader: gguf.GGUFReader, key: str) -> list[str] | str:
    field = reader.get_field(key)
    if field is None:
        raise UsageError("metadata key missing", where=key, remedy="export the file again")
    content: list[str] | str = field.contents()
    return content
