"""A transformers decoder whose weights take no memory, to follow its forward with, and what its sizes are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from l4q.errors import UnsupportedError

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names that config classes give the context length."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotations that change with the sequence's length, of which a trace would keep the example's."""


def hollow_decoder(config: Any) -> Any:
    """The transformers model in float32 whose parameters are one zero each, spread over their shape."""
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from transformers import AutoModelForCausalLM

    def unload(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.device.type == "meta":
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(unload)
    try:
        decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    finally:
        handle.remove()
    # Scaled dot products become one Attention operator, which knows no soft-capping inside and no sinks.
    if decoder._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None:
        decoder.set_attn_implementation("sdpa")
    spread: dict[int, nn.Parameter] = {}
    for module in decoder.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = spread.setdefault(id(parameter), nn.Parameter(zeros, requires_grad=False))
    return decoder.eval()


def cache_shapes(decoder: Any) -> list[tuple[int, int]]:
    """(heads, head_dim) of every layer's keys and values.

    Raises:
        UnsupportedError: They are not the same everywhere.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        cache = decoder(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    if not shapes or any(keys != shapes[0][0] or values != keys or len(keys) != 4 for keys, values in shapes):
        raise UnsupportedError(
            "the ONNX graph needs layers whose cached keys and values have one shape",
            where=type(decoder).__name__,
            got=sorted({f"{keys} {values}" for keys, values in shapes}),
            expected="[batch, kv_heads, length, head_dim] everywhere",
            remedy="export to gguf or gptq",
        )
    return [(keys[1], keys[3]) for keys, _ in shapes]


def check_rope(config: Any) -> None:
    """Refuse a rotation that a trace cannot hold.

    Raises:
        UnsupportedError: It depends on the sequence's length.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    found = {parameters.get("rope_type"), *(p.get("rope_type") for p in parameters.values() if isinstance(p, dict))}
    if found & set(LENGTH_DEPENDENT_ROPE):
        raise UnsupportedError(
            "a traced graph keeps one rotation for all lengths",
            where="config.json rope_parameters",
            got=sorted(str(kind) for kind in found if kind),
            expected=f"none of {LENGTH_DEPENDENT_ROPE}",
            remedy="export to gguf or gptq",
        )


def check_class(decoder: Any, architecture: str) -> None:
    """Refuse a model that is not the one config.json names.

    Raises:
        UnsupportedError: Its class has another name.
    """
    if type(decoder).__name__ != architecture:
        raise UnsupportedError(
            "transformers builds another class from config.json than it names",
            where="config.json architectures",
            got=architecture,
            expected=type(decoder).__name__,
            remedy="set architectures to the class that model_type stands for",
        )


def context_length(config: Any, architecture: str) -> int:
    """Positions the model was made for.

    Raises:
        UnsupportedError: config.json does not say.
    """
    for field in CONTEXT_FIELDS:
        if getattr(config, field, None):
            return int(getattr(config, field))
    raise refusal(architecture, f"config.json states no context length ({', '.join(CONTEXT_FIELDS)})")


def refusal(architecture: str, reason: str) -> UnsupportedError:
    """The error of a model that cannot be traced."""
    return UnsupportedError(
        "this architecture cannot be exported to ONNX",
        where=architecture,
        got=reason,
        expected="a decoder that torch.export follows and torch.onnx translates, sizes left free",
        remedy="export to gguf or gptq",
    )
