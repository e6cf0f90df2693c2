"""The 16-bit model of an L4Q checkpoint as an ordinary Hugging Face folder: what other quantizers start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from l4q.checkpoint import L4QCheckpoint
from l4q.files import copy_files
from l4q.shard_writer import ShardWriter

if TYPE_CHECKING:
    import torch

LAYERS = "model.layers."
HALF = ("float16", "bfloat16")


def first_modules(checkpoint: L4QCheckpoint, layers: int) -> list[str]:
    """The quantized linears of the first decoder layers."""
    return [module for module in checkpoint.modules if layer_of(module) < layers]


def layer_of(name: str) -> int:
    """The decoder layer a tensor belongs to; -1 for those outside."""
    return int(name.removeprefix(LAYERS).split(".")[0]) if name.startswith(LAYERS) else -1


def half_dtype(checkpoint: L4QCheckpoint) -> str:
    """The 16-bit dtype the model was published in; float16 when config.json names another."""
    dtype = str(checkpoint.config.get("dtype"))
    return dtype if dtype in HALF else "float16"


def write_float(checkpoint: L4QCheckpoint, folder: Path, *, dtype: str = "float16", layers: int | None = None) -> None:
    """Write the dequantized model, rounded to `dtype`, one tensor after another.

    Args:
        checkpoint: The source.
        folder: To create.
        dtype: A torch dtype's name.
        layers: Keep the first decoder layers only; None keeps all.
    """
    import torch

    def weight(module: str) -> torch.Tensor:
        return torch.from_numpy(checkpoint.quantized(module).dequantize())

    count = int(checkpoint.config["num_hidden_layers"]) if layers is None else layers
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    _add(writer, checkpoint.dense_names, count, dtype, lambda name: (name, checkpoint.dense(name)))
    _add(writer, checkpoint.modules, count, dtype, lambda name: (f"{name}.weight", weight(name)))
    writer.close()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config |= {"num_hidden_layers": count, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_files(checkpoint.side_files(), folder)


def _add(
    writer: ShardWriter, names: Iterable[str], layers: int, dtype: str, read: Callable[[str], tuple[str, torch.Tensor]]
) -> None:
    import torch

    for name in names:
        if layer_of(name) < layers:
            stored, tensor = read(name)
            writer.add({stored: tensor.to(getattr(torch, dtype)).contiguous()}, {})
