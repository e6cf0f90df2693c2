"""A random two-layer llama whose sizes every engine takes, on any grid, for tests that need a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from exporters import gptq
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig
from l4q.weight import QuantizedWeight

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_weight(shape: tuple[int, ...], quant: QuantConfig, seed: int) -> QuantizedWeight:
    """Codes and zero-points over their whole range, scales around 0.01."""
    rng = np.random.default_rng(seed)
    group_size = quant.resolve_group_size(shape[1])
    groups = (shape[0], shape[1] // group_size)
    zeros = rng.integers(1, quant.max_code + 1, groups, dtype=np.uint8) if quant.zero_point == "integer" else None
    mins = rng.normal(0, 0.05, groups).astype(np.float16) if quant.zero_point == "float" else None
    return QuantizedWeight(
        codes=rng.integers(0, quant.max_code + 1, shape, dtype=np.uint8),
        scales=rng.uniform(0.005, 0.015, groups).astype(np.float16),
        zeros=zeros,
        mins=mins,
        bits=quant.bits,
        group_size=group_size,
    )


def tiny_llama(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a random two-layer llama whose sizes every engine takes, and return its tensors."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **tokens, "initializer_range": 0.1, **changes}))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tiny_checkpoint(
    folder: Path, quant: QuantConfig, *, dense_linears: Iterable[str] = (), **changes: Any
) -> L4QCheckpoint:
    """An L4Q checkpoint of `tiny_llama` with random weights on the grid; linears ending in a given name stay dense."""
    state = tiny_llama(folder / "plain", **changes)
    skipped = tuple(dense_linears)
    stems = [name.removesuffix(".weight") for name in state]
    modules = [stem for stem in stems if stem.endswith(LINEARS) and not stem.endswith(skipped or ("-",))]
    weights = [
        (module, random_weight(tuple(state[f"{module}.weight"].shape), quant, seed))
        for seed, module in enumerate(modules)
    ]
    dense = [(name, tensor) for name, tensor in state.items() if name.removesuffix(".weight") not in modules]
    config = json.loads((folder / "plain" / "config.json").read_text())
    side_files = [folder / "plain" / "generation_config.json"]
    save_checkpoint(folder / "l4q", config=config, weights=weights, dense=dense, quant=quant, side_files=side_files)
    return L4QCheckpoint.open(folder / "l4q")


def export_gptq(checkpoint: L4QCheckpoint, folder: Path, **options: Any) -> ExportPlan:
    """Plan and write into a new folder."""
    choices = ExportOptions(**options)
    plan = gptq.plan(checkpoint, choices)
    folder.mkdir()
    gptq.write(checkpoint, plan, folder, choices, lambda name: None)
    return plan
