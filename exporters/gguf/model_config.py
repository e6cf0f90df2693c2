"""Values of a config.json under the names and defaults that transformers gives them, older spellings included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

Config = Mapping[str, Any]

LONGROPE: Final = "longrope"
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


def need(config: Config, key: str) -> Any:
    """A value that must be there.

    Raises:
        KeyError: It is absent or null.
    """
    if config.get(key) is None:
        raise KeyError(key)
    return config[key]


def head_dim(config: Config) -> int:
    """Columns of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: Config) -> int:
    """Heads of keys and values."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def experts(config: Config) -> int:
    """Experts of one block, which mixtral and qwen3-moe name differently."""
    return int(config.get("num_local_experts") or need(config, "num_experts"))


def rope_parameters(config: Config) -> dict[str, Any]:
    """RoPE settings with rope_theta and rope_type, from rope_parameters or the older rope_theta and rope_scaling.

    Models whose sliding layers rotate otherwise (gemma3) answer for the full layers here.
    """
    merged = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    given = config.get("rope_parameters") or {}
    merged |= given.get(FULL) or given
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    merged["rope_theta"] = float(merged["rope_theta"] or 10000.0)
    return merged


def sliding_rope_theta(config: Config) -> float:
    """RoPE base of the sliding layers of gemma3."""
    sliding = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    return float(sliding.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


def sliding_rope_type(config: Config) -> str:
    """RoPE type of the sliding layers of gemma3."""
    sliding = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    return str(sliding.get("rope_type") or "default")


def partial_rotary_factor(config: Config) -> float:
    """Share of a head's columns that rotate."""
    given = rope_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return float(given or 1.0)


def rotary_dim(config: Config) -> int:
    """Columns of a head that rotate."""
    return int(head_dim(config) * partial_rotary_factor(config))


def original_context(config: Config) -> int:
    """Positions that rope type longrope was stretched from."""
    given = rope_parameters(config).get("original_max_position_embeddings")
    return int(given or need(config, "original_max_position_embeddings"))


def longrope_attention_factor(config: Config) -> float:
    """Factor of rope type longrope on cos and sin (transformers' `_compute_longrope_parameters`)."""
    rope, original = rope_parameters(config), original_context(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def activation(config: Config) -> str:
    """The MLP's activation; gemma has its own key for it."""
    return str(config.get("hidden_activation") or config.get("hidden_act") or "silu")


def layer_types(config: Config, full_every: int) -> list[str]:
    """Kinds of attention per layer; where the config does not list them, every `full_every`-th layer is full."""
    layers = int(config["num_hidden_layers"])
    given = config.get("layer_types")
    return list(given) if given else [SLIDING if (index + 1) % full_every else FULL for index in range(layers)]


def window(config: Config) -> int | None:
    """Tokens a sliding layer sees, itself included; None when every layer sees everything."""
    size = config.get("sliding_window")
    if size is None or not config.get("use_sliding_window", True):
        return None
    kinds = config.get("layer_types")
    return int(size) if not kinds or SLIDING in kinds else None
