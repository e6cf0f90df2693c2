"""A random two-layer llama whose sizes every engine takes, on any grid, for tests that need a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from exporters import gptq
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.random_models import build_model, random_weight, save_random

__all__ = ["SIZES", "export_gptq", "random_weight", "tiny_checkpoint", "tiny_llama"]

SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def tiny_llama(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a random two-layer llama whose sizes every engine takes, and return its tensors."""
    build_model("llama", {**SIZES, **changes}).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tiny_checkpoint(
    folder: Path, quant: QuantConfig, *, dense_linears: Iterable[str] = (), **changes: Any
) -> L4QCheckpoint:
    """An L4Q checkpoint of `tiny_llama` with random weights on the grid; linears ending in a given name stay dense."""
    model = build_model("llama", {**SIZES, **changes})
    model.save_pretrained(folder / "plain")
    return save_random(
        model,
        folder / "l4q",
        quant,
        lambda shape, seed: random_weight(shape, quant, seed),
        dense_linears=dense_linears,
        side_files=[folder / "plain" / "generation_config.json"],
    )


def export_gptq(checkpoint: L4QCheckpoint, folder: Path, **options: Any) -> ExportPlan:
    """Plan and write into a new folder."""
    choices = ExportOptions(**options)
    plan = gptq.plan(checkpoint, choices)
    folder.mkdir()
    gptq.write(checkpoint, plan, folder, choices, lambda name: None)
    return plan
