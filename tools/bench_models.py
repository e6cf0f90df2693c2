"""The layers L4Q is measured against, written as plainly as autograd allows, and Llama-shaped random models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from l4q.config import LoraConfig, QuantConfig
from l4q.init import init_qparams
from l4q.quant import LoraUpdate, freeze_weight, grid_params
from l4q.weight import QuantizedWeight


def fake_quantize_graph(
    weight: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, quant: QuantConfig
) -> torch.Tensor:
    """W_q = q * s + m as an ordinary autograd graph: clamp, straight-through round, multiply, add.

    Every intermediate of the weight's size that autograd wants stays alive until the backward pass: what L4Q's own
    layer avoids.

    Args:
        weight: [out, in], any float dtype; the graph computes in it.
        scales: s [out, groups].
        offsets: b [out, groups].
        quant: The grid.
    """
    grid = grid_params(scales, offsets, quant)
    step, low = grid.scales.to(weight.dtype).unsqueeze(-1), grid.mins.to(weight.dtype).unsqueeze(-1)
    grouped = weight.view(weight.shape[0], scales.shape[1], -1)  # [out, groups, group_size]
    position = ((grouped - low) / step).clamp(0, quant.max_code)
    codes = position + (position.round() - position).detach()
    return (codes * step + low).view(weight.shape)


class _GridLinear(nn.Module):
    """A linear layer with trained scales and offsets."""

    def __init__(self, linear: nn.Linear, quant: QuantConfig) -> None:
        super().__init__()
        self.quant = quant
        self.weight, self.bias = linear.weight, linear.bias
        scales, offsets = init_qparams(linear.weight, quant)
        self.scales = nn.Parameter(scales)
        self.offsets = nn.Parameter(offsets, requires_grad=quant.zero_point != "none")

    def quantized(self) -> torch.Tensor:
        """W_q of the weight alone, with its graph."""
        return fake_quantize_graph(self.weight, self.scales, self.offsets, self.quant)


class QATLinear(_GridLinear):
    """Full quantization-aware training (LSQ): the weight itself, s and b are trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        return F.linear(x, self.quantized(), self.bias)


class QATLoRALinear(_GridLinear):
    """The paper's QAT-LoRA: Q(W0) with trained s and b, LoRA beside it in 16 or 32 bits."""

    def __init__(self, linear: nn.Linear, quant: QuantConfig, lora: LoraConfig) -> None:
        super().__init__(linear, quant)
        self.scaling = lora.scaling
        weight = linear.weight
        weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, weight.shape[1], device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], lora.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out], through two paths."""
        branch = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.quantized(), self.bias) + self.scaling * branch

    @torch.no_grad()
    def freeze(self, name: str, *, merged: bool) -> QuantizedWeight:
        """Integers on the trained grid: of W0 alone, or of W0 + scaling * B A."""
        update = LoraUpdate(self.lora_A, self.lora_B, self.scaling if merged else 0.0)
        grid = grid_params(self.scales, self.offsets, self.quant)
        return freeze_weight(self.weight, update, grid, self.quant, name)


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a random Llama-shaped model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES: dict[str, LlamaShape] = {
    "tiny": LlamaShape(hidden=512, inner=1408, layers=4, heads=8, kv_heads=8, vocab=1024),
    "1b": LlamaShape(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, vocab=32000),
    "7b": LlamaShape(hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocab=32000),
}


def random_llama(shape: LlamaShape, dtype: torch.dtype, device: str) -> Any:
    """A LlamaForCausalLM with random weights, built on the device and in the dtype it is used in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def replace_linears(model: nn.Module, names: list[str], make: Any) -> None:
    """Put `make(linear)` in the place of every named linear layer."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, make(model.get_submodule(name)))
