"""Tiny random llamas on a grid, their GGUF exports, and torch's answer to the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exporters import gguf as gguf_exporter
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig
from l4q.weight import QuantizedWeight

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
    rng = np.random.default_rng(seed)
    groups, top = (shape[0], shape[1] // group_size), 1 << bits
    scales = rng.uniform(0.005, 0.03, groups).astype(np.float16)
    scales = (scales.view(np.uint16) & np.uint16(scale_mask)).view(np.float16)
    return QuantizedWeight(
        codes=rng.integers(0, top, shape, dtype=np.uint8),
        scales=scales,
        zeros=rng.integers(1, top, groups, dtype=np.uint8) if zero_point == "integer" else None,
        mins=rng.normal(-0.1, 0.05, groups).astype(np.float16) if zero_point == "float" else None,
        bits=bits,
        group_size=group_size,
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
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, **changes})
    model = LlamaForCausalLM(config)
    weights, dense = [], []
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("_proj.weight"):
            module, shape = name.removesuffix(".weight"), (tensor.shape[0], tensor.shape[1])
            group_size = quant.resolve_group_size(shape[1])
            weight = random_weight(
                shape,
                zero_point=quant.zero_point,
                bits=quant.bits,
                group_size=group_size,
                seed=seed,
                scale_mask=scale_mask,
            )
            weights.append((module, weight))
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            # Fresh norms are all ones and fresh biases all zeros, which would hide a wrong order.
            values = tensor if tensor.ndim > 1 else tensor + 0.2 * torch.randn(tensor.shape)
            dense.append((name, values.to(dtype)))
    values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    save_checkpoint(
        folder, config=values, weights=weights, dense=dense, quant=quant, side_files=side_files, overwrite=True
    )
    return L4QCheckpoint.open(folder)


def export_gguf(checkpoint: L4QCheckpoint, folder: Path, **options: Any) -> ExportPlan:
    """Plan and write into a new folder."""
    chosen = ExportOptions(**options)
    plan = gguf_exporter.plan(checkpoint, chosen)
    folder.mkdir(parents=True)
    gguf_exporter.write(checkpoint, plan, folder, chosen, lambda name: None)
    return plan


def torch_logprobs(checkpoint: L4QCheckpoint, token_ids: list[int]) -> np.ndarray:
    """Float64 [tokens, vocab] log-probabilities of transformers' llama in float32 on the dequantized weights."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    state = {name: checkpoint.dense(name).float() for name in checkpoint.dense_names}
    for module in checkpoint.modules:
        state[f"{module}.weight"] = torch.from_numpy(checkpoint.quantized(module).dequantize())
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    assert missing == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit for bit."""
    assert left.dtype == right.dtype == np.float32
    return left.shape == right.shape and bool(np.array_equal(left.view(np.uint32), right.view(np.uint32)))
