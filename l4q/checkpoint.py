"""The L4Q checkpoint: a Hugging Face style folder of packed integers (docs/format.md is its specification)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l4q.ahead import made_ahead
from l4q.bitpack import row_bytes
from l4q.checkpoint_files import write_checkpoint_manifest
from l4q.config import FORMAT_VERSION, PER_ROW, QuantConfig, ZeroPoint
from l4q.errors import UsageError
from l4q.files import copy_files, find_side_files, staged_folder
from l4q.finite import require_finite
from l4q.json_files import check_json_files
from l4q.k_grids import SUPERBLOCK
from l4q.model_folder import check_config, read_config
from l4q.model_shapes import check_shapes
from l4q.module_grids import grid_record, grids_entry, module_grids
from l4q.packed_weight import PackedWeight
from l4q.shard_layout import DTYPE_BYTES, Unit, plan_unit, row_slices
from l4q.shard_writer import PlannedWriter, ShardWriter, dtype_word
from l4q.shards import ALL, ShardReader
from l4q.weight import GroupParameters, QuantizedWeight

if TYPE_CHECKING:
    import torch

QUANT_METHOD = "l4q"
CONFIG_NAME = "config.json"
_PARTS = {"codes": "U8", "scales": "F16", "zeros": "U8", "mins": "F16", "sub_scales": "U8", "sub_mins": "U8"}
_REWRITE = "the folder is damaged or was not written by l4q; write the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """What a safetensors header says of one quantized linear; no tensor data is read."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    """Columns per group, never -1."""
    zero_point: ZeroPoint
    per_row: bool = False
    """Whether the record says group_size -1: one group per row, however long."""
    k_grid: str | None = None
    """The K grid it is on, if it is on one."""

    @property
    def stated_group_size(self) -> int:
        """The group size as recorded: columns per group, or -1."""
        return PER_ROW if self.per_row else self.group_size

    @property
    def grid(self) -> tuple[int, int, ZeroPoint]:
        """Bits, group size as recorded, and zero-point."""
        return (self.bits, self.stated_group_size, self.zero_point)

    @property
    def groups(self) -> int:
        """Groups per row."""
        return self.in_features // self.group_size


class L4QCheckpoint:
    """A lazily read checkpoint folder. Use `open`, which checks config and all headers first."""

    def __init__(self, path: Path, config: dict[str, Any], quant: QuantConfig, shards: ShardReader) -> None:
        self.path = path
        self.config = config
        self.quant = quant
        self._shards = shards
        parts = {f".{part}" for part in _PARTS}
        stems = {name.rpartition(".")[0] for name in shards.names if name.endswith(".codes")}
        self.modules: tuple[str, ...] = tuple(sorted(stems, key=natural_order))
        self.dense_names: tuple[str, ...] = tuple(
            sorted(
                (
                    n
                    for n in shards.names
                    if not (n.rpartition(".")[0] in stems and "." + n.rpartition(".")[2] in parts)
                ),
                key=natural_order,
            )
        )
        self._infos = {module: self._read_info(module) for module in self.modules}

    @classmethod
    def open(cls, path: str | Path) -> L4QCheckpoint:
        """Open a checkpoint folder, validating config.json and every safetensors header.

        Raises:
            UsageError: A file is missing or damaged, or a tensor has the wrong shape, dtype or companions.
        """
        folder = Path(path)
        config = read_config(folder, remedy="give the folder that l4q-train wrote (RUN/checkpoint)")
        section = config.get("quantization_config")
        if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
            raise UsageError(
                "not an L4Q checkpoint",
                where=folder / CONFIG_NAME,
                got=section.get("quant_method") if isinstance(section, dict) else "no quantization_config",
                expected=f'quantization_config.quant_method "{QUANT_METHOD}"',
                remedy="train one with l4q-train; its RUN/checkpoint folder is the one to give here",
            )
        if section.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                "unknown checkpoint format version",
                where=folder / CONFIG_NAME,
                got=section.get("format_version"),
                expected=FORMAT_VERSION,
                remedy="use the l4q release that wrote it",
            )
        quant = QuantConfig.from_dict(section, where=folder / CONFIG_NAME)
        shards = ShardReader.open(folder)
        check_config(config, folder / CONFIG_NAME, tensors=len(shards.names))
        checkpoint = cls(folder, config, quant, shards)
        if not checkpoint.modules:
            raise UsageError("the checkpoint has no quantized linear", where=folder, expected="<module>.codes tensors")
        shapes = {name.removesuffix(".codes"): shards.shape(name) for name in shards.names if _is_whole(name)}
        check_shapes(config, shapes, folder)
        checkpoint._check_grids(module_grids(section, where=folder / CONFIG_NAME))
        return checkpoint

    @property
    def architecture(self) -> str:
        """The model class named in config.json, for example LlamaForCausalLM."""
        names = self.config.get("architectures") or ["unknown"]
        return str(names[0])

    def info(self, module: str) -> WeightInfo:
        """Sizes and grid of a quantized linear, from the header alone."""
        return self._infos[module]

    def quantized(self, module: str) -> QuantizedWeight:
        """Read one quantized linear.

        Raises:
            UsageError: Its values break the grid (NaN scale, code or zero-point out of range, ...).
        """
        return self.packed(module).unpack()

    def packed(self, module: str) -> PackedWeight:
        """Read one quantized linear, its codes left as they are stored.

        Raises:
            UsageError: As `quantized`.
        """
        return PackedWeight(packed=self._shards.numpy(f"{module}.codes"), **self._parameters(module))

    def parameters(self, module: str) -> GroupParameters:
        """Read scales and zero-points of one quantized linear, not its codes.

        Raises:
            UsageError: As `quantized`.
        """
        return GroupParameters(**self._parameters(module))

    def _parameters(self, module: str) -> dict[str, Any]:
        info = self._infos[module]
        parts = {part: self._shards.numpy(f"{module}.{part}") for part in ("scales", *_companions(info))}
        return {**parts, "bits": info.bits, "group_size": info.group_size, "name": module}

    def dense(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Read one unquantized tensor in its stored dtype, or a range of its rows.

        Raises:
            UsageError: It holds NaN or infinite values.
        """
        return require_finite(self._shards.tensor(name, rows), f"{self.path}: {name}")

    def dense_row_slices(self, name: str, max_bytes: int) -> Iterator[slice]:
        """Ranges of rows of an unquantized tensor with at most that many stored bytes (or one row) each."""
        yield from row_slices(self.dense_shape(name), DTYPE_BYTES[self.dense_dtype(name)], max_bytes)

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an unquantized tensor, from the header."""
        return self._shards.shape(name)

    def dense_dtype(self, name: str) -> str:
        """Stored dtype of an unquantized tensor in safetensors' words: "F32", "BF16", "F16"."""
        return self._shards.dtype(name)

    def side_files(self) -> tuple[Path, ...]:
        """Tokenizer, chat template, generation config and licence files."""
        return check_json_files(find_side_files(self.path))

    def _read_info(self, module: str) -> WeightInfo:
        where = f"{self.path}: {module}"
        record = self._shards.metadata(f"{module}.codes").get(module)
        try:
            values = json.loads(record or "")
            out_features, in_features = values["shape"]
            if type(out_features) is not int or type(in_features) is not int:
                raise TypeError("sizes are whole numbers")
            grid = QuantConfig.from_dict(values, where=where)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                "a quantized module has no valid record in its shard's metadata",
                where=where,
                got=record,
                expected='{"shape": [out, in], "bits": …, "group_size": …, "zero_point": …}',
                remedy=_REWRITE,
            ) from error
        group_size = grid.resolve_group_size(in_features)
        run = group_size if grid.k_grid is None else SUPERBLOCK
        if min(out_features, in_features) < 1 or in_features % run:
            raise UsageError(
                "group_size does not divide in_features" if run == group_size else "superblocks do not fill a row",
                where=where,
                got=f"{in_features} / {run}",
                remedy=_REWRITE,
            )
        info = WeightInfo(
            out_features=out_features,
            in_features=in_features,
            bits=grid.bits,
            group_size=group_size,
            zero_point=grid.zero_point,
            per_row=grid.group_size == PER_ROW,
            k_grid=grid.scale_grid if grid.k_grid else None,
        )
        self._check_parts(module, info)
        return info

    def _check_grids(self, stated: Mapping[str, QuantConfig]) -> None:
        """What config.json says of a module, which transformers reads, must be what its record says."""
        for module in {*stated, *self.modules}:
            info, grid = self._infos.get(module), stated.get(module, self.quant)
            expected = (grid.bits, grid.group_size, grid.zero_point)
            k_grid = grid.scale_grid if grid.k_grid else None
            if info is None or (info.grid, info.k_grid) != (expected, k_grid):
                raise UsageError(
                    "config.json and a module's record disagree on its grid",
                    where=f"{self.path}: {module}",
                    got="no such module" if info is None else (*info.grid, info.k_grid or "no K grid"),
                    expected=(*expected, k_grid or "no K grid"),
                    remedy=_REWRITE,
                )

    def _check_parts(self, module: str, info: WeightInfo) -> None:
        expected = _part_shapes(info)
        for part, dtype in _PARTS.items():
            name = f"{module}.{part}"
            if (name in self._shards.names) != (part in expected):
                raise UsageError(
                    f"tensor {name} is {'missing' if part in expected else 'not allowed'}",
                    where=self.path,
                    expected=f"zero_point {info.zero_point}, {info.k_grid or 'no K grid'}: {sorted(expected)}",
                    remedy=_REWRITE,
                )
            if part not in expected:
                continue
            got = (self._shards.dtype(name), self._shards.shape(name))
            if got != (dtype, expected[part]):
                raise UsageError(
                    f"tensor {name} has the wrong dtype or shape",
                    where=self.path,
                    got=f"{got[0]} {list(got[1])}",
                    expected=f"{dtype} {list(expected[part])}",
                    remedy=_REWRITE,
                )


