"""What every peer of tools.bench_export is given, and the clock that runs while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from l4q.checkpoint import L4QCheckpoint
from l4q.weight import QuantizedWeight

GGUF_TYPE = "Q4_0"


class Sample:
    """Some modules of a checkpoint, read one after another and counted.

    Args:
        checkpoint: The source.
        modules: Their names.
    """

    def __init__(self, checkpoint: L4QCheckpoint, modules: list[str]) -> None:
        self.checkpoint = checkpoint
        self.modules = modules
        self.weights = 0
        """Weights that the peer's time stands for."""

    def __iter__(self) -> Iterator[tuple[str, QuantizedWeight]]:
        for module in self.modules:
            weight = self.checkpoint.quantized(module)
            self.weights += weight.codes.size
            yield module, weight


class Clock:
    """Adds up the seconds spent inside its blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def float_linear(weight: QuantizedWeight) -> tuple[Any, Any, Any]:
    """What packers start from: a Linear of float32 weights, float32 scales and zero-points [out, groups]."""
    import torch

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(torch.from_numpy(weight.dequantize()), requires_grad=False)
    scales = torch.from_numpy(weight.scales.astype(np.float32))
    zeros = torch.from_numpy(weight.integer_zeros().astype(np.float32))
    return linear, scales, zeros


def save_tensors(tensors: Mapping[str, Any], out: Path, clock: Clock) -> None:
    """Write model.safetensors, on the clock."""
    from safetensors.torch import save_file

    with clock.running():
        save_file(dict(tensors), out / "model.safetensors")


def write_gguf(sample: Sample, out: Path, clock: Clock, quantize: Callable[[QuantizedWeight], np.ndarray]) -> None:
    """Quantize each module and write model.gguf, on the clock."""
    import gguf

    writer = gguf.GGUFWriter(out / "model.gguf", "llama")
    for module, weight in sample:
        with clock.running():
            writer.add_tensor(module, quantize(weight), raw_dtype=gguf.GGMLQuantizationType[GGUF_TYPE])
    with clock.running():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
