"""What llama.cpp expects of each model family: one table, `ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import gguf

from exporters.gguf.model_config import (
    LONGROPE,
    Config,
    activation,
    experts,
    head_dim,
    kv_heads,
    layer_types,
    need,
    original_context,
    partial_rotary_factor,
    rope_parameters,
    rotary_dim,
    sliding_rope_theta,
    sliding_rope_type,
    window,
)

Key = tuple[str, gguf.GGUFValueType, Callable[[Config], Any]]
"""Metadata key with {arch} to fill in, its type, and its value from config.json."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something llama.cpp's graph takes for granted and a config may contradict."""

    name: str
    """The config.json field in question."""
    read: Callable[[Config], Any]
    allowed: Callable[[Config], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp expects of one model family."""

    gguf_arch: gguf.MODEL_ARCH
    permute_qk: bool = False
    """llama.cpp rotates adjacent rows of q and k (RoPE "normal"); Hugging Face rotates row i with i + head_dim / 2."""
    norm_plus_one: bool = False
    """The model multiplies by 1 + weight and llama.cpp by weight."""
    block_modules: tuple[str, ...] = ()
    """Linear modules of one block, below model.layers.N."""
    stacks: Mapping[str, tuple[gguf.MODEL_TENSOR, ...]] = field(default_factory=dict)
    """3-D tensors of experts, below model.layers.N, and the GGUF tensors their rows are split into evenly."""
    own_window: bool = False
    """llama.cpp's graph has this family's sliding window; without it the context length is cut to the window."""
    facts: tuple[Fact, ...] = ()
    keys: tuple[Key, ...] = ()
    """Metadata beyond what every family has."""

    @property
    def name(self) -> str:
        """The general.architecture value."""
        return gguf.MODEL_ARCH_NAMES[self.gguf_arch]


def _one_of(name: str, read: Callable[[Config], Any], *allowed: Any) -> Fact:
    return Fact(name=name, read=read, allowed=lambda config: allowed)


def _field(name: str, *allowed: Any) -> Fact:
    return _one_of(name, lambda config: config.get(name), *allowed)


def _rope_types(*allowed: str) -> Fact:
    return _one_of("rope_type", lambda config: rope_parameters(config)["rope_type"], *allowed)


def _gemma_scale(layers_27b: int) -> Fact:
    """llama.cpp knows the 27B models, scaled by hidden / heads instead of head_dim, by their number of layers."""

    def allowed(config: Config) -> tuple[Any, ...]:
        if config["num_hidden_layers"] == layers_27b:
            return (config["hidden_size"] // config["num_attention_heads"],)
        return (head_dim(config),)

    return Fact(name="query_pre_attn_scalar", read=lambda config: config.get("query_pre_attn_scalar"), allowed=allowed)


def _layer_kinds(full_every: int) -> Fact:
    return Fact(
        name="layer_types",
        read=lambda config: layer_types(config, full_every),
        allowed=lambda config: (layer_types({**config, "layer_types": None}, full_every),),
    )


_U32: Final = gguf.GGUFValueType.UINT32
_F32: Final = gguf.GGUFValueType.FLOAT32

_ATTENTION: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERT_STACKS: Final = {
    "mlp.experts.gate_up_proj": (gguf.MODEL_TENSOR.FFN_GATE_EXP, gguf.MODEL_TENSOR.FFN_UP_EXP),
    "mlp.experts.down_proj": (gguf.MODEL_TENSOR.FFN_DOWN_EXP,),
}

_SILU: Final = _one_of("hidden_act", activation, "silu", "swish")
_GELU: Final = _one_of("hidden_activation", activation, "gelu_pytorch_tanh")
_WHOLE_ROTARY: Final = _one_of("partial_rotary_factor", partial_rotary_factor, 1.0)
_LLAMA_FACTS: Final = (_SILU, _rope_types("default", "linear", "llama3"), _WHOLE_ROTARY)
_PLAIN_FACTS: Final = (_SILU, _rope_types("default", "linear"), _WHOLE_ROTARY)

_WINDOW_KEY: Final[Key] = (gguf.Keys.Attention.SLIDING_WINDOW, _U32, lambda config: need(config, "sliding_window"))
_EXPERT_KEYS: Final[tuple[Key, ...]] = (
    (gguf.Keys.LLM.EXPERT_COUNT, _U32, experts),
    (gguf.Keys.LLM.EXPERT_USED_COUNT, _U32, lambda config: need(config, "num_experts_per_tok")),
)

COMMON_KEYS: Final[tuple[Key, ...]] = (
    (gguf.Keys.LLM.BLOCK_COUNT, _U32, lambda config: config["num_hidden_layers"]),
    (gguf.Keys.LLM.EMBEDDING_LENGTH, _U32, lambda config: config["hidden_size"]),
    (gguf.Keys.LLM.FEED_FORWARD_LENGTH, _U32, lambda config: config["intermediate_size"]),
    (gguf.Keys.LLM.VOCAB_SIZE, _U32, lambda config: config["vocab_size"]),
    (gguf.Keys.Attention.HEAD_COUNT, _U32, lambda config: config["num_attention_heads"]),
    (gguf.Keys.Attention.HEAD_COUNT_KV, _U32, kv_heads),
    (gguf.Keys.Attention.KEY_LENGTH, _U32, head_dim),
    (gguf.Keys.Attention.VALUE_LENGTH, _U32, head_dim),
    (gguf.Keys.Attention.LAYERNORM_RMS_EPS, _F32, lambda config: config["rms_norm_eps"]),
    (gguf.Keys.Rope.DIMENSION_COUNT, _U32, rotary_dim),
    # Absent, llama.cpp assumes 10000 without a word.
    (gguf.Keys.Rope.FREQ_BASE, _F32, lambda config: rope_parameters(config)["rope_theta"]),
)
"""Keys of every family; the context length is apart, because it depends on the family's window."""

_PLAIN_HEADS: Final = Fact(
    name="head_dim",
    read=head_dim,
    allowed=lambda config: (config["hidden_size"] // config["num_attention_heads"],),
)
"""For families whose tensors llama.cpp sizes by the hidden size alone."""

_LLAMA: Final = Architecture(
    gguf_arch=gguf.MODEL_ARCH.LLAMA, permute_qk=True, block_modules=_ATTENTION + _MLP, facts=_LLAMA_FACTS
)

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.LLAMA,
        permute_qk=True,
        block_modules=_ATTENTION,
        stacks=_EXPERT_STACKS,
        facts=_LLAMA_FACTS,
        keys=_EXPERT_KEYS,
    ),
    "Qwen2ForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.QWEN2, block_modules=_ATTENTION + _MLP, facts=(*_PLAIN_FACTS, _PLAIN_HEADS)
    ),
    "Qwen3ForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.QWEN3, block_modules=_ATTENTION + _MLP, facts=_PLAIN_FACTS
    ),
    "Qwen3MoeForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.QWEN3MOE,
        block_modules=_ATTENTION,
        stacks=_EXPERT_STACKS,
        facts=(
            *_PLAIN_FACTS,
            _field("norm_topk_prob", True),
            _one_of("mlp_only_layers", lambda config: list(config.get("mlp_only_layers") or []), []),
            _one_of("decoder_sparse_step", lambda config: config.get("decoder_sparse_step", 1), 1),
        ),
        keys=(
            *_EXPERT_KEYS,
            (gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, _U32, lambda config: need(config, "moe_intermediate_size")),
        ),
    ),
    "Gemma2ForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.GEMMA2,
        norm_plus_one=True,
        block_modules=_ATTENTION + _MLP,
        own_window=True,
        facts=(_GELU, _rope_types("default"), _WHOLE_ROTARY, _gemma_scale(46), _layer_kinds(2)),
        keys=(
            _WINDOW_KEY,
            (gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING, _F32, lambda config: need(config, "attn_logit_softcapping")),
            (gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING, _F32, lambda config: need(config, "final_logit_softcapping")),
        ),
    ),
    "Gemma3ForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.GEMMA3,
        norm_plus_one=True,
        block_modules=_ATTENTION + _MLP,
        own_window=True,
        facts=(
            _GELU,
            _rope_types("default", "linear"),
            _WHOLE_ROTARY,
            _one_of("rope_type of sliding layers", sliding_rope_type, "default"),
            _gemma_scale(62),
            _layer_kinds(6),
            _field("attn_logit_softcapping", None),
            _field("final_logit_softcapping", None),
            _field("use_bidirectional_attention", None, False),
        ),
        keys=(_WINDOW_KEY, (gguf.Keys.Rope.FREQ_BASE_SWA, _F32, sliding_rope_theta)),
    ),
    "Phi3ForCausalLM": Architecture(
        gguf_arch=gguf.MODEL_ARCH.PHI3,
        block_modules=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        facts=(_SILU, _rope_types("default", "linear", LONGROPE), _PLAIN_HEADS),
    ),
}
"""Hugging Face architecture to GGUF; the first row of a GGUF architecture describes its files too."""


def context_length(architecture: Architecture, config: Config) -> int:
    """Longest sequence that llama.cpp's graph computes as the model does."""
    length = int(config["max_position_embeddings"])
    size = window(config)
    return length if size is None or architecture.own_window else min(length, size)


def notes(architecture: Architecture, config: Config) -> list[str]:
    """What a reader of the plan should know about this model in llama.cpp."""
    found = []
    if context_length(architecture, config) < int(config["max_position_embeddings"]):
        found.append(
            f"context length cut to the sliding window of {window(config)} tokens, because llama.cpp's graph of "
            f"{architecture.name} attends to everything: within it both agree"
        )
    if rope_parameters(config)["rope_type"] == LONGROPE:
        original = original_context(config)
        found.append(
            f"rope type longrope: llama.cpp uses the long factors whenever its context is above {original} tokens, "
            f"transformers only for sequences that are: start llama.cpp with -c {original} for shorter ones"
        )
    if architecture.stacks:
        found.append(
            "experts stay dense: they are 3-D tensors, not linear modules, so nothing trained integers for them"
        )
    return found
