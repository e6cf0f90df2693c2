"""Write a compressed-tensors folder: sharded safetensors and config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.compressed_tensors.pack import pack_zeros
from exporters.compressed_tensors.plan import module_schemes, quantization_config
from exporters.container import container_bits, widen_packed
from exporters.hf_folder import Arrays, write_config, write_tensors
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord
from exporters.transpose import as_words
from exporters.words import word_count
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
    symmetric = frozenset(module for module, scheme in module_schemes(checkpoint).items() if scheme.symmetric)
    packing = Packing(width=container_bits(checkpoint, options), symmetric=symmetric)
    write_tensors(checkpoint, plan, folder, options, packing, on_tensor, record)
    write_config(checkpoint, folder, quantization_config(checkpoint, options), options)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The tensors of a linear with N = out_features, K = in_features, G groups.

    weight_packed int32 [N, ceil(K * width / 32)], weight_scale float16 [N, G], weight_shape int64 [2] = [N, K] and, for
    asymmetric schemes only (vLLM refuses it in symmetric ones), weight_zero_point int32 [ceil(N * width / 32), G].
    """

    width: int
    """Bits per stored code."""
    symmetric: frozenset[str]
    """Modules whose scheme is symmetric."""

    def specs(self, module: str, info: WeightInfo) -> tuple[TensorSpec, ...]:
        """The tensors by their full names, from the header alone."""
        rows, columns, groups = info.out_features, info.in_features, info.groups
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (rows, word_count(columns, self.width))),
            "weight_scale": ("F16", (rows, groups)),
        }
        if module not in self.symmetric:
            found["weight_zero_point"] = ("I32", (word_count(rows, self.width), groups))
        size = np.array([rows, columns], dtype="<i8").tobytes()
        return (
            *(TensorSpec(name=f"{module}.{part}", dtype=dtype, shape=shape) for part, (dtype, shape) in found.items()),
            TensorSpec(name=f"{module}.weight_shape", dtype="I64", shape=(2,), constant=size),
        )

    def pack(self, module: str, weight: PackedWeight) -> Arrays:
        """Their values, but the constant's. A checkpoint's rows of bits are weight_packed's words already (pack.py)."""
        wide = widen_packed(weight, self.width)
        yield f"{module}.weight_packed", as_words(wide.packed).view(np.int32)
        if module not in self.symmetric:  # the file's order: hashed as it comes
            yield f"{module}.weight_zero_point", pack_zeros(wide.integer_zeros(), self.width)
        yield f"{module}.weight_scale", wide.scales
