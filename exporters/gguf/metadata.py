"""GGUF metadata keys of a model, from its config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from exporters.gguf.names import Architecture
from l4q.errors import UnsupportedError

Config = Mapping[str, Any]

QUANTIZED_KEY: Final = "l4q.quantized_tensors"
"""Our own key: the tensors that carry trained integers, so that an F32 file can be read back too."""

FILE_TYPES: Final = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
}
"""general.file_type, a label, by the encoding of most bytes."""


@dataclass(frozen=True, kw_only=True)
class MetadataValue:
    """One typed metadata entry."""

    key: str
    value: Any
    type: gguf.GGUFValueType


def head_dim(config: Config) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Config) -> dict[str, Any]:
    """RoPE settings with rope_theta and rope_type, from rope_parameters or the older rope_theta and rope_scaling."""
    merged = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    merged |= config.get("rope_parameters") or {}
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    merged["rope_theta"] = float(merged["rope_theta"] or 10000.0)
    return merged


def model_metadata(architecture: Architecture, config: Config) -> list[MetadataValue]:
    """Every `{arch}.` key llama.cpp needs to build the graph.

    Raises:
        UnsupportedError: The config asks for something llama.cpp's graph of this architecture does not do.
    """
    _check_graph(config)
    try:
        values = [
            MetadataValue(key=key.format(arch=architecture.name), value=read(config), type=value_type)
            for key, value_type, read in _KEYS
        ]
    except KeyError as error:
        raise UnsupportedError(
            "config.json lacks a value GGUF needs", where=f"config.json: {error.args[0]}", remedy="complete the config"
        ) from error
    return values + _rope_scaling(architecture, rope_parameters(config))


def rope_freqs(config: Config) -> npt.NDArray[np.float32] | None:
    """Divisors of the RoPE frequencies for rope type llama3, float32 [head_dim / 2]; None for other types.

    Wavelengths below original / high_freq_factor keep their frequency, those above original / low_freq_factor are
    divided by factor, and between them the divisor is interpolated (transformers' `_compute_llama3_parameters`).
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dimension = head_dim(config)
    exponents = np.arange(0, dimension, 2, dtype=np.float32) / np.float32(dimension)
    wavelengths = 2 * math.pi * np.power(np.float32(rope["rope_theta"]), exponents).astype(np.float64)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float32] = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return divisors


def _rope_scaling(architecture: Architecture, rope: dict[str, Any]) -> list[MetadataValue]:
    if rope["rope_type"] != "linear":
        return []
    kind = gguf.Keys.Rope.SCALING_TYPE.format(arch=architecture.name)
    factor = gguf.Keys.Rope.SCALING_FACTOR.format(arch=architecture.name)
    return [
        MetadataValue(key=kind, value="linear", type=gguf.GGUFValueType.STRING),
        MetadataValue(key=factor, value=float(rope["factor"]), type=gguf.GGUFValueType.FLOAT32),
    ]


def _check_graph(config: Config) -> None:
    rope = rope_parameters(config)
    facts = {
        "hidden_act": (config.get("hidden_act", "silu"), ("silu", "swish")),
        "rope_type": (rope["rope_type"], ("default", "linear", "llama3")),
        "partial_rotary_factor": (float(rope.get("partial_rotary_factor") or 1.0), (1.0,)),
    }
    for name, (value, allowed) in facts.items():
        if value not in allowed:
            raise UnsupportedError(
                f"llama.cpp's graph of this architecture cannot run {name} {value}",
                where=f"config.json: {name}",
                got=value,
                expected=f"one of {allowed}",
                remedy="export to another format",
            )


_U32: Final = gguf.GGUFValueType.UINT32
_F32: Final = gguf.GGUFValueType.FLOAT32

_KEYS: Final[tuple[tuple[str, gguf.GGUFValueType, Callable[[Config], int | float]], ...]] = (
    (gguf.Keys.LLM.BLOCK_COUNT, _U32, lambda config: config["num_hidden_layers"]),
    (gguf.Keys.LLM.CONTEXT_LENGTH, _U32, lambda config: config["max_position_embeddings"]),
    (gguf.Keys.LLM.EMBEDDING_LENGTH, _U32, lambda config: config["hidden_size"]),
    (gguf.Keys.LLM.FEED_FORWARD_LENGTH, _U32, lambda config: config["intermediate_size"]),
    (gguf.Keys.LLM.VOCAB_SIZE, _U32, lambda config: config["vocab_size"]),
    (gguf.Keys.Attention.HEAD_COUNT, _U32, lambda config: config["num_attention_heads"]),
    (
        gguf.Keys.Attention.HEAD_COUNT_KV,
        _U32,
        lambda config: config.get("num_key_value_heads") or config["num_attention_heads"],
    ),
    (gguf.Keys.Attention.KEY_LENGTH, _U32, head_dim),
    (gguf.Keys.Attention.VALUE_LENGTH, _U32, head_dim),
    (gguf.Keys.Attention.LAYERNORM_RMS_EPS, _F32, lambda config: config["rms_norm_eps"]),
    (gguf.Keys.Rope.DIMENSION_COUNT, _U32, head_dim),
    # Absent, llama.cpp assumes 10000 without a word.
    (gguf.Keys.Rope.FREQ_BASE, _F32, lambda config: rope_parameters(config)["rope_theta"]),
)
