"""Write an AWQ folder: sharded safetensors and config.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.awq.pack import BITS, pack_awq
from exporters.container import NIBBLES, container_bits, widen
from exporters.hf_folder import write_config, write_tensors
from exporters.hf_plan import HEAD, group_sizes, skipped_linears
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint
from l4q.shards import MAX_SHARD_BYTES
from l4q.weight import QuantizedWeight

if TYPE_CHECKING:
    import torch


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the planned tensors shard by shard, then the config and the side files.

    Raises:
        UnsupportedError: A dense value overflows the asked dtype.
    """
    width = container_bits(checkpoint, options, NIBBLES)

    def pack(module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return module_tensors(module, widen(weight, width))

    write_tensors(checkpoint, plan, folder, options, pack, on_tensor, max_shard_bytes=max_shard_bytes)
    write_config(checkpoint, folder, quantization_config(checkpoint), options)


def module_tensors(module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a linear with K = in_features, N = out_features, G groups.

    qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N].
    """
    import torch

    arrays = {
        "qweight": pack_awq(np.ascontiguousarray(weight.codes.T)),
        "qzeros": pack_awq(np.ascontiguousarray(weight.integer_zeros().T)),
        "scales": np.ascontiguousarray(weight.scales.T),
    }
    return {f"{module}.{part}": torch.from_numpy(array) for part, array in arrays.items()}


def quantization_config(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """The quantization_config section that vLLM and transformers read.

    zero_point is true for symmetric weights too, with 8 in every field of qzeros: vLLM's CUDA path has a fast kernel
    for AWQ with zero-points only, and readers disagree on whether zero_point false means that qzeros are ignored.
    """
    skipped = list(skipped_linears(checkpoint))
    section: dict[str, Any] = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_sizes(checkpoint)[0],
        "zero_point": True,
        "version": "gemm",
        "lm_head": HEAD in checkpoint.modules,
        "modules_to_not_convert": skipped or None,
    }
    if skipped:
        section["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in skipped}  # what GPTQModel reads
    return section
