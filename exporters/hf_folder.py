"""Write and open the folders of GPTQ, AWQ and compressed-tensors: sharded safetensors and config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.files import copy_side_files, write_json
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import CONFIG_NAME, L4QCheckpoint
from l4q.errors import UnsupportedError, UsageError
from l4q.model_folder import read_config
from l4q.shards import MAX_SHARD_BYTES, ShardWriter
from l4q.weight import QuantizedWeight

if TYPE_CHECKING:
    import torch

ModulePacker = Callable[[str, QuantizedWeight], Mapping[str, "torch.Tensor"]]
"""(module, weight) -> tensors by their full names in the output."""


def write_tensors(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    pack: ModulePacker,
    on_tensor: Callable[[str], None],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the planned tensors shard by shard, one module in memory at a time.

    Raises:
        UnsupportedError: A dense value overflows the asked dtype.
    """
    writer = ShardWriter(folder, max_shard_bytes)
    for tensor in plan.tensors:
        if tensor.quantized:
            writer.add(pack(tensor.name, checkpoint.quantized(tensor.name)), {})
        else:
            writer.add({tensor.name: cast_dense(tensor.name, checkpoint.dense(tensor.name), options.dtype)}, {})
        on_tensor(tensor.name)
    writer.close()


def write_config(checkpoint: L4QCheckpoint, folder: Path, section: dict[str, Any], options: ExportOptions) -> None:
    """Write config.json, the model's own with `section` in place of l4q's, and copy the side files."""
    replaced = {"quantization_config", "torch_dtype", "dtype"}
    config = {key: value for key, value in checkpoint.config.items() if key not in replaced}
    write_json(folder / CONFIG_NAME, {**config, "dtype": options.dtype, "quantization_config": section})
    copy_side_files(checkpoint, folder)


def read_section(folder: Path, method: str, label: str) -> dict[str, Any]:
    """The quantization_config of a folder.

    Raises:
        UsageError: config.json cannot be read, or its quant_method is another.
    """
    path = folder / CONFIG_NAME
    section = read_config(folder).get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != method:
        raise UsageError(
            f"not {label} folder",
            where=path,
            got=section.get("quant_method") if isinstance(section, dict) else "no quantization_config",
            expected=f'quantization_config.quant_method "{method}"',
            remedy=f"give a folder written by l4q-export --to {method}",
        )
    return section


def missing_judge(label: str, error: ImportError) -> UsageError:
    """The error of a verification without the package whose decoder judges the bits."""
    return UsageError(
        f"verifying {label} export needs the compressed-tensors package, whose decoder judges the bits",
        got=error,
        remedy="pip install compressed-tensors, or export with --no-verify",
    )


def cast_dense(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A dense tensor in the serving dtype.

    Raises:
        UnsupportedError: A finite value would become infinite.
    """
    import torch

    cast = tensor.to(getattr(torch, dtype)).contiguous()
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise UnsupportedError(
            f"a dense tensor overflows {dtype}",
            where=name,
            got=f"largest magnitude {float(tensor.abs().max()):g}",
            expected=f"<= {torch.finfo(cast.dtype).max:g}",
            remedy="export with --dtype bfloat16",
        )
    return cast
