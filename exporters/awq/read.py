"""Read an AWQ folder back with compressed-tensors' AutoAWQ converter and its decompressor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.hf_folder import missing_judge, packed_modules, read_section
from exporters.hf_plan import HEAD
from l4q.errors import VerificationError
from l4q.shards import ShardReader
from l4q.weight import F32

if TYPE_CHECKING:
    import torch

PACKED = ".qweight"
PARTS = ("qweight", "qzeros", "scales")
EIGHTS = -0x77777778
"""int32 with 8 in every nibble: the zero-points of symmetric weights."""


def read_back(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, F32]]:
    """Decode every AWQ module, or those of `only`: (module, float32 [out_features, in_features]).

    The scales are widened to float32 first: compressed-tensors multiplies in the scales' dtype, and fp16 would round.

    Raises:
        VerificationError: A module is incomplete or ignored by the config, or zero_point is false and a zero is not 8.
        UsageError: The config is not AWQ, or compressed-tensors is not installed.
    """
    section = read_section(folder, "awq", "an AWQ")
    try:
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    except ImportError as error:
        raise missing_judge("an AWQ", error) from error
    shards = ShardReader.open(folder)
    for module in packed_modules(shards.names, PACKED, only):
        # the converter knows no -1: one group per row is a group as long as the row
        group_size = shards.shape(module + PACKED)[0] if section["group_size"] == -1 else int(section["group_size"])
        converter = AutoAWQConverter.from_autoawq_config({**section, "group_size": group_size})
        if section.get("lm_head"):  # the converter always keeps the head dense, and vLLM goes by this flag
            converter.ignore = [pattern for pattern in converter.ignore if pattern != HEAD]
        scheme = converter.create_config().config_groups["config_group_0"]
        state = converter.process(_tensors(module, shards, group_size, zero_point=bool(section["zero_point"])))
        prefix = f"{module}."
        if f"{prefix}weight_packed" not in state:
            raise VerificationError("a quantized module stands in modules_to_not_convert", where=module)
        local = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        yield module, PackedQuantizationCompressor.decompress(local, scheme)["weight"].numpy()


def _tensors(module: str, shards: ShardReader, group_size: int, *, zero_point: bool) -> dict[str, torch.Tensor]:
    """The tensors of one module, scales in float32, checked against the config."""
    names = [f"{module}.{part}" for part in PARTS]
    missing = [name for name in names if name not in shards.names]
    if missing:
        raise VerificationError("a quantized module is incomplete", where=module, got=f"no {missing}")
    qweight, qzeros, scales = (shards.tensor(name) for name in names)
    columns, rows = qweight.shape[0], int(scales.shape[1])
    groups = columns // group_size
    shapes = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
    found = {part: tuple(tensor.shape) for part, tensor in zip(PARTS, (qweight, qzeros, scales), strict=True)}
    if found != shapes:
        raise VerificationError("the tensors of a module disagree in shape", where=module, got=found, expected=shapes)
    if not zero_point and bool((qzeros != EIGHTS).any()):
        raise VerificationError(
            "the config says zero_point: false, but a zero-point is not 8", where=f"{module}.qzeros"
        )
    return dict(zip(names, (qweight, qzeros, scales.float()), strict=True))
