"""One tiny random model per architecture, of odd sizes, wrapped, disturbed and frozen as training would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.model import save_l4q, wrap_linears
from runtime_tests.conftest import disturb
from runtime_tests.random_models import build_model, disturb_vectors

# Uneven on purpose: 6 query heads on 2 key heads, head_dim 32 beside hidden / heads = 16, a vocabulary of 323.
SIZES: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 323,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 8.0},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0],
}
NONE = QuantConfig(bits=4, group_size=32, zero_point="none")
INTEGER = QuantConfig(bits=4, group_size=32, zero_point="integer")


@dataclass(frozen=True, kw_only=True)
class TinyArch:
    """One row of the architecture table."""

    family: str
    """Row of docs/architectures.md; several models may stand behind one."""
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quant: QuantConfig = NONE


TINY_ARCHS: Mapping[str, TinyArch] = {
    "llama": TinyArch(family="llama 1, 2", model_type="llama", changes={"tie_word_embeddings": False}),
    "llama3": TinyArch(
        family="llama 3.x (rope type llama3)",
        model_type="llama",
        changes={"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        quant=INTEGER,
    ),
    "llama-linear": TinyArch(
        family="llama, rope type linear, biases",
        model_type="llama",
        changes={"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": TinyArch(family="mistral", model_type="mistral", changes={"sliding_window": None}, quant=INTEGER),
    "mistral-window": TinyArch(
        family="mistral with a sliding window", model_type="mistral", changes={"sliding_window": 70}
    ),
    "qwen2": TinyArch(
        family="qwen2 (biases)", model_type="qwen2", changes={"tie_word_embeddings": True, "head_dim": 16}
    ),
    "qwen2-wide": TinyArch(family="qwen2 with head_dim beside hidden / heads", model_type="qwen2", quant=INTEGER),
    "qwen3": TinyArch(family="qwen3 (q/k norms)", model_type="qwen3", quant=INTEGER),
    "gemma2": TinyArch(
        family="gemma2 (soft-capping, sliding layers)",
        model_type="gemma2",
        changes={
            "query_pre_attn_scalar": 32,
            "sliding_window": 21,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
        },
        quant=INTEGER,
    ),
    "gemma2-scaled": TinyArch(
        family="gemma2 with query_pre_attn_scalar beside head_dim",
        model_type="gemma2",
        changes={"query_pre_attn_scalar": 16},
    ),
    "gemma3": TinyArch(
        family="gemma3 text (q/k norms, two rope bases)",
        model_type="gemma3_text",
        changes={
            "query_pre_attn_scalar": 32,
            "sliding_window": 21,
            "num_hidden_layers": 7,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "gemma3-untied": TinyArch(
        family="gemma3 text, untied",
        model_type="gemma3_text",
        changes={"query_pre_attn_scalar": 32, "tie_word_embeddings": False, "num_hidden_layers": 6},
    ),
    "phi3": TinyArch(
        family="phi-3 (fused qkv, gate_up)",
        model_type="phi3",
        changes={"tie_word_embeddings": False, "head_dim": 16},
        quant=INTEGER,
    ),
    "phi3-partial": TinyArch(
        family="phi-3/4-mini, partial rotary, tied",
        model_type="phi3",
        changes={
            "tie_word_embeddings": True,
            "head_dim": 16,
            "sliding_window": 60,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-long": TinyArch(
        family="phi-3/4-mini 128k (rope type longrope)",
        model_type="phi3",
        changes={
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 24,
        },
    ),
    "mixtral": TinyArch(
        family="mixtral (experts dense)",
        model_type="mixtral",
        changes={"num_local_experts": 5, "num_experts_per_tok": 2},
        quant=INTEGER,
    ),
    "qwen3-moe": TinyArch(
        family="qwen3-moe (experts dense)",
        model_type="qwen3_moe",
        changes={
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
}


def tiny_arch_checkpoint(arch: TinyArch, folder: Path, **changes: Any) -> L4QCheckpoint:
    """Build the model, wrap every linear, disturb it and freeze it."""
    model = build_model(arch.model_type, {**SIZES, **arch.changes, **changes})
    disturb_vectors(model)
    wrap_linears(model, arch.quant, LoraConfig(rank=4))
    disturb(model)
    save_l4q(model, folder, quant=arch.quant)
    return L4QCheckpoint.open(folder)
