"""Models beyond 2 GB: what one protobuf may hold. Weights stream to the data file, offsets go beyond 31 bits."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_tensor

import exporters.onnx as onnx_exporter
from exporters.onnx.pack import pack_linear
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.architectures import wrong_modules
from runtime_tests.onnx_models import Case, export_onnx, make_checkpoint, open_session, run_session
from tools.bench_onnx import measured, private_peak

LIMIT = 2**31
"""Bytes one protobuf message may have."""
PAGE = 4096
LAYERS = 12
WIDE = Case(
    changes={"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 16, "num_hidden_layers": LAYERS},
    quant=QuantConfig(bits=4, group_size=64, zero_point="integer"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """Many equal layers, none of them large."""
    return make_checkpoint(WIDE, tmp_path_factory.mktemp("large") / "checkpoint")


@pytest.fixture(scope="module")
def folder(checkpoint: L4QCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export; do not write into it."""
    return export_onnx(checkpoint, tmp_path_factory.mktemp("large-onnx") / "onnx")


def places(model: onnx.ModelProto) -> list[tuple[int, int, onnx.TensorProto]]:
    """(offset, length, tensor) of everything in the data file, by offset."""
    found = []
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found.append((int(entries["offset"]), int(entries["length"]), tensor))
    return sorted(found, key=lambda place: place[0])


def faults(found: list[tuple[int, int, onnx.TensorProto]], size: int) -> list[str]:
    """What is wrong with the layout of a data file of `size` bytes."""
    wrong = []
    end = 0
    for offset, length, tensor in found:
        elements = int(np.prod(tensor.dims))
        bits = 4 if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 32
        if offset < end:
            wrong.append(f"{tensor.name} overlaps")
        if length != (elements * bits + 7) // 8:
            wrong.append(f"{tensor.name} has {length} bytes")
        end = offset + length
    if end != size:
        wrong.append(f"the file has {size} bytes, the last tensor ends at {end}")
    return wrong


def test_the_protobuf_stays_small_and_the_data_file_is_whole(folder: Path, checkpoint: L4QCheckpoint) -> None:
    """No weight lives in model.onnx; places do not overlap, have their tensor's length, and end where the file ends."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    size = (folder / "model.onnx.data").stat().st_size
    found = places(model)
    assert faults(found, size) == []
    assert {f"{module}.weight" for module in checkpoint.modules} <= {tensor.name for _, _, tensor in found}
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) <= 256
    assert (folder / "model.onnx").stat().st_size < size / 20
    moved = [(offset - PAGE if index == 5 else offset, length, t) for index, (offset, length, t) in enumerate(found)]
    assert faults(moved, size)
    assert faults(found[:-1], size)
    assert faults(found, size + 1)


def traced_peak(work: Callable[[], object]) -> int:
    """Largest sum of Python and numpy allocations during `work`."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_one_weight_is_in_memory_at_a_time(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Writing needs a fraction of the data file; holding all packed weights, as a protobuf would, needs all of it."""
    export_onnx(checkpoint, tmp_path / "warm")  # imports and caches are not the writer's
    peak = traced_peak(lambda: export_onnx(checkpoint, tmp_path / "onnx"))
    size = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert peak < size / 3
    held = traced_peak(lambda: [pack_linear(checkpoint.quantized(module), 64) for module in checkpoint.modules])
    assert held > 0.9 * size


def test_reading_back_frees_each_weight(folder: Path, checkpoint: L4QCheckpoint) -> None:
    """Decoding in onnx's evaluator, which refers to itself, holds no weight once the next is read."""
    size = (folder / "model.onnx.data").stat().st_size
    assert traced_peak(lambda: [module for module, _ in onnx_exporter.read_back(folder)]) < size
    assert traced_peak(lambda: list(onnx_exporter.read_back(folder))) > 4 * size  # float32 for 4 bits


def beyond_the_limit(folder: Path, target: Path) -> list[tuple[int, int, onnx.TensorProto]]:
    """A copy whose data lie behind a hole of 2 GB, which takes no disk: every offset needs more than 31 bits."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + LIMIT + PAGE)
    target.mkdir()
    onnx.save(model, target / "model.onnx")
    with (target / "model.onnx.data").open("wb") as file:
        file.seek(LIMIT + PAGE)
        file.write((folder / "model.onnx.data").read_bytes())
    return places(model)


def test_readers_follow_offsets_beyond_two_gigabytes(folder: Path, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """onnx decodes and ONNX Runtime computes the same from behind a 2 GB hole; one page off gives other bytes."""
    found = beyond_the_limit(folder, tmp_path / "far")
    assert min(offset for offset, _, _ in found) > LIMIT
    assert wrong_modules(checkpoint, onnx_exporter, tmp_path / "far") == ()
    ids = np.arange(3, 20)[None]
    near, far = (run_session(open_session(path), ids, np.ones_like(ids))[0] for path in (folder, tmp_path / "far"))
    assert np.array_equal(near, far)
    weights = next(tensor for _, _, tensor in found if tensor.name == f"{checkpoint.modules[3]}.weight")
    right = onnx.TensorProto()
    right.CopyFrom(weights)
    load_external_data_for_tensor(right, str(tmp_path / "far"))
    next(entry for entry in weights.external_data if entry.key == "offset").value = str(LIMIT)
    load_external_data_for_tensor(weights, str(tmp_path / "far"))
    assert weights.raw_data != right.raw_data


def held_and_freed() -> tuple[int, int]:
    """Growth of the benchmark's figure over a block that holds nothing and one that holds 64 MiB for a while."""
    with private_peak(0.001) as quiet:
        pass
    with private_peak(0.001) as idle:
        time.sleep(0.3)
    with private_peak(0.001) as loud:
        held = np.ones(64 * 2**20, np.uint8)
        time.sleep(0.3)  # the sampler is a thread, and the machine may be busy
        del held
    return idle[0] - quiet[0], loud[0] - quiet[0]


def test_private_peak_sees_what_was_held_and_freed() -> None:
    """The benchmark's memory figure contains an array that lived inside the block."""
    idle, loud = measured(held_and_freed)
    assert idle < 20 * 2**20
    assert loud > 50 * 2**20
