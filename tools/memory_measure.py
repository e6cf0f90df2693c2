"""Bytes that really live: of one L4Q layer or one decoder block, counted storage by storage on any device.

Every tensor that an operation returns is followed until its storage is freed, so the counts are exact, independent of
allocators and of the machine. `tools.memory_plan` builds on these figures, and its tests repeat them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l4q import quant
from l4q.config import KernelChoice, LoraConfig, QuantConfig
from l4q.linear import L4QLinear
from l4q.model import wrap_linears


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a llama-like decoder block."""

    hidden: int
    ffn: int
    kv: int
    """Width of the keys, heads x head size."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the block: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, given)
        return result

    def _follow(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def layer_transient(
    shape: tuple[int, int], config: QuantConfig, tokens: int = 8, kernels: KernelChoice = "eager"
) -> tuple[float, float]:
    """Bytes per weight that the forward and the backward of one linear need for a moment, worked in one block.

    A GPU takes a whole weight at once; a CPU would take it in runs of rows that fit its cache. The eager kernels,
    which the plan assumes, need the most.
    """
    out, inner = shape
    weight = torch.nn.Parameter(torch.randn(out, inner, dtype=torch.bfloat16))
    layer = L4QLinear(weight, None, config, LoraConfig(rank=4), kernels=kernels)
    x = torch.randn(tokens, inner, dtype=torch.bfloat16, requires_grad=True)
    with _whole_weights(), LiveBytes() as forward:
        y = layer(x)
    with _whole_weights(), LiveBytes() as backward:
        y.backward(torch.ones_like(y))
    return forward.peak / weight.numel(), backward.peak / weight.numel()


def block_saved(shape: LayerShape, config: QuantConfig, tokens: int) -> int:
    """Bytes that one decoder block in bfloat16 keeps for its backward, its input counted, its parameters not."""
    block, rotary = _block(shape, config)
    hidden = torch.randn(1, tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    position = rotary(hidden, torch.arange(tokens)[None])
    known = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    known |= {tensor.untyped_storage()._cdata for tensor in position}
    kept: dict[int, int] = {}
    holding: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            holding.append(tensor)  # or an address could be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden, position_embeddings=position)
    return sum(kept.values())


def loss_peak(tokens: int, vocabulary: int, hidden: int = 32) -> float:
    """Bytes per logit that live at most between the head's output and the gradient of its input."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with LiveBytes() as live:
        logits = head(x)
        loss = ForCausalLMLoss(logits=logits, labels=labels, vocab_size=vocabulary)
        loss.backward()
    return live.peak / (tokens * vocabulary)


def parameter_bytes(shape: LayerShape, config: QuantConfig, rank: int) -> tuple[int, int]:
    """Bytes of a block's frozen 16-bit and of its trainable float32 parameters."""
    block, _ = _block(shape, config, rank)
    frozen = sum(p.nbytes for p in block.parameters() if not p.requires_grad)
    return frozen, sum(p.nbytes for p in block.parameters() if p.requires_grad)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _block(shape: LayerShape, config: QuantConfig, rank: int = 4) -> tuple[Any, Any]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    head = 64
    llama = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.hidden // head,
        num_key_value_heads=shape.kv // head,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(llama, 0).to(torch.bfloat16)
    wrap_linears(block, config, LoraConfig(rank=rank))
    return block.train(), LlamaRotaryEmbedding(llama)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Let `row_blocks` make one block of every weight, as it does on a GPU."""
    before = quant.BLOCK_ELEMENTS
    quant.BLOCK_ELEMENTS = 1 << 40
    try:
        yield
    finally:
        quant.BLOCK_ELEMENTS = before
