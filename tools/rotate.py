"""The same llama with its residual stream in another orthonormal basis.

A model that was published quantized lies on somebody's grid already, and rounding it onto a grid that contains it costs
nothing, which says nothing about the grid. RMSNorm commutes with rotations once its gains are folded into the layers
behind it (SliceGPT, Ashkboos et al. 2024, section 3), so a random rotation leaves the function as it is and takes every
weight off its grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that read the normed residual stream."""
WRITERS = ("o_proj", "down_proj")
"""Linears that add to it."""


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, float64 [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


@torch.no_grad()
def rotate_residual(model: Any, seed: int = 0) -> None:
    """Rotate a llama's residual stream in place; embeddings are untied, as the last norm's gain goes into the head.

    Args:
        model: A transformers LlamaForCausalLM in float32 without biases on the linears that write to the stream.
        seed: Of the rotation.
    """
    turn = random_rotation(model.config.hidden_size, seed)
    body = model.model
    head = model.lm_head.weight.double() * body.norm.weight.double()  # [vocab, hidden] * [hidden]
    model.lm_head.weight = nn.Parameter((head @ turn).float(), requires_grad=False)
    model.config.tie_word_embeddings = False
    _replace(body.embed_tokens, body.embed_tokens.weight.double() @ turn)
    body.norm.weight.fill_(1)
    for layer in body.layers:
        for norm, block in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
            gain = norm.weight.double()
            for name in (name for name in READERS if hasattr(block, name)):
                linear = getattr(block, name)
                _replace(linear, (linear.weight.double() * gain) @ turn)
            for name in (name for name in WRITERS if hasattr(block, name)):
                linear = getattr(block, name)
                _replace(linear, turn.T @ linear.weight.double())
            norm.weight.fill_(1)


def _replace(module: Any, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
