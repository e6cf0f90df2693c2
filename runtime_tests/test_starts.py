"""Pre-quantized starts: read as foreign decoders read them, taken over bit for bit, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

from exporters import gptq as gptq_exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.init import Start
from l4q.quant import grid_params
from l4q.starts.gguf_blocks import LINEAR_TYPES, integer_points
from l4q.starts.grid import LinearGrid
from l4q.starts.match import match_grid
from l4q.starts.stream import unpack_words
from runtime_tests import start_files as files
from runtime_tests.tiny_llama import tiny_checkpoint

KINDS = ("none", "integer")


def values_of(start: Any, module: str) -> np.ndarray:
    """What the reader makes of a module."""
    return start.grid(module).dequantize().numpy()


def wrong_modules(start: Any, checkpoint: L4QCheckpoint) -> list[str]:
    """Modules whose bits differ from those the folder was made from."""
    return [
        module
        for module in checkpoint.modules
        if not np.array_equal(
            values_of(start, module).view(np.uint32), checkpoint.quantized(module).dequantize().view(np.uint32)
        )
    ]


def shift(name: str, by: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """An edit that adds a number to one 16-bit word of a tensor."""
    return lambda tensors: tensors[name].view(torch.int16)[0, 3].add_(by)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("kind", "group_size"), [("none", 64), ("integer", 32), ("integer", -1)])
def test_gptq_is_read_as_by_compressed_tensors(
    tmp_path: Path, kind: str, group_size: int, checkpoint_format: str
) -> None:
    """Every module equals what compressed-tensors' decoder makes of it; a changed nibble, zero or scale is noticed."""
    checkpoint = files.gptq_folder(tmp_path, files.fp16_grid(zero_point=kind, group_size=group_size), checkpoint_format)
    folder, module = tmp_path / "model", checkpoint.modules[3]
    start = files.opened(folder)
    foreign = dict(gptq_exporter.read_back(folder))
    assert set(start.modules()) == set(foreign) == set(checkpoint.modules)
    assert all(np.array_equal(values_of(start, name), foreign[name]) for name in foreign)
    for part in ("qweight", "scales", *(("qzeros",) if kind == "integer" else ())):
        files.edit_tensors(folder, shift(f"{module}.{part}", 16))
        assert wrong_modules(files.opened(folder), checkpoint) == [module]
        files.edit_tensors(folder, shift(f"{module}.{part}", -16))
    assert wrong_modules(files.opened(folder), checkpoint) == []


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_with_three_bits(tmp_path: Path, kind: str) -> None:
    """Dense 3-bit GPTQ is read exactly; Python's integers decode the same words alike."""
    checkpoint = tiny_checkpoint(tmp_path, files.fp16_grid(bits=3, zero_point=kind, group_size=64))
    section = {"quant_method": "gptq", "bits": 3, "group_size": 64, "desc_act": False, "sym": kind == "none"}
    folder = files.packed_folder(tmp_path / "gptq", checkpoint, section, files.gptq_parts)
    assert wrong_modules(files.opened(folder), checkpoint) == []
    weight = checkpoint.quantized(checkpoint.modules[0])
    codes, words = weight.codes, files.dense_words(weight.codes, 3)
    assert torch.equal(words.T, files.gptq_parts(weight)["qweight"])
    assert np.array_equal(unpack_words(words, codes.shape[1], 3, "test").numpy(), codes)
    words[1, 0] ^= 1 << 31
    assert not np.array_equal(unpack_words(words, codes.shape[1], 3, "test").numpy(), codes)


