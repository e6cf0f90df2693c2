"""Sources for l4q-import's tests, and ways to compare what it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.importing import ImportOptions, import_model
from l4q.weight import QuantizedWeight
from runtime_tests import start_files as files
from runtime_tests.gguf_models import make_checkpoint as gguf_checkpoint

UP = "model.layers.0.mlp.up_proj"


def make_source(folder: Path, grid: dict[str, Any], **changes: Any) -> L4QCheckpoint:
    """A random llama on a grid, with a tokenizer."""
    checkpoint = gguf_checkpoint(folder / "l4q", QuantConfig(**grid), **changes)
    files.byte_tokenizer(checkpoint.path)
    return checkpoint


def exported(checkpoint: L4QCheckpoint, name: str, folder: Path, **options: Any) -> Path:
    """An export, and the path that l4q-import takes."""
    export(checkpoint, name, folder, ExportOptions(**options))
    return next(folder.glob("*.gguf"), folder)


def imported(source: Path, out: Path, **options: Any) -> L4QCheckpoint:
    """The checkpoint l4q-import makes of a source."""
    import_model(ImportOptions(source=str(source), out=out, **options))
    return L4QCheckpoint.open(out)


def parts(weight: QuantizedWeight) -> list[np.ndarray]:
    """Everything a weight consists of."""
    return [part for part in (weight.codes, weight.scales, weight.zeros, weight.mins) if part is not None]


def differing(left: L4QCheckpoint, right: L4QCheckpoint) -> list[str]:
    """Modules whose integers, zero-points, scales or mins differ."""
    assert left.modules == right.modules
    pairs = {name: (parts(left.quantized(name)), parts(right.quantized(name))) for name in left.modules}
    return [
        name
        for name, (a, b) in pairs.items()
        if len(a) != len(b) or any(x.dtype != y.dtype or not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    ]


def same_values(checkpoint: L4QCheckpoint, expected: dict[str, np.ndarray]) -> bool:
    """Whether every module of a checkpoint dequantizes to the expected values (the sign of a zero aside)."""
    return set(expected) == set(checkpoint.modules) and all(
        np.array_equal(checkpoint.quantized(name).dequantize(), values) for name, values in expected.items()
    )


def flip(source: Path) -> None:
    """One bit of one module."""
    if source.is_dir():
        name = "weight_packed" if (source / "config.json").read_text().count("pack-quantized") else "qweight"
        files.edit_tensors(source, lambda tensors: tensors[f"{UP}.{name}"].view(torch.int32)[0, 1].bitwise_xor_(1 << 9))
        return
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.0.ffn_up.weight")
    data = bytearray(source.read_bytes())
    data[int(tensor.data_offset) + 7] ^= 0x10
    source.write_bytes(data)


def tensors_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes by name, of a folder or a GGUF file."""
    if path.is_file():
        return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    tensors = load_file(path / "model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def gptq_source(folder: Path, bits: int = 4, **changes: Any) -> tuple[L4QCheckpoint, Path]:
    """A random llama and its GPTQ folder, bits from one to the other through our packer at any number of bits."""
    origin = make_source(folder, {"zero_point": "integer", "group_size": 32, "bits": bits}, **changes)
    section = {"quant_method": "gptq", "bits": origin.quant.bits, "group_size": 32, "desc_act": False, "sym": False}
    source = files.packed_folder(folder / "gptq", origin, section, files.gptq_parts)
    files.copy_tokenizer(origin.path, source)
    return origin, source


def reorder(source: Path) -> None:
    """Activation order: the columns of a module dealt out to its groups at random."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(96) // 32).astype(np.int32))
    files.edit_tensors(source, lambda tensors: tensors.update({f"{UP}.g_idx": order}))
