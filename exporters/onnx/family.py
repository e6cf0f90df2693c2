"""Which architectures the hand-built graph covers, and what it needs to know about one of them: `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from exporters.onnx.stated import default_frequencies, stated_config
from l4q.errors import UnsupportedError, UsageError
from l4q.weight import F32

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes one architecture from plain llama; biases are found by their presence in the checkpoint."""

    rotary: str = "llama.modeling_llama.LlamaRotaryEmbedding"
    """The class below transformers.models that computes the rotation's frequencies."""
    partial_rotary: bool = False
    """The rotation may leave the last columns of a head alone."""
    qkv: tuple[str, ...] = QKV
    """Projections of the attention's input, one after the other or fused in this order."""
    gate_up: tuple[str, ...] = GATE_UP
    """The same for the MLP's input."""
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms of one layer: before attention and before the MLP; or before and after each of the two."""
    qk_norm: bool = False
    """RMS norms over head_dim on queries and keys, before the rotation."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + weight."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    experts: bool = False
    """Every MLP is a router over experts."""
    renormalized: Callable[[Any], bool] = lambda parsed: True
    """Whether the weights of the chosen experts are made to sum to one."""


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MixtralForCausalLM": Family(experts=True),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=True, renormalized=lambda parsed: bool(parsed.norm_topk_prob)),
    "Gemma2ForCausalLM": Family(layer_norms=SANDWICH, norm_plus_one=True, scaled_embedding=True),
    "Gemma3ForCausalLM": Family(
        rotary="gemma3.modeling_gemma3.Gemma3RotaryEmbedding",
        layer_norms=SANDWICH,
        qk_norm=True,
        norm_plus_one=True,
        scaled_embedding=True,
    ),
    "Phi3ForCausalLM": Family(
        rotary="phi3.modeling_phi3.Phi3RotaryEmbedding",
        partial_rotary=True,
        qkv=("self_attn.qkv_proj",),
        gate_up=("mlp.gate_up_proj",),
    ),
}

LONGROPE = "longrope"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", LONGROPE)
"""Rotations whose frequencies are constants, or one of two constants for short and long sequences (longrope)."""

ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
"""Activations that exporters.onnx.mlp emits."""

