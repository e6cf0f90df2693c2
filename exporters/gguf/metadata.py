"""GGUF metadata keys of a model, from its config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from exporters.gguf.families import COMMON_KEYS, Architecture, context_length
from exporters.gguf.model_config import (
    LONGROPE,
    Config,
    head_dim,
    longrope_attention_factor,
    original_context,
    rope_parameters,
)
from l4q.errors import UnsupportedError

QUANTIZED_KEY: Final = "l4q.quantized_tensors"
"""Our own key: the tensors that carry trained integers, so that an F32 file can be read back too."""

FILE_TYPES: Final = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "Q3_K": gguf.LlamaFileType.MOSTLY_Q3_K_S,
}
"""general.file_type, a label, by the encoding of most bytes."""


@dataclass(frozen=True, kw_only=True)
class MetadataValue:
    """One typed metadata entry."""

    key: str
    value: Any
    type: gguf.GGUFValueType


def model_metadata(architecture: Architecture, config: Config) -> list[MetadataValue]:
    """Every `{arch}.` key llama.cpp needs to build the graph.

    Raises:
        UnsupportedError: The config asks for something llama.cpp's graph of this architecture does not do.
    """
    try:
        _check_graph(architecture, config)
        values = [
            MetadataValue(key=key.format(arch=architecture.name), value=read(config), type=value_type)
            for key, value_type, read in (*COMMON_KEYS, *architecture.keys)
        ]
        length = MetadataValue(
            key=gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=architecture.name),
            value=context_length(architecture, config),
            type=gguf.GGUFValueType.UINT32,
        )
        longrope = _longrope(architecture, config)
    except KeyError as error:
        raise UnsupportedError(
            "config.json lacks a value GGUF needs", where=f"config.json: {error.args[0]}", remedy="complete the config"
        ) from error
    return [*values, length, *longrope, *_rope_scaling(architecture, rope_parameters(config))]


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


def rope_tensors(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """Divisors of the RoPE frequencies by GGUF tensor: one for llama3, two for longrope, none for other types."""
    rope = rope_parameters(config)
    if rope["rope_type"] == LONGROPE:
        return {
            f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    divisors = rope_freqs(config)
    return {} if divisors is None else {"rope_freqs.weight": divisors}


def _longrope(architecture: Architecture, config: Config) -> list[MetadataValue]:
    if rope_parameters(config)["rope_type"] != LONGROPE:
        return []
    original = gguf.Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=architecture.name)
    factor = gguf.Keys.Rope.SCALING_ATTN_FACTOR.format(arch=architecture.name)
    return [
        MetadataValue(key=original, value=original_context(config), type=gguf.GGUFValueType.UINT32),
        MetadataValue(key=factor, value=longrope_attention_factor(config), type=gguf.GGUFValueType.FLOAT32),
    ]


def _rope_scaling(architecture: Architecture, rope: dict[str, Any]) -> list[MetadataValue]:
    if rope["rope_type"] != "linear":
        return []
    kind = gguf.Keys.Rope.SCALING_TYPE.format(arch=architecture.name)
    factor = gguf.Keys.Rope.SCALING_FACTOR.format(arch=architecture.name)
    return [
        MetadataValue(key=kind, value="linear", type=gguf.GGUFValueType.STRING),
        MetadataValue(key=factor, value=float(rope["factor"]), type=gguf.GGUFValueType.FLOAT32),
    ]


def _check_graph(architecture: Architecture, config: Config) -> None:
    for fact in architecture.facts:
        value, allowed = fact.read(config), fact.allowed(config)
        if value not in allowed:
            raise UnsupportedError(
                f"llama.cpp's graph of this architecture cannot run {fact.name} {value}",
                where=f"config.json: {fact.name}",
                got=value,
                expected=f"one of {allowed}",
                remedy="export to another format",
            )
