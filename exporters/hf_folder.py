"""Write and open the folders of GPTQ, AWQ and compressed-tensors: sharded safetensors and config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from exporters.files import copy_side_files, write_json
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord
from l4q.checkpoint import CONFIG_NAME, L4QCheckpoint, WeightInfo
from l4q.errors import UnsupportedError, UsageError
from l4q.model_folder import read_config
from l4q.packed_weight import PackedWeight
from l4q.shard_layout import TensorSpec, Unit, plan_shards
from l4q.shard_writer import write_shards

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

DENSE_PIECE_BYTES = 4 << 20
"""Stored bytes of a dense tensor that are cast at a time: few, so that caches and the allocator keep them."""


Arrays = Iterator[tuple[str, "npt.NDArray[Any]"]]
"""(tensor name, values) pairs."""


class ModulePacking(Protocol):
    """How a format stores one quantized linear."""

    def specs(self, module: str, info: WeightInfo) -> tuple[TensorSpec, ...]:
        """The tensors of a module, by their full names in the output, from the header alone."""

    def pack(self, module: str, weight: PackedWeight) -> Arrays:
        """Those tensors' values; the rows of one may come in several pieces, in order."""


def write_tensors(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    packing: ModulePacking,
    on_tensor: Callable[[str], None],
    record: FileRecord = NOTHING_DONE,
) -> None:
    """Write the planned tensors shard by shard, one module in memory at a time; shards that `record` knows are kept.

    Raises:
        UnsupportedError: A dense value overflows the asked dtype.
    """

    def produce(name: str) -> Iterator[tuple[str, npt.NDArray[Any] | torch.Tensor]]:
        if name in quantized:
            yield from packing.pack(name, checkpoint.packed(name))
        else:
            yield from ((name, piece) for piece in dense_pieces(checkpoint, name, options.dtype))
        on_tensor(name)

    quantized = frozenset(checkpoint.modules)
    layouts = plan_shards(_units(checkpoint, plan, packing), options.max_shard_bytes)
    finished = {layout.file_name for layout in layouts if record.finished(layout.file_name)}
    write_shards(
        folder,
        layouts,
        produce,
        finished=lambda layout: layout.file_name in finished,
        follow=record.follow,
        on_shard=record.add,
    )


def _units(checkpoint: L4QCheckpoint, plan: ExportPlan, packing: ModulePacking) -> Iterator[Unit]:
    """The planned tensors as the files will hold them."""
    for tensor in plan.tensors:
        if tensor.quantized:
            specs = packing.specs(tensor.name, checkpoint.info(tensor.name))
        else:
            specs = (TensorSpec(name=tensor.name, dtype=tensor.encoding, shape=tensor.shape),)
        yield Unit(name=tensor.name, tensors=specs)


def dense_pieces(checkpoint: L4QCheckpoint, name: str, dtype: str) -> Iterator[torch.Tensor]:
    """A dense tensor in the serving dtype, some rows at a time.

    Raises:
        UnsupportedError: A finite value would become infinite.
    """
    for rows in checkpoint.dense_row_slices(name, DENSE_PIECE_BYTES):
        yield cast_dense(name, checkpoint.dense(name, rows), dtype)


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


def packed_modules(names: Iterable[str], suffix: str, only: Collection[str] | None) -> list[str]:
    """The modules whose packed tensor is `<module><suffix>`, sorted; of those in `only`, if it is given."""
    modules = sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return modules if only is None else [module for module in modules if module in only]


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
    # Rounding keeps the order of values, so none overflows unless an extreme does.
    if cast.dtype == tensor.dtype or not cast.numel() or _all_finite(torch.stack(tensor.aminmax()).to(cast.dtype)):
        return cast
    if bool(torch.isfinite(tensor).all()):
        raise UnsupportedError(
            f"a dense tensor overflows {dtype}",
            where=name,
            got=f"largest magnitude {float(tensor.abs().max()):g}",
            expected=f"<= {torch.finfo(cast.dtype).max:g}",
            remedy="export with --dtype bfloat16",
        )
    return cast


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    import torch

    return bool(torch.isfinite(values).all())
