"""Write an AWQ folder: sharded safetensors and config.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporters.awq.pack import BITS, ORDER, PER_WORD, pack_awq
from exporters.container import NIBBLES, container_bits, widen_packed
from exporters.hf_folder import Arrays, write_config, write_tensors
from exporters.hf_plan import HEAD, group_sizes, skipped_linears
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord
from exporters.transpose import transposed_nibbles
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.packed_weight import PackedWeight
from l4q.shard_layout import TensorSpec


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
    record: FileRecord = NOTHING_DONE,
) -> None:
    """Write the planned tensors shard by shard, then the config and the side files.

    Raises:
        UnsupportedError: A dense value overflows the asked dtype.
    """
    container_bits(checkpoint, options, NIBBLES)
    write_tensors(checkpoint, plan, folder, options, Packing(), on_tensor, record)
    write_config(checkpoint, folder, quantization_config(checkpoint), options)


class Packing:
    """The three AWQ tensors of a linear with K = in_features, N = out_features, G groups.

    qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N].
    """

    def specs(self, module: str, info: WeightInfo) -> tuple[TensorSpec, ...]:
        """The tensors by their full names, from the header alone."""
        rows, columns, groups = info.out_features, info.in_features, info.groups
        return (
            TensorSpec(name=f"{module}.qweight", dtype="I32", shape=(columns, rows // PER_WORD)),
            TensorSpec(name=f"{module}.qzeros", dtype="I32", shape=(groups, rows // PER_WORD)),
            TensorSpec(name=f"{module}.scales", dtype="F16", shape=(groups, rows)),
        )

    def pack(self, module: str, weight: PackedWeight) -> Arrays:
        """Their values; qweight in pieces."""
        wide = widen_packed(weight, BITS)
        for piece in transposed_nibbles(wide.packed, wide.in_features, ORDER):
            yield f"{module}.qweight", piece.view(np.int32)
        yield f"{module}.qzeros", pack_awq(np.ascontiguousarray(wide.integer_zeros().T))
        yield f"{module}.scales", np.ascontiguousarray(wide.scales.T)


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