@pytest.mark.parametrize(("kind", "group_size"), [("none", 64), ("integer", 32), ("integer", -1), ("none", -1)])
def test_compressed_tensors_is_read_as_by_its_own_decoder(tmp_path: Path, kind: str, group_size: int) -> None:
    """Folders packed by compressed-tensors, symmetric and not, groups and channels, are read back exactly."""
    checkpoint = tiny_checkpoint(tmp_path, files.fp16_grid(zero_point=kind, group_size=group_size))
    strategy = {"strategy": "channel", "group_size": None} if group_size == -1 else {"strategy": "group"}
    section = files.ct_section({"num_bits": 4, "symmetric": kind == "none", "group_size": group_size, **strategy})
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.ct_parts)
    start, module = files.opened(folder), checkpoint.modules[2]
    assert wrong_modules(start, checkpoint) == []
    parts = files.ct_parts(checkpoint.quantized(module))
    foreign = unpack_from_int32(parts["weight_packed"], 4, torch.Size(checkpoint.quantized(module).shape))
    assert torch.equal(start.grid(module).codes.to(torch.int8) - 8, foreign)
    files.edit_tensors(folder, lambda tensors: tensors[f"{module}.weight_packed"][1, 1].add_(1 << 8))
    assert wrong_modules(files.opened(folder), checkpoint) == [module]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_with_three_bits_and_several_groups(tmp_path: Path, kind: str) -> None:
    """Dense 3-bit words, a pattern that overrides "Linear", and bfloat16 scales."""
    checkpoint = tiny_checkpoint(tmp_path, files.fp16_grid(bits=3, zero_point=kind, group_size=32))
    weights = {"num_bits": 3, "symmetric": kind == "none", "strategy": "group", "group_size": 32, "type": "int"}
    groups = {
        "wide": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4}},
        "narrow": {"targets": ["re:.*_proj$"], "weights": weights},
    }
    section = files.ct_section({}, config_groups=groups)
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.dense_ct_parts)
    assert wrong_modules(files.opened(folder), checkpoint) == []
    module = checkpoint.modules[0]
    files.edit_tensors(
        folder, lambda t: t.update({f"{module}.weight_scale": t[f"{module}.weight_scale"].to(torch.bfloat16)})
    )
    grid = files.opened(folder).grid(module)
    assert torch.equal(grid.scales, torch.from_numpy(checkpoint.quantized(module).scales).to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", KINDS)
def test_awq_is_read_as_by_compressed_tensors(tmp_path: Path, kind: str) -> None:
    """Codes, scales and zero-points equal those of compressed-tensors' AutoAWQ converter; a nibble swap is noticed."""
    checkpoint = tiny_checkpoint(tmp_path, files.fp16_grid(zero_point=kind, group_size=32))
    section = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": kind == "integer", "version": "gemm"}
    folder = files.packed_folder(tmp_path / "awq", checkpoint, section, files.awq_parts)
    start, module = files.opened(folder), checkpoint.modules[5]
    assert wrong_modules(start, checkpoint) == []
    parts = files.awq_parts(checkpoint.quantized(module))
    codes, scales, zeros = AutoAWQConverter(group_size=32)._convert_gemm_module(
        parts["qweight"], parts["scales"], parts["qzeros"]
    )
    assert zeros is not None
    spread = [part.float().repeat_interleave(32, dim=1) for part in (zeros, scales)]
    assert np.array_equal(values_of(start, module), ((codes.float() - spread[0]) * spread[1]).numpy())
    files.edit_tensors(folder, lambda tensors: tensors[f"{module}.qweight"][0, 0].bitwise_xor_(0x11))
    assert wrong_modules(files.opened(folder), checkpoint) == [module]


def block_grid(kind: str, values: np.ndarray) -> tuple[LinearGrid, np.ndarray]:
    """gguf's own blocks of some values: the grid read from them, and gguf's dequantization."""
    number = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, number)
    bits, read = LINEAR_TYPES[kind]
    codes, scales, mins = (None if part is None else torch.from_numpy(part) for part in read(data))
    assert codes is not None
    assert scales is not None
    points = None if mins is None else integer_points(scales, mins, 15)
    grid = LinearGrid.build(codes, scales, points, mins if points is None else None, bits=bits, where=kind)
    return grid, gguf.quants.dequantize(data, number)


@pytest.mark.parametrize(("kind", "fits"), [("Q4_0", "integer"), ("Q4_1", "float"), ("Q8_0", None)])
def test_gguf_blocks_are_read_as_by_gguf(kind: str, fits: str | None) -> None:
    """Blocks quantized by gguf, zero blocks included, give gguf's own values (zero's sign aside) and fit their grid."""
    values = (np.random.default_rng(1).standard_normal((40, 96)) * 0.1).astype(np.float32)
    values[3, 32:64] = 0
    grid, foreign = block_grid(kind, values)
    assert np.array_equal(grid.dequantize().numpy(), foreign)
    if fits is None:
        assert isinstance(match_grid(grid, files.fp16_grid(group_size=32)), str)
        return
    quant = files.fp16_grid(group_size=32, zero_point=fits)
    found = match_grid(grid, quant)
    assert isinstance(found, Start)
    params = grid_params(*found, quant)
    again = grid.codes.view(40, 3, 32) * params.scales.unsqueeze(-1) + params.mins.unsqueeze(-1)
    assert np.array_equal(again.view(40, 96).numpy(), foreign)
    narrower = "none" if fits == "integer" else "integer"
    assert f"--zero-point {fits}" in str(match_grid(grid, files.fp16_grid(group_size=32, zero_point=narrower)))
    grid.codes[0, 0] ^= 1
    assert not np.array_equal(grid.dequantize().numpy(), foreign)
