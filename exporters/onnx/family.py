"""Which architectures the hand-built graph covers, and what it needs to know about one of them: `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from l4q.errors import UnsupportedError, UsageError
from l4q.weight import F32


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one architecture from plain llama; biases are found by their presence in the checkpoint."""

    qk_norm: bool = False
    """RMS norms over head_dim on queries and keys, before the rotation."""


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations whose frequencies do not depend on the sequence's length, so that one constant holds them."""

ACTIVATIONS: Mapping[str, str] = {"silu": "x * sigmoid(x)", "swish": "x * sigmoid(x)"}

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpec:
    """Sizes and constants of one model."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eps: float
    tied: bool
    """The output head is the embedding matrix."""
    qk_norm: bool
    window: int | None
    """Columns a sliding layer sees, itself included."""
    sliding: tuple[bool, ...]
    """Per layer: whether `window` applies."""
    inv_freq: F32
    """[head_dim / 2] rotation per position, radians."""
    rope_scaling: float
    """Factor on cos and sin."""

    def layer(self, index: int) -> str:
        """Dotted name of one decoder layer."""
        return f"model.layers.{index}"

    def norm_names(self) -> Iterator[str]:
        """Modules with one weight vector."""
        names = LAYER_NORMS + (QK_NORMS if self.qk_norm else ())
        for index in range(self.layers):
            yield from (f"{self.layer(index)}.{name}" for name in names)
        yield FINAL_NORM

    def linear_names(self) -> Iterator[str]:
        """Modules with a weight matrix and perhaps a bias, the output head only if it has a matrix of its own."""
        for index in range(self.layers):
            yield from (f"{self.layer(index)}.{name}" for name in ATTENTION + MLP)
        if not self.tied:
            yield HEAD


def read_spec(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    """Read what the graph needs from a config.json, through transformers' own config classes and rotary functions.

    Raises:
        UnsupportedError: The architecture, its activation or its rotation is not covered.
    """
    if architecture not in FAMILIES:
        raise UnsupportedError(
            "the ONNX exporter does not know this architecture",
            where="config.json architectures",
            got=architecture,
            expected=f"one of {sorted(FAMILIES)}",
            remedy="export to gguf or gptq, or add the architecture to exporters/onnx/family.py",
        )
    parsed = _parse_config(config)
    _check_choice("hidden_act", parsed.hidden_act, tuple(ACTIVATIONS))
    _check_choice("rope_type", parsed.rope_parameters["rope_type"], FIXED_ROPE_TYPES)
    inv_freq, rope_scaling = _rotary(parsed)
    head_dim = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    if 2 * inv_freq.size != head_dim:
        raise UnsupportedError(
            "partial rotary embeddings are not covered", got=2 * inv_freq.size, expected=f"head_dim {head_dim}"
        )
    window = getattr(parsed, "sliding_window", None)
    layer_types = getattr(parsed, "layer_types", None)
    # Older configs have no per-layer kinds: there a window applies to every layer.
    kinds = layer_types or ("sliding_attention",) * parsed.num_hidden_layers
    return ModelSpec(
        layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        heads=parsed.num_attention_heads,
        kv_heads=parsed.num_key_value_heads or parsed.num_attention_heads,
        head_dim=head_dim,
        vocab_size=parsed.vocab_size,
        context_length=parsed.max_position_embeddings,
        eps=parsed.rms_norm_eps,
        tied=bool(parsed.tie_word_embeddings),
        qk_norm=FAMILIES[architecture].qk_norm,
        window=window,
        sliding=tuple(window is not None and kind == "sliding_attention" for kind in kinds),
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
    )


def _parse_config(config: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    try:
        return AutoConfig.for_model(config.get("model_type"), **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UsageError("transformers refuses config.json", where="config.json", got=error) from error


def _rotary(parsed: Any) -> tuple[F32, float]:
    """Frequencies as transformers computes them; LlamaRotaryEmbedding serves every architecture of the table."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(parsed)
    return rotary.inv_freq.numpy().astype(np.float32), float(rotary.attention_scaling)


def _check_choice(field: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        raise UnsupportedError(
            f"the ONNX graph does not cover this {field}",
            where=f"config.json {field}",
            got=got,
            expected=f"one of {known}",
            remedy="export to gguf or gptq",
        )
