"""Hugging Face names and row orders, and their GGUF counterparts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from l4q.errors import UnsupportedError

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp expects of one model family."""

    gguf_arch: gguf.MODEL_ARCH
    permute_qk: bool
    """llama.cpp rotates adjacent rows of q and k (RoPE "normal"); Hugging Face rotates row i with i + head_dim / 2."""
    norm_plus_one: bool
    """The model multiplies by 1 + weight and llama.cpp by weight."""
    block_modules: tuple[str, ...]
    """Linear modules of one block, below model.layers.N."""

    @property
    def name(self) -> str:
        """The general.architecture value."""
        return gguf.MODEL_ARCH_NAMES[self.gguf_arch]


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "LlamaForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.LLAMA,
        permute_qk=True,
        norm_plus_one=False,
        block_modules=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ),
    ),
}
"""Hugging Face architecture to GGUF."""

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
            remedy="export to another format, or add a row to exporters/gguf/names.py",
        )
    return ARCHITECTURES[name]


def architecture_of_file(name: str) -> Architecture:
    """The table row of a general.architecture value.

    Raises:
        UnsupportedError: No row writes that architecture.
    """
    rows = {row.name: row for row in ARCHITECTURES.values()}
    if name not in rows:
        raise UnsupportedError("unknown GGUF architecture", got=name, expected=f"one of {', '.join(rows)}")
    return rows[name]


def gguf_names(architecture: Architecture, n_layers: int, names: Iterable[str]) -> dict[str, str]:
    """GGUF names of Hugging Face tensors ("….weight", "….bias"), by gguf's own name map.

    Raises:
        UnsupportedError: Some names have no counterpart; the message lists all of them.
    """
    table = gguf.get_tensor_name_map(architecture.gguf_arch, n_layers)
    mapped = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = [name for name, target in mapped.items() if target is None]
    if unknown:
        raise UnsupportedError(
            f"GGUF architecture {architecture.name} has no place for {len(unknown)} tensor(s)",
            where=", ".join(unknown),
            remedy="export to another format",
        )
    return {name: target for name, target in mapped.items() if target is not None}


def module_names(architecture: Architecture, n_layers: int) -> dict[str, str]:
    """Hugging Face module of every GGUF weight of the family, for the way back."""
    blocks = [f"model.layers.{index}.{part}" for index in range(n_layers) for part in architecture.block_modules]
    forward = gguf_names(architecture, n_layers, [f"{module}.weight" for module in (*blocks, *TOP_MODULES)])
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
