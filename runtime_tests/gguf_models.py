"""Tiny random llamas on a grid, their GGUF exports, and torch's answer to the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import gguf as gguf_exporter
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.weight import QuantizedWeight
from runtime_tests import random_models
from runtime_tests.random_models import build_model, dequantized_model, disturb_vectors, model_logprobs, save_random

# Uneven on purpose: 6 query heads on 2 key heads, head_dim 32 beside hidden / heads = 16, RoPE base not 10000.
TINY: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Q4_1_SCALES = 0xFFF0
"""Bits kept of an fp16 scale so that scale * zero-point is an fp16 number: 7 significant ones."""


def random_weight(
    shape: tuple[int, int],
    *,
    zero_point: str = "none",
    bits: int = 4,
    group_size: int = 32,
    seed: int = 0,
    scale_mask: int = Q4_1_SCALES,
) -> QuantizedWeight:
    """Codes and zero-points over their whole range, scales of which only the masked fp16 bits are kept."""
    quant = QuantConfig.from_dict({"bits": bits, "group_size": group_size, "zero_point": zero_point})
    return random_models.random_weight(
        shape, quant, seed, scales=(0.005, 0.03), mins=(-0.2, 0.0), scale_mask=scale_mask
    )


def make_checkpoint(
    folder: Path,
    quant: QuantConfig,
    *,
    scale_mask: int = Q4_1_SCALES,
    side_files: Iterable[Path] = (),
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> L4QCheckpoint:
    """Save a random llama with every linear of its blocks on the grid."""
    model = build_model("llama", {**TINY, **changes})
    disturb_vectors(model)

    def weight(shape: tuple[int, ...], seed: int) -> QuantizedWeight:
        return random_models.random_weight(
            shape, quant, seed, scales=(0.005, 0.03), mins=(-0.2, 0.0), scale_mask=scale_mask
        )

    return save_random(model, folder, quant, weight, dtype=dtype, side_files=side_files)


def export_gguf(checkpoint: L4QCheckpoint, folder: Path, **options: Any) -> ExportPlan:
    """Plan and write into a new folder."""
    chosen = ExportOptions(**options)
    plan = gguf_exporter.plan(checkpoint, chosen)
    folder.mkdir(parents=True)
    gguf_exporter.write(checkpoint, plan, folder, chosen, lambda name: None)
    return plan


def torch_logprobs(checkpoint: L4QCheckpoint, token_ids: list[int]) -> np.ndarray:
    """Float64 [tokens, vocab] log-probabilities of transformers in float32 on the dequantized weights."""
    return model_logprobs(dequantized_model(checkpoint), token_ids)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit for bit."""
    assert left.dtype == right.dtype == np.float32
    return left.shape == right.shape and bool(np.array_equal(left.view(np.uint32), right.view(np.uint32)))
