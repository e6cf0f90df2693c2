"""auto-round as a peer of tools.bench_export: its packers alone, and its whole command at iters 0."""

from __future__ import annotations

import shutil
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from l4q.errors import UsageError
from l4q.weight import QuantizedWeight
from tools.bench_export_sample import GGUF_TYPE, Clock, Sample, float_linear, save_tensors, write_gguf
from tools.bench_float import layer_of, write_float

GROUP, BLOCK = 64, 32


def autoround_gptq(sample: Sample, out: Path, clock: Clock) -> None:
    """auto-round's GPTQ packer, as its export_to_autogptq calls it on symmetric layers."""
    import torch

    kind = import_module("auto_round_extension.torch.qlinear_torch_zp").QuantLinear
    tensors: dict[str, Any] = {}
    for module, weight in sample:
        linear, scales, zeros = float_linear(weight)
        with clock.running(), torch.inference_mode():
            layer = kind(weight.bits, weight.group_size, *reversed(weight.shape), False, g_idx=True)
            layer.pack(linear, scales, int(zeros[0, 0]), None, "cpu")
            tensors |= {f"{module}.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_tensors(tensors, out, clock)


def autoround_gguf(sample: Sample, out: Path, clock: Clock) -> None:
    """auto-round's Q4_0 packer with gguf-py's writer."""
    import torch

    ggml_quant = import_module("auto_round.export.export_to_gguf.packing").ggml_quant

    def quantize(weight: QuantizedWeight) -> np.ndarray:
        return np.asarray(ggml_quant(torch.from_numpy(weight.dequantize()), GGUF_TYPE.lower(), device="cpu"))

    write_gguf(sample, out, clock, quantize)


def autoround_gptq_command(sample: Sample, out: Path, clock: Clock) -> None:
    """auto-round's whole `auto_gptq` export at iters 0."""
    _command("auto_gptq", GROUP, sample, out, clock)


def autoround_gguf_command(sample: Sample, out: Path, clock: Clock) -> None:
    """auto-round's whole `gguf:q4_0` export at iters 0."""
    _command("gguf:q4_0", BLOCK, sample, out, clock)


def _command(form: str, group: int, sample: Sample, out: Path, clock: Clock) -> None:
    """Load, round to nearest, pack and save.

    What does not grow with the layers (embeddings, tokenizer) is taken out: the time of a model of one layer is
    subtracted, if there are more. A first run of one layer, which imports and compiles, is not counted.

    Raises:
        UsageError: The layers took no measurable time.
    """
    layers = 1 + max(layer_of(module) for module in sample.modules)
    per_layer = sum(weight.codes.size for _, weight in sample) // layers
    seconds = []
    for count in (1, *sorted({1, layers})):
        source = out / f"float-{count}"
        write_float(sample.checkpoint, source, dtype="bfloat16", layers=count)
        began = time.perf_counter()
        _autoround(source, out / f"saved-{count}", form, group)
        seconds.append(time.perf_counter() - began)
        shutil.rmtree(source)
        shutil.rmtree(out / f"saved-{count}")
    clock.seconds = seconds[-1] - (seconds[1] if layers > 1 else 0.0)
    if clock.seconds <= 0:
        raise UsageError("the layers took no measurable time", got=seconds, remedy="raise --peer-layers")
    sample.weights = per_layer * max(layers - 1, 1)


def _autoround(source: Path, out: Path, form: str, group: int) -> None:
    rounding = import_module("auto_round").AutoRound(
        str(source),
        bits=4,
        group_size=group,
        sym=True,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(out), format=form)