def save_checkpoint(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, QuantizedWeight | PackedWeight]],
    dense: Iterable[tuple[str, torch.Tensor]],
    quant: QuantConfig,
    grids: Mapping[str, QuantConfig] | None = None,
    modules_to_not_convert: Iterable[str] = (),
    side_files: Iterable[Path] = (),
    overwrite: bool = False,
    units: Sequence[Unit] | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all.

    Args:
        path: Folder to create.
        config: The model's config.json content; its quantization_config is replaced.
        weights: (module, weight) pairs, consumed one at a time.
        dense: (tensor name, tensor) pairs of everything that is not quantized, without tied duplicates.
        quant: The common grid; modules on another one are in `grids`.
        grids: Grids of modules that have another; config.json lists those that differ, with what the weights say.
        modules_to_not_convert: Names of linear modules that stay dense ("lm_head", ...).
        side_files: Tokenizer and other files copied unchanged.
        overwrite: Replace an existing folder.
        units: What `weights` and `dense` will give, if that is known (`weight_unit`, `dense_unit`): the tensors are
            then written where they belong at once, while another thread makes the next.

    Raises:
        UsageError: The folder exists and `overwrite` is false, or what comes is not what `units` says.
    """
    records: dict[str, dict[str, Any]] = {}

    def made() -> Iterator[_Made]:
        for module, weight in weights:
            grid = (grids or {}).get(module, quant)
            records[module] = grid_record(weight, grid)
            yield _Made(_weight_tensors(module, weight), _metadata(module, weight, grid))
        for name, tensor in dense:
            yield _Made({name: tensor.detach().cpu().contiguous()}, {})

    with staged_folder(Path(path), overwrite=overwrite) as stage:
        with ShardWriter(stage) if units is None else PlannedWriter(stage, units) as writer:
            with nullcontext(made()) if units is None else made_ahead(made(), lambda piece: piece.nbytes) as pieces:
                for piece in pieces:
                    writer.add(piece.tensors, piece.metadata)
            shards = writer.close()
        section = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **quant.to_dict()}
        section["modules_to_not_convert"] = sorted(modules_to_not_convert)
        section |= grids_entry(records, quant)
        content = json.dumps({**config, "quantization_config": section}, indent=2, sort_keys=True)
        (stage / CONFIG_NAME).write_text(content + "\n", encoding="utf-8")
        copy_files(side_files, stage)
        write_checkpoint_manifest(stage, shards)


def weight_unit(module: str, info: WeightInfo, quant: QuantConfig) -> Unit:
    """What a quantized linear will be in the files.

    Args:
        module: Dotted name.
        info: Its sizes and grid.
        quant: The grid that is recorded for it, see `save_checkpoint`.
    """
    shapes = _part_shapes(info)
    tensors = {f"{module}.{part}": (dtype, shapes[part]) for part, dtype in _PARTS.items() if part in shapes}
    return plan_unit(tensors, _metadata(module, info, quant))


def dense_unit(name: str, tensor: torch.Tensor) -> Unit:
    """What an unquantized tensor will be in the files."""
    return plan_unit({name: (dtype_word(tensor), tuple(tensor.shape))}, {})


class _Made(NamedTuple):
    """Tensors that belong together."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn; numbers of equal length compare as their digits do
    digits = [part.lstrip("0") if index % 2 else part for index, part in enumerate(parts)]
    return [(len(part) if index % 2 else -1, part) for index, part in enumerate(digits)]


