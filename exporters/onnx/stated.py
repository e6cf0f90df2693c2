"""Configs that need no completion: every value the graph reads stands in config.json.

transformers writes its classes' defaults out, so most configs are of this kind. Asking its classes anyway, and its
rotary embeddings, imports its models and a good part of torch: seconds, where the export of a small model takes one.
What is not plain goes to them all the same, and with it whatever they refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from l4q.weight import F32

_COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
_MODELS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("LlamaForCausalLM", "llama"): (),
    ("MistralForCausalLM", "mistral"): ("sliding_window",),
}
"""Architectures and model types whose classes take such values as they are, and what they have of their own to read."""
_MOVED = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Entries that transformers' classes make part of `rope_parameters`."""


def stated_config(architecture: str, config: Mapping[str, Any]) -> SimpleNamespace | None:
    """The config's values as attributes, or None if transformers' class has to say what they mean.

    Args:
        architecture: Class name of the model.
        config: Content of config.json.
    """
    own = _MODELS.get((architecture, str(config.get("model_type"))))
    if own is None or any(name not in config for name in own) or any(name in config for name in _MOVED):
        return None
    plain = (
        all(_is_count(config.get(name)) for name in _COUNTS)
        and type(config.get("rms_norm_eps")) is float
        and type(config.get("tie_word_embeddings")) is bool
        and type(config.get("hidden_act")) is str
        and all(config[name] is None or _is_count(config[name]) for name in own)
        and _is_default_rotation(config.get("rope_parameters"))
    )
    return SimpleNamespace(**config) if plain else None


def default_frequencies(theta: float, head_dim: int) -> F32:
    """theta**(-2i / head_dim) for i below head_dim / 2, rounded as torch rounds it in transformers' models."""
    import torch

    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: F32 = (1.0 / theta**exponents).numpy().astype(np.float32)
    return frequencies


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_default_rotation(parameters: object) -> bool:
    return (
        isinstance(parameters, dict)
        and set(parameters) == {"rope_type", "rope_theta"}
        and parameters["rope_type"] == "default"
        and type(parameters["rope_theta"]) is float
    )
