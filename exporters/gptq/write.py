"""Write a GPTQ folder (sharded safetensors, config.json, quantize_config.json) and read it back with foreign code."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.container import container_bits, widen_packed
from exporters.files import write_json
from exporters.gptq.dynamic import dynamic_rules, stated_group_size
from exporters.gptq.pack import ZERO_OFFSET, encode_zeros
from exporters.hf_folder import Arrays, missing_judge, packed_modules, read_section, write_config, write_tensors
from exporters.hf_plan import HEAD, group_sizes, is_symmetric, skipped_linears
from exporters.judge import needs_newer_judge, read_elsewhere
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord
from exporters.transpose import as_words, transposed_words
from exporters.words import pack_cols
from l4q import __version__
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.errors import VerificationError
from l4q.packed_weight import PackedWeight
from l4q.shard_layout import TensorSpec
from l4q.shards import ShardReader
from l4q.weight import F32

if TYPE_CHECKING:
    import torch

LEGACY_CONFIG_NAME = "quantize_config.json"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# gptqmodel 7.7.0 (models/loader.py) takes sym: false with v1 zeros only from producers that promise the v2 code base's
# arithmetic, because older ones wrapped zero-points. Zero-points of an L4Q grid lie in [1, 2**bits - 1]: none wraps.
V1_ASYMMETRIC_PROMISE = "gptqmodel:0.9.0"


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
    record: FileRecord = NOTHING_DONE,
) -> None:
    """Write the planned tensors shard by shard, then the configs and the side files.

    Raises:
        UnsupportedError: A dense value overflows the asked dtype.
    """
    packing = Packing(width=container_bits(checkpoint, options), checkpoint_format=options.gptq_format)
    write_tensors(checkpoint, plan, folder, options, packing, on_tensor, record)
    section = quantization_config(checkpoint, options)
    write_config(checkpoint, folder, section, options)
    write_json(folder / LEGACY_CONFIG_NAME, section)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The four GPTQ tensors of a linear with K = in_features, N = out_features, G groups.

    qweight int32 [K * width / 32, N], qzeros int32 [G, N * width / 32], scales float16 [G, N], g_idx int32 [K].
    """

    width: int
    """Bits per stored code."""
    checkpoint_format: str
    """A key of `ZERO_OFFSET`."""

    def specs(self, module: str, info: WeightInfo) -> tuple[TensorSpec, ...]:
        """The tensors by their full names, from the header alone."""
        rows, columns, groups = info.out_features, info.in_features, info.groups
        found = (
            ("I32", (columns * self.width // 32, rows)),
            ("I32", (groups, rows * self.width // 32)),
            ("F16", (groups, rows)),
            ("I32", (columns,)),
        )
        return tuple(
            TensorSpec(name=f"{module}.{suffix}", dtype=dtype, shape=shape)
            for suffix, (dtype, shape) in zip(SUFFIXES, found, strict=True)
        )

    def pack(self, module: str, weight: PackedWeight) -> Arrays:
        """Their values; qweight in pieces."""
        wide = widen_packed(weight, self.width)
        yield f"{module}.g_idx", _group_index(wide.in_features, wide.group_size)  # the file's order: hashed as it comes
        for piece in transposed_words(as_words(wide.packed)):
            yield f"{module}.qweight", piece.view(np.int32)
        zeros = encode_zeros(wide.integer_zeros(), self.width, self.checkpoint_format)
        yield f"{module}.qzeros", pack_cols(np.ascontiguousarray(zeros.T), self.width)
        yield f"{module}.scales", np.ascontiguousarray(wide.scales.T)


def quantization_config(checkpoint: L4QCheckpoint, options: ExportOptions) -> dict[str, Any]:
    """The quantization_config section that vLLM, GPTQModel and transformers read."""
    symmetric = is_symmetric(checkpoint)
    producers = [f"l4q:{__version__}"]
    if not symmetric:
        producers.append(V1_ASYMMETRIC_PROMISE)
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": container_bits(checkpoint, options),
        "group_size": group_sizes(checkpoint)[0],
        "desc_act": False,
        "sym": symmetric,
        "lm_head": HEAD in checkpoint.modules,
        "checkpoint_format": options.gptq_format,
        "pack_dtype": "int32",
        "meta": {"quantizer": producers},
    }
    rules = dynamic_rules(checkpoint)
    if rules:
        section["dynamic"] = rules  # GPTQModel and vLLM
    if skipped_linears(checkpoint):
        section["modules_in_block_to_quantize"] = [list(checkpoint.modules)]  # transformers, and vLLM too
    return section


def read_back(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, F32]]:
    """Decode every GPTQ module, or those of `only`, with compressed-tensors' bit decoder: (module, float32 [out, in]).

    value = (q - z) * s with z as stored, because GPTQModel and transformers read qzeros; vLLM instead trusts `sym` and
    ignores qzeros and g_idx. A folder on which the two would disagree is refused.

    Raises:
        VerificationError: qzeros contradict `sym`, g_idx is not k // group_size, or quantize_config.json says something
            else than config.json.
        UsageError: The config is not GPTQ, or no compressed-tensors that knows its fields is installed.
    """
    section = read_section(folder, "gptq", "a GPTQ")
    _check_legacy(folder, section)
    if needs_newer_judge(int(section["bits"])):
        yield from read_elsewhere("gptq", folder, only)
        return
    shards = ShardReader.open(folder)
    for module in packed_modules(shards.names, ".qweight", only):
        yield module, _decode(module, shards, section)


def _check_legacy(folder: Path, section: dict[str, Any]) -> None:
    """GPTQModel reads quantize_config.json first, everybody else config.json: both must say the same."""
    path = folder / LEGACY_CONFIG_NAME
    if not path.exists():
        return
    legacy = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in {*section, *legacy} if section.get(key) != legacy.get(key))
    if differing:
        raise VerificationError(
            "quantize_config.json contradicts config.json, and readers differ in which they take",
            where=path,
            got={key: legacy.get(key) for key in differing},
            expected={key: section.get(key) for key in differing},
        )


def _decode(module: str, shards: ShardReader, section: dict[str, Any]) -> F32:
    missing = [name for name in (f"{module}.{suffix}" for suffix in SUFFIXES) if name not in shards.names]
    if missing:
        raise VerificationError("a quantized module is incomplete", where=module, got=f"no {missing}")
    qweight, qzeros, scales, g_idx = (shards.tensor(f"{module}.{suffix}") for suffix in SUFFIXES)
    bits, columns = int(section["bits"]), int(scales.shape[1])
    rows = qweight.shape[0] * 32 // bits
    stated = stated_group_size(module, section)
    if stated is None:
        raise VerificationError("the config's dynamic rules say that a quantized module is dense", where=module)
    group_size = rows if stated == -1 else stated
    shapes = {"scales": (rows // group_size, columns), "qzeros": (rows // group_size, columns * bits // 32)}
    found = {"scales": tuple(scales.shape), "qzeros": tuple(qzeros.shape)}
    if found != shapes:
        raise VerificationError("the tensors of a module disagree in shape", where=module, got=found, expected=shapes)
    if not np.array_equal(g_idx.numpy(), _group_index(rows, group_size)):
        raise VerificationError("g_idx is not k // group_size although desc_act is false", where=f"{module}.g_idx")
    codes = _foreign_unpack(qweight, bits, (rows, columns), 0)  # [K, N]
    stored = _foreign_unpack(qzeros, bits, (scales.shape[0], columns), 1)  # [G, N]
    zeros = (stored + ZERO_OFFSET[section["checkpoint_format"]]) % (1 << bits)
    if section["sym"] and bool((zeros != 1 << (bits - 1)).any()):
        raise VerificationError(
            "the config says sym: true, but a zero-point is not the midpoint",
            where=f"{module}.qzeros",
            got=sorted(set(zeros.ravel().tolist())),
            expected=1 << (bits - 1),
        )
    groups = np.repeat(np.arange(scales.shape[0]), group_size)  # [K]
    offsets = (codes - zeros[groups]).astype(np.float32)  # [K, N]
    return np.ascontiguousarray((offsets * scales.numpy().astype(np.float32)[groups]).T)


def _foreign_unpack(words: torch.Tensor, bits: int, shape: tuple[int, int], axis: int) -> np.ndarray[Any, Any]:
    """Unsigned codes as int16; compressed-tensors returns them signed, lowered by 2**(bits-1)."""
    import torch

    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    except ImportError as error:
        raise missing_judge("a GPTQ", error) from error
    signed: np.ndarray[Any, Any] = unpack_from_int32(words, bits, torch.Size(shape), packed_dim=axis).numpy()
    return signed.astype(np.int16) + (1 << (bits - 1))


def _group_index(columns: int, group_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return (np.arange(columns) // group_size).astype(np.int32)