ATTENTION_OUTPUT = "self_attn.o_proj"
DOWN = "mlp.down_proj"
ROUTER = "mlp.gate"
EXPERT_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """How one kind of layer rotates queries and keys."""

    inv_freq: F32
    """[rotary_dim / 2] rotation per position, radians."""
    scaling: float
    """Factor on cos and sin."""
    long_inv_freq: F32 | None = None
    """What takes the place of `inv_freq` in sequences above `long_from` positions."""
    long_from: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """The router of a mixture of experts."""

    chosen: int
    """Experts per token."""
    renormalized: bool
    """Their weights are divided by their sum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpec:
    """Sizes and constants of one model."""

    family: Family
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eps: float
    activation: str
    tied: bool
    """The output head is the embedding matrix."""
    window: int | None
    """Columns a sliding layer sees, itself included."""
    sliding: tuple[bool, ...]
    """Per layer: whether `window` applies."""
    kinds: tuple[str, ...]
    """Per layer: which of `rotations` it uses."""
    rotations: Mapping[str, Rotation]
    attention_scale: float
    """Factor on query times key."""
    attention_softcap: float | None
    logit_softcap: float | None
    experts: Experts | None

    def layer(self, index: int) -> str:
        """Dotted name of one decoder layer."""
        return f"model.layers.{index}"

    def norm_names(self) -> Iterator[str]:
        """Modules with one weight vector."""
        names = self.family.layer_norms + (QK_NORMS if self.family.qk_norm else ())
        for index in range(self.layers):
            yield from (f"{self.layer(index)}.{name}" for name in names)
        yield FINAL_NORM

    def linear_names(self) -> Iterator[str]:
        """Modules with a weight matrix and perhaps a bias, the output head only if it has a matrix of its own."""
        mlp = (*self.family.gate_up, DOWN) if self.experts is None else ()
        for index in range(self.layers):
            yield from (f"{self.layer(index)}.{name}" for name in (*self.family.qkv, ATTENTION_OUTPUT, *mlp))
        if not self.tied:
            yield HEAD

    def expert_names(self) -> Iterator[str]:
        """Tensors of routers and experts."""
        for index in range(self.layers if self.experts else 0):
            yield f"{self.layer(index)}.{ROUTER}.weight"
            yield from (f"{self.layer(index)}.{name}" for name in EXPERT_STACKS)


def read_spec(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    """Read what the graph needs from a config.json, through transformers' own classes unless all of it is plain.

    Raises:
        UnsupportedError: The architecture, its activation or its rotation is not covered.
    """
    if architecture not in FAMILIES:
        raise UnsupportedError(
            "the built ONNX graph does not know this architecture",
            where="config.json architectures",
            got=architecture,
            expected=f"one of {sorted(FAMILIES)}",
            remedy="use --onnx-graph exported, export to gptq, or add the architecture to exporters/onnx/family.py",
        )
    stated = stated_config(architecture, config)
    family, parsed = FAMILIES[architecture], parse_config(config) if stated is None else stated
    activation = getattr(parsed, "hidden_activation", None) or parsed.hidden_act
    _check_choice("hidden_act", activation, ACTIVATIONS)
    _check_experts(parsed, family)
    _check_choice("use_bidirectional_attention", getattr(parsed, "use_bidirectional_attention", None), (None, False))
    head_dim = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    window = getattr(parsed, "sliding_window", None)
    # Older configs have no per-layer kinds: there a window applies to every layer.
    kinds = tuple(getattr(parsed, "layer_types", None) or (SLIDING,) * parsed.num_hidden_layers)
    return ModelSpec(
        family=family,
        layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        heads=parsed.num_attention_heads,
        kv_heads=parsed.num_key_value_heads or parsed.num_attention_heads,
        head_dim=head_dim,
        vocab_size=parsed.vocab_size,
        context_length=parsed.max_position_embeddings,
        eps=parsed.rms_norm_eps,
        activation=activation,
        tied=bool(parsed.tie_word_embeddings),
        window=window,
        sliding=tuple(window is not None and kind == SLIDING for kind in kinds),
        kinds=kinds,
        rotations=_rotations(parsed, family, kinds, head_dim)
        if stated is None
        else dict.fromkeys(kinds, _default_rotation(stated.rope_parameters["rope_theta"], head_dim)),
        attention_scale=float(getattr(parsed, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        attention_softcap=getattr(parsed, "attn_logit_softcapping", None),
        logit_softcap=getattr(parsed, "final_logit_softcapping", None),
        experts=Experts(chosen=parsed.num_experts_per_tok, renormalized=family.renormalized(parsed))
        if family.experts
        else None,
    )


def parse_config(config: Mapping[str, Any]) -> Any:
    """A config.json as transformers' config class.

    Raises:
        UnsupportedError: transformers does not know its model_type.
        UsageError: transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if config.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedError(
            "transformers does not know the model type",
            where="config.json",
            got=config.get("model_type"),
            expected=f"a model_type of transformers {__version__}",
        )
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    try:
        return AutoConfig.for_model(config.get("model_type"), **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UsageError("transformers refuses config.json", where="config.json", got=error) from error


def _rotations(parsed: Any, family: Family, kinds: tuple[str, ...], head_dim: int) -> dict[str, Rotation]:
    """Frequencies per kind of layer, as transformers computes them."""
    parameters = parsed.rope_parameters
    for kind in sorted(set(kinds)):
        _check_choice("rope_type", parameters.get(kind, parameters)["rope_type"], ROPE_TYPES)
    module, _, name = family.rotary.rpartition(".")
    rotary = getattr(import_module(f"transformers.models.{module}"), name)(parsed)
    found = {}
    for kind in sorted(set(kinds)):
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        inv_freq = getattr(rotary, f"{prefix}inv_freq").numpy().astype(np.float32)
        if not family.partial_rotary and 2 * inv_freq.size != head_dim:
            raise UnsupportedError(
                "partial rotary embeddings are not covered", got=2 * inv_freq.size, expected=f"head_dim {head_dim}"
            )
        scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
        long_inv_freq, long_from = _long_rotation(parsed, parameters.get(kind, parameters))
        found[kind] = Rotation(inv_freq=inv_freq, scaling=scaling, long_inv_freq=long_inv_freq, long_from=long_from)
    return found


def _default_rotation(theta: float, head_dim: int) -> Rotation:
    return Rotation(inv_freq=default_frequencies(theta, head_dim), scaling=1.0)


def _long_rotation(parsed: Any, parameters: Mapping[str, Any]) -> tuple[F32 | None, int]:
    """Frequencies of long sequences and the longest that is not one; (None, 0) when length does not matter."""
    if parameters["rope_type"] != LONGROPE:
        return None, 0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    limit = int(parsed.rope_parameters["original_max_position_embeddings"])
    inv_freq, _ = ROPE_INIT_FUNCTIONS[LONGROPE](parsed, "cpu", seq_len=limit + 1)
    return inv_freq.numpy().astype(np.float32), limit


def _check_experts(parsed: Any, family: Family) -> None:
    if family.experts:
        _check_choice("mlp_only_layers", tuple(getattr(parsed, "mlp_only_layers", None) or ()), ((),))
        _check_choice("decoder_sparse_step", getattr(parsed, "decoder_sparse_step", 1), (1,))


def _check_choice(field: str, got: object, known: tuple[Any, ...]) -> None:
    if got not in known:
        raise UnsupportedError(
            f"the ONNX graph does not cover this {field}",
            where=f"config.json {field}",
            got=got,
            expected=f"one of {known}",
            remedy="export to gguf or gptq",
        )
