"""L4Q checkpoints of real models' exact shapes with random contents: nothing is trained, nothing is downloaded.

Codes and scales are drawn module by module and go straight into the checkpoint's shards, so that the 7B shapes need no
more memory than one shard. The tokenizer is SmolLM2's: exporters copy and convert one, and its size matters to GGUF.
Where the vocabulary is smaller than SmolLM2's (Llama 2), the tokenizer is cut to the ids there are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l4q.checkpoint import save_checkpoint
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UsageError
from l4q.files import find_side_files
from l4q.weight import QuantizedWeight

BITS = 4
GROUP = 64
SCALE_BOUNDS = (1e-3, 3e-3)
DENSE_STD = 0.02
CHUNK_ROWS = 4096
"""Rows of an embedding drawn at once, so that the random float32 numbers stay small beside the 16-bit matrix."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """Sizes of a Llama-shaped model, from its published config.json."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    dtype: str
    """Of the dense tensors, a torch dtype's name."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of config.json."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of one layer."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all quantized linears."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def config(self) -> dict[str, Any]:
        """config.json, without a quantization_config."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": self.dtype,
            **self.more,
        }


def _rope(theta: float) -> dict[str, Any]:
    """The entry transformers 5 writes for a plain rotation."""
    return {"rope_type": "default", "rope_theta": theta}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, BenchModel] = {
    "tiny": BenchModel(
        hidden=128, inner=256, layers=2, heads=2, kv_heads=1, vocab=1024, tied=True, dtype="bfloat16",
        more={"max_position_embeddings": 1024, "rope_parameters": _rope(10000.0)},
    ),
    "smollm2": BenchModel(
        hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, vocab=49152, tied=True, dtype="bfloat16",
        more={"max_position_embeddings": 8192, "rope_parameters": _rope(100000.0)},
    ),
    "llama-1b": BenchModel(
        hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True, dtype="bfloat16",
        more={"max_position_embeddings": 131072, "rope_parameters": _rope(500000.0) | LLAMA3_ROPE},
    ),
    "llama-7b": BenchModel(
        hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocab=32000, tied=False, dtype="float16",
        more={"max_position_embeddings": 4096, "rope_parameters": _rope(10000.0)},
    ),
}  # fmt: skip
"""SmolLM2-135M, Llama-3.2-1B, Llama-2-7B, and one for tests and warm-ups."""


def write_random(model: BenchModel, folder: Path, tokenizer: Path, zero_point: ZeroPoint = "none") -> None:
    """Write a checkpoint with random codes, scales and zero-points, one module in memory at a time.

    Args:
        model: The shapes.
        folder: To create.
        tokenizer: Folder with SmolLM2's tokenizer files.
        zero_point: Kind of the grid.

    Raises:
        UsageError: `folder` exists, or the tokenizer is missing.
    """
    quant = QuantConfig(bits=BITS, group_size=GROUP, zero_point=zero_point)
    save_checkpoint(folder, config=model.config, weights=_weights(model, zero_point), dense=_dense(model), quant=quant)
    copy_tokenizer(tokenizer, folder, model.vocab)


def copy_tokenizer(source: Path, folder: Path, vocab: int) -> None:
    """Copy a byte-level BPE tokenizer and its side files without the ids from `vocab` on and the merges that make them.

    Raises:
        UsageError: There is none.
    """
    files = {path.name: path for path in find_side_files(source)}
    if "tokenizer.json" not in files:
        raise UsageError("the tokenizer is missing", where=source, expected="tokenizer.json", remedy="make assets")
    for name, path in files.items():
        if name != "tokenizer.json":
            shutil.copyfile(path, folder / name)
    content = json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < vocab}
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [[left, right] for left, right in pairs if {left, right, left + right} <= model["vocab"].keys()]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _weights(model: BenchModel, zero_point: ZeroPoint) -> Iterator[tuple[str, QuantizedWeight]]:
    rng = np.random.default_rng(0)
    for layer in range(model.layers):
        for name, (rows, columns) in model.linears.items():
            grouped = (rows, columns // GROUP)
            pairs = np.frombuffer(rng.bytes(rows * columns // 2), dtype=np.uint8).reshape(rows, -1)
            codes = np.concatenate([pairs & 15, pairs >> 4], axis=1)
            scales = rng.uniform(*SCALE_BOUNDS, grouped).astype(np.float16)
            zeros = rng.integers(1, 1 << BITS, grouped, dtype=np.uint8) if zero_point == "integer" else None
            mins = -8 * scales if zero_point == "float" else None
            yield (
                f"model.layers.{layer}.{name}",
                QuantizedWeight(codes=codes, scales=scales, zeros=zeros, mins=mins, bits=BITS, group_size=GROUP),
            )


def _dense(model: BenchModel) -> Iterator[tuple[str, Any]]:
    import torch

    dtype = getattr(torch, model.dtype)
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", *(() if model.tied else ("lm_head.weight",))):
        matrix = torch.empty(model.vocab, model.hidden, dtype=dtype)
        for rows in matrix.split(CHUNK_ROWS):
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(DENSE_STD))
        yield name, matrix
    yield "model.norm.weight", torch.ones(model.hidden, dtype=dtype)
    for layer in range(model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", torch.ones(model.hidden, dtype=dtype)
