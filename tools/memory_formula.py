"""Memory, traffic and arithmetic of L4Q training per GPU, from a formula whose constants are measured bytes.

`tools.memory_plan` prints it as tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from l4q.errors import UsageError

# Bytes measured on the layer by tools.memory_measure; test_memory_plan measures them again.
SAVED_PER_TOKEN = {"hidden": 16, "ffn": 8, "kv": 4, "heads": 4, "one": 8}
"""Kept for backward per token and block, times the size named; 16-bit activations, attention not materialised."""
SAVED_PER_GROUP = {"none": 8, "integer": 12, "float": 12}
"""Kept for backward per quantization group: snapped scales, mins and what the zero-point's gradient needs."""
FORWARD_TRANSIENT, BACKWARD_TRANSIENT = 10.25, 19.3
"""Per weight of the linear being worked on: merged, position, codes, dL/dW and W_q, in float32 but for the last."""
LOSS_PER_LOGIT = 14
"""Logits and their gradient in 16 bits, float32 copy, softmax and gradient."""
BASE_BYTES = {"dense": 2.0, "int8": 1.03125, "int4": 0.5625}
"""Per frozen weight of a linear, see l4q.base."""
STATE_BYTES = {"float32": 8, "bfloat16": 4}
"""AdamW's two moments per trainable number."""
# Not measured here.
CONTEXT = 1.5e9
"""Assumed: CUDA context, NCCL buffers, cuBLAS workspace and what the allocator cannot use."""
GATHERED_BLOCKS = 3
"""FSDP2: the block at work, the buffer the next one is gathered into, and that one's parameters."""
A100_FLOPS = 312e12
"""Dense bf16 peak of an A100."""
LINKS = {"NVLink": 300e9, "PCIe 4": 25e9}
"""Assumed bytes per second a GPU receives in a collective."""

Mode = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a llama-like model."""

    layers: int
    hidden: int
    ffn: int
    kv: int
    vocabulary: int
    heads: int
    tied: bool = False

    @classmethod
    def from_config(cls, path: Path) -> ModelShape:
        """Read a Hugging Face config.json.

        Raises:
            UsageError: A size is missing.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            hidden, heads = values["hidden_size"], values["num_attention_heads"]
            head = values.get("head_dim") or hidden // heads
            return cls(
                layers=values["num_hidden_layers"],
                hidden=hidden,
                ffn=values["intermediate_size"],
                kv=head * (values.get("num_key_value_heads") or heads),
                vocabulary=values["vocab_size"],
                heads=heads,
                tied=bool(values.get("tie_word_embeddings", False)),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "not the config of a llama-like model", where=path, got=error, expected="hidden_size, vocab_size, ..."
            ) from error

    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of a block's linears."""
        attention = ((self.hidden, self.hidden), (self.kv, self.hidden), (self.kv, self.hidden), (self.hidden,) * 2)
        return (*attention, (self.ffn, self.hidden), (self.ffn, self.hidden), (self.hidden, self.ffn))

    @property
    def block_weights(self) -> int:
        """Weights of a block's linears."""
        return sum(out * inner for out, inner in self.linears())

    @property
    def outside(self) -> int:
        """Numbers outside of the blocks: embedding, head, final norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden


MODELS = {
    "7B": ModelShape(layers=32, hidden=4096, ffn=11008, kv=4096, vocabulary=32000, heads=32),
    "13B": ModelShape(layers=40, hidden=5120, ffn=13824, kv=5120, vocabulary=32000, heads=40),
    "33B": ModelShape(layers=60, hidden=6656, ffn=17920, kv=6656, vocabulary=32000, heads=52),
    "70B": ModelShape(layers=80, hidden=8192, ffn=28672, kv=1024, vocabulary=32000, heads=64),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained."""

    mode: Mode = "ddp"
    gpus: int = 1
    checkpointing: bool = False
    tokens: int = 2048
    """Per GPU and forward pass."""
    group_size: int = 64
    rank: int = 8
    zero_point: str = "none"
    base: str = "dense"
    state: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    frozen: float
    trainable: float
    """A, B, s and b with gradients and moments."""
    activations: float
    gathered: float
    """FSDP2's whole blocks, or DDP's gradient buckets."""
    transient: float
    """The larger of the loss and one linear's backward."""
    context: float = CONTEXT

    @property
    def total(self) -> float:
        """Their sum."""
        return self.frozen + self.trainable + self.activations + self.gathered + self.transient + self.context


