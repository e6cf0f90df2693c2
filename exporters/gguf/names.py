"""Hugging Face names and row orders, and their GGUF counterparts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from exporters.gguf.families import ARCHITECTURES, Architecture
from l4q.errors import UnsupportedError

T = TypeVar("T", bound=np.generic)

_SUFFIXES: Final = (".weight", ".bias")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")

TOP_MODULES: Final = ("lm_head",)
"""Linear modules outside the blocks."""

_HEAD_COUNTS: Final = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Config key of the head count that orders the rows of a tensor, by the GGUF tensor's role."""

_FILE_HEAD_COUNTS: Final = {"attn_q": gguf.Keys.Attention.HEAD_COUNT, "attn_k": gguf.Keys.Attention.HEAD_COUNT_KV}
"""The same counts as metadata keys of a written file."""


def architecture_of(name: str) -> Architecture:
    """The table row of a Hugging Face architecture.

    Raises:
        UnsupportedError: The table has no such row.
    """
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            "unknown architecture for GGUF",
            where="config.json: architectures",
            got=name,
            expected=f"one of {', '.join(ARCHITECTURES)}",
            remedy="export to another format, or add a row to exporters/gguf/families.py",
        )
    return ARCHITECTURES[name]


def architecture_of_file(name: str) -> Architecture:
    """The table row of a general.architecture value.

    Raises:
        UnsupportedError: No row writes that architecture.
    """
    rows = {row.name: row for row in reversed(ARCHITECTURES.values())}
    if name not in rows:
        raise UnsupportedError("unknown GGUF architecture", got=name, expected=f"one of {', '.join(rows)}")
    return rows[name]


def gguf_names(architecture: Architecture, n_layers: int, names: Iterable[str]) -> dict[str, str]:
    """GGUF names of Hugging Face tensors ("….weight", "….bias"), by gguf's own name map.

    Raises:
        UnsupportedError: Some names have no counterpart; the message lists all of them.
    """
    table = gguf.get_tensor_name_map(architecture.gguf_arch, n_layers)
    mapped = {name: table.get_name(name, _SUFFIXES) if name.endswith(_SUFFIXES) else None for name in names}
    unknown = [name for name, target in mapped.items() if target is None]
    if unknown:
        raise UnsupportedError(
            f"GGUF architecture {architecture.name} has no place for {len(unknown)} tensor(s)",
            where=", ".join(unknown),
            remedy="export to another format",
        )
    return {name: target for name, target in mapped.items() if target is not None}


def stack_targets(architecture: Architecture, name: str) -> tuple[str, ...]:
    """GGUF names of the parts of a 3-D tensor of experts, in the order of its rows; empty for any other tensor."""
    match = _LAYER.fullmatch(name)
    parts = architecture.stacks.get(match[2], ()) if match else ()
    return tuple(f"{gguf.TENSOR_NAMES[part].format(bid=match[1])}.weight" for part in parts) if match else ()


def module_names(architecture: Architecture, n_layers: int) -> dict[str, str]:
    """Hugging Face module of every GGUF weight of the family, for the way back."""
    blocks = [f"model.layers.{index}.{part}" for index in range(n_layers) for part in architecture.block_modules]
    tops = TOP_MODULES if gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[architecture.gguf_arch] else ()
    forward = gguf_names(architecture, n_layers, [f"{module}.weight" for module in (*blocks, *tops)])
    return {target: name.removesuffix(".weight") for name, target in forward.items()}


def permuted_heads(architecture: Architecture, config: Mapping[str, Any], target: str) -> int | None:
    """Heads whose rows llama.cpp wants interleaved in this GGUF tensor; None where rows keep their order."""
    key = _HEAD_COUNTS.get(_role(target)) if architecture.permute_qk else None
    if key is None:
        return None
    return int(config.get(key) or config["num_attention_heads"])


def permuted_heads_of_file(architecture: Architecture, reader: gguf.GGUFReader, target: str) -> int | None:
    """`permuted_heads` from a written file's own metadata."""
    key = _FILE_HEAD_COUNTS.get(_role(target)) if architecture.permute_qk else None
    if key is None:
        return None
    field = reader.get_field(key.format(arch=architecture.name))
    if field is None:
        raise UnsupportedError("metadata key missing", where=key.format(arch=architecture.name))
    return int(field.contents())


def permute_rows(rows: npt.NDArray[T], n_heads: int) -> npt.NDArray[T]:
    """Hugging Face row order to llama.cpp's: per head, row half * (d / 2) + i moves to 2 * i + half.

    Works on anything with one entry per output row: values, packed bytes, a bias.
    """
    halves = rows.reshape(n_heads, 2, -1, *rows.shape[1:])  # [heads, half, d / 2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unpermute_rows(rows: npt.NDArray[T], n_heads: int) -> npt.NDArray[T]:
    """llama.cpp's row order to Hugging Face's, written apart from `permute_rows`: even rows first, then odd ones."""
    heads = rows.reshape(n_heads, -1, *rows.shape[1:])  # [heads, d, ...]
    ordered: npt.NDArray[T] = np.concatenate((heads[:, 0::2], heads[:, 1::2]), axis=1).reshape(rows.shape)
    return ordered


def _role(target: str) -> str:
    """blk.3.attn_q.weight to attn_q."""
    return target.split(".")[-2]
