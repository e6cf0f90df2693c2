"""Pre-quantized models for tests, written with other people's packers where there are any."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from exporters.gptq.write import Packing
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.packed_weight import PackedWeight
from l4q.starts import open_start
from l4q.weight import QuantizedWeight
from runtime_tests.gguf_requantize import requantize
from runtime_tests.random_models import LINEARS
from runtime_tests.tiny_llama import export_gptq, tiny_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SPECIAL = "<|end|>"

Pack = Callable[[QuantizedWeight], dict[str, torch.Tensor]]


def gptq_folder(folder: Path, quant: QuantConfig, checkpoint_format: str = "gptq", **changes: Any) -> L4QCheckpoint:
    """folder/model: our own export, which foreign decoders verify elsewhere; returns what it was made from."""
    checkpoint = tiny_checkpoint(folder, quant, **changes)
    export_gptq(checkpoint, folder / "model", gptq_format=checkpoint_format)
    return checkpoint


def packed_folder(folder: Path, checkpoint: L4QCheckpoint, section: dict[str, Any], pack: Pack) -> Path:
    """A folder with `section` as its quantization config and every linear packed by `pack`."""
    tensors = {name: checkpoint.dense(name) for name in checkpoint.dense_names}
    for module in checkpoint.modules:
        parts = pack(checkpoint.quantized(module))
        tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "quantization_config": section}))
    return folder


def ct_section(weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A compressed-tensors quantization config of one group."""
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {**section, **changes}


def ct_parts(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """compressed-tensors' own packer at 4 bits; its API takes values lowered by 2**(bits-1)."""
    middle = 1 << (weight.bits - 1)
    parts = {
        "weight_packed": pack_to_int32(torch.from_numpy(weight.codes.astype(np.int8) - middle), weight.bits),
        "weight_scale": torch.from_numpy(weight.scales),
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        lowered = torch.from_numpy(weight.zeros.astype(np.int8) - middle)
        parts["weight_zero_point"] = pack_to_int32(lowered, weight.bits, packed_dim=0)
    return parts


def dense_words(values: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of values as int32 words of one little-endian bit stream, by Python's own integers."""
    words = -(-values.shape[1] * bits // 32)
    rows = []
    for row in values.tolist():
        number = sum(value << bits * k for k, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def dense_ct_parts(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """As `ct_parts` with dense words, for the 3 bits that compressed-tensors 0.17 packs otherwise than vLLM reads."""
    parts = {
        "weight_packed": dense_words(weight.codes, weight.bits),
        "weight_scale": torch.from_numpy(weight.scales),
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        parts["weight_zero_point"] = dense_words(np.ascontiguousarray(weight.zeros.T), weight.bits).T
    return parts


def gptq_parts(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """GPTQ v1 tensors at any number of bits; the export command writes 4-bit folders only."""
    packing = Packing(width=weight.bits, checkpoint_format="gptq")
    arrays = packing.pack("m", PackedWeight.of(weight))
    return {name.removeprefix("m."): torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays}


def awq_parts(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """AWQ gemm tensors."""

    def pack(values: np.ndarray) -> torch.Tensor:
        runs = values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)].astype(np.uint32)
        words = np.bitwise_or.reduce(runs << np.arange(0, 32, 4, dtype=np.uint32), axis=-1, dtype=np.uint32)
        return torch.from_numpy(words.view(np.int32))

    return {
        "qweight": pack(np.ascontiguousarray(weight.codes.T)),
        "qzeros": pack(np.ascontiguousarray(weight.integer_zeros().T)),
        "scales": torch.from_numpy(np.ascontiguousarray(weight.scales.T)),
    }


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder's only shard in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_section(folder: Path, **changes: Any) -> None:
    """Change a folder's quantization config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Give a folder another model's tokenizer."""
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)


def byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with SmolLM2's splitting and a merge that only shows if digits are not split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([SPECIAL, *alphabet, "ĠĠ", "12"])}
    digits = {"type": "Digits", "individual_digits": True}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    no_edges = {"single_word": False, "lstrip": False, "rstrip": False}
    content = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": tokens, "merges": [["Ġ", "Ġ"], ["1", "2"]]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, letters]},
        "decoder": letters,
        "added_tokens": [{"id": 0, "content": SPECIAL, "special": True, "normalized": False, **no_edges}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"eos_token": SPECIAL, "bos_token": SPECIAL, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256})
    )


def requantized(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Copy an F32 GGUF file with its linears quantized by the gguf package."""
    requantize(source, target, kind.name)
    return target


def is_linear(name: str) -> bool:
    """Whether a module is one of a block's linears."""
    return name.endswith(LINEARS)


def opened(path: Path) -> Any:
    """The start at a path, which must be one."""
    start = open_start(str(path))
    assert start is not None
    return start


def fp16_grid(**grid: Any) -> QuantConfig:
    """A grid whose scales may be any fp16 number, as those of random weights are."""
    return QuantConfig(**{"scale_grid": "fp16", **grid})


def hub_cache(folder: Path, name: str, cache: Path) -> Path:
    """Put a model folder where the hub's client keeps what it has downloaded; the folder there."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / revision
    shutil.copytree(folder, snapshot, symlinks=True, copy_function=_copy_or_link)
    (place / "blobs").mkdir()
    for path in sorted(file for file in snapshot.rglob("*") if file.is_file() and not file.is_symlink()):
        blob = place / "blobs" / path.relative_to(snapshot).as_posix().replace("/", "-")
        path.rename(blob)
        path.symlink_to(Path(os.path.relpath(blob, path.parent)))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    return snapshot


def _copy_or_link(source: str, target: str) -> None:
    if Path(source).is_file():
        shutil.copy2(source, target)
    else:
        os.link(source, target)  # a pipe
