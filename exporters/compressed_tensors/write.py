"""Write a compressed-tensors folder: sharded safetensors and config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporters.compressed_tensors.pack import pack_codes, pack_zeros
from exporters.compressed_tensors.plan import module_schemes, quantization_config
from exporters.container import container_bits, widen
from exporters.hf_folder import write_config, write_tensors
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
    width, found = container_bits(checkpoint, options), module_schemes(checkpoint)

    def pack(module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return module_tensors(module, widen(weight, width), symmetric=found[module].symmetric)

    write_tensors(checkpoint, plan, folder, options, pack, on_tensor, max_shard_bytes=max_shard_bytes)
    write_config(checkpoint, folder, quantization_config(checkpoint, options), options)


def module_tensors(module: str, weight: QuantizedWeight, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """The tensors of a linear with N = out_features, K = in_features, G groups.

    weight_packed int32 [N, ceil(K * bits / 32)], weight_scale float16 [N, G], weight_shape int64 [2] = [N, K] and, for
    asymmetric schemes only (vLLM refuses it in symmetric ones), weight_zero_point int32 [ceil(N * bits / 32), G].
    """
    import torch

    arrays = {
        "weight_packed": pack_codes(weight.codes, weight.bits),
        "weight_scale": np.ascontiguousarray(weight.scales),
        "weight_shape": np.array(weight.shape, dtype=np.int64),
    }
    if not symmetric:
        arrays["weight_zero_point"] = pack_zeros(weight.integer_zeros(), weight.bits)
    return {f"{module}.{part}": torch.from_numpy(array) for part, array in arrays.items()}