def groups(model: ModelShape, setting: Setting) -> int:
    """Quantization groups of a block."""
    return sum(out * -(-inner // setting.group_size) for out, inner in model.linears())


def block_parameters(model: ModelShape, setting: Setting) -> tuple[float, int, int]:
    """Of one block: bytes of frozen parameters, trainable numbers, float32 numbers that are frozen (b for "none")."""
    frozen = BASE_BYTES[setting.base] * model.block_weights + 2 * 2 * model.hidden
    lora = setting.rank * sum(out + inner for out, inner in model.linears())
    count = groups(model, setting)
    fixed = count if setting.zero_point == "none" else 0
    return frozen + 4 * fixed, lora + 2 * count - fixed, fixed


def saved(model: ModelShape, setting: Setting) -> float:
    """Bytes one block keeps for its backward."""
    sizes = {"hidden": model.hidden, "ffn": model.ffn, "kv": model.kv, "heads": model.heads, "one": 1}
    per_token = sum(factor * sizes[name] for name, factor in SAVED_PER_TOKEN.items())
    return per_token * setting.tokens + SAVED_PER_GROUP[setting.zero_point] * groups(model, setting)


def memory(model: ModelShape, setting: Setting) -> Memory:
    """Bytes on each GPU at the peak of a step."""
    frozen, trainable, _ = block_parameters(model, setting)
    share = 1 / setting.gpus if setting.mode == "fsdp" else 1.0
    block = saved(model, setting)
    activations = model.layers * block
    if setting.checkpointing:
        activations = model.layers * 2 * model.hidden * setting.tokens + block
    largest = max(out * inner for out, inner in model.linears())
    if setting.gpus == 1:
        gathered = 0.0
    elif setting.mode == "fsdp":
        # whole blocks, the root's parameters, one block's gradients and their copy for the reduce-scatter
        gathered = GATHERED_BLOCKS * (frozen + 4 * trainable) + 2 * model.outside + 8 * trainable
    else:
        gathered = 4.0 * trainable * model.layers
    return Memory(
        frozen=share * (model.layers * frozen + 2 * model.outside),
        trainable=share * model.layers * trainable * (8 + STATE_BYTES[setting.state]),
        activations=activations,
        gathered=gathered,
        transient=max(BACKWARD_TRANSIENT * largest, LOSS_PER_LOGIT * setting.tokens * model.vocabulary),
    )


def traffic(model: ModelShape, setting: Setting) -> float:
    """Bytes a GPU receives per forward and backward pass."""
    frozen, trainable, _ = block_parameters(model, setting)
    others = (setting.gpus - 1) / setting.gpus
    if setting.mode == "ddp":
        return 2 * others * 4 * model.layers * trainable  # ring all-reduce of the gradients
    gathers = 2 * model.layers * (frozen + 4 * trainable) + 2 * model.outside
    return others * (gathers + 4 * model.layers * trainable)


def flops(model: ModelShape, setting: Setting) -> float:
    """Of the linears per token: forward, dL/dX and dL/dW, and the recomputed forward; attention is left out."""
    return (8 if setting.checkpointing else 6) * model.layers * model.block_weights


def host_memory(model: ModelShape, setting: Setting) -> float:
    """Bytes of main memory while a machine loads the 16-bit model: with FSDP one process reads it, else every one."""
    readers = 1 if setting.mode == "fsdp" else setting.gpus
    return readers * 2 * (model.layers * model.block_weights + model.outside)