def _metadata(module: str, weight: GroupParameters | WeightInfo, grid: QuantConfig) -> dict[str, str]:
    """What a shard's header says of a quantized linear."""
    record = grid_record(weight, grid)
    if weight.k_grid is None:  # other grids of scales do not change how a reader decodes
        record.pop("scale_grid", None)
    shape = [weight.out_features, weight.in_features]
    return {module: json.dumps({**record, "shape": shape}, sort_keys=True)}


def _weight_tensors(module: str, weight: QuantizedWeight | PackedWeight) -> dict[str, torch.Tensor]:
    import torch

    packed = PackedWeight.of(weight) if isinstance(weight, QuantizedWeight) else weight
    found = {part: packed.packed if part == "codes" else getattr(packed, part) for part in _PARTS}
    arrays = {part: array for part, array in found.items() if array is not None}
    return {f"{module}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in arrays.items()}


def _part_shapes(info: WeightInfo) -> dict[str, tuple[int, int]]:
    """The tensors of a quantized linear."""
    grouped = (info.out_features, info.groups)
    shared = (info.out_features, info.in_features // SUPERBLOCK) if info.k_grid else grouped
    shapes = {"codes": (info.out_features, row_bytes(info.in_features, info.bits)), "scales": shared}
    return shapes | {part: shared if part == "mins" else grouped for part in _companions(info)}


def _is_whole(name: str) -> bool:
    """Whether a tensor is dense or holds the codes of a linear."""
    return name.rpartition(".")[2] not in _PARTS or name.endswith(".codes")


def _companions(info: WeightInfo) -> tuple[str, ...]:
    """The tensors of a module beside its codes and scales."""
    kind = {"integer": ("zeros",), "float": ("mins",), "none": ()}[info.zero_point]
    if info.k_grid is None:
        return kind
    return ("sub_scales", *kind, *(("sub_mins",) if info.zero_point == "float" else ()))
