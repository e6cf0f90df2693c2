"""What other people's code needs to write the same linears; tools.bench_export times it in turns with ours.

Each peer gets the modules of a checkpoint one after another. On the clock is what it does with them; reading the
checkpoint and, for packers, making the float weights they start from are not, and neither are dense tensors. All that
is in the peer's favour. Every function runs in a process that has imported nothing else; gptqmodel and auto-round come
from folders of their own (tools.fetch_judges, tools.fetch_peers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from l4q.checkpoint import L4QCheckpoint
from l4q.weight import QuantizedWeight
from tools.bench_export_autoround import (
    autoround_gguf,
    autoround_gguf_command,
    autoround_gptq,
    autoround_gptq_command,
)
from tools.bench_export_sample import GGUF_TYPE, Clock, Sample, float_linear, save_tensors, write_gguf

V1_OFFSET = 0x11111111
"""GPTQModel packs z and stores z - 1 in eight 4-bit fields (utils/model.py, convert_gptq_v2_to_v1_format_module)."""


PeerWork = Callable[[Sample, Path, Clock], None]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody else's way to one format."""

    format: str
    name: str
    work: PeerWork
    folder: str | None = None
    """Folder below build/ that holds its packages; None when the environment has them."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of its process."""
    quick: bool = True
    """Whether --quick measures it."""
    warm: bool = True
    """Whether it first writes a layer of the tiny model, off the clock."""


def gptqmodel_gptq(sample: Sample, out: Path, clock: Clock) -> None:
    """GPTQModel's packer, `pack_block`: its choice on a CPU (utils/model.py, _auto_pack_impl)."""
    import torch

    tensors: dict[str, Any] = {}
    for module, weight in sample:
        linear, scales, zeros = float_linear(weight)
        layer = _gptqmodel_layer("torch", "TorchLinear", weight)
        with clock.running(), torch.inference_mode():
            group_index = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size
            layer.pack_block(linear=linear, scales=scales, zeros=zeros.to(torch.int32), g_idx=group_index)
            layer.qzeros -= V1_OFFSET
            tensors |= {f"{module}.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_tensors(tensors, out, clock)


def gptqmodel_awq(sample: Sample, out: Path, clock: Clock) -> None:
    """GPTQModel's AWQ packer in torch; the others need CUDA."""
    import torch

    tensors: dict[str, Any] = {}
    for module, weight in sample:
        linear, scales, zeros = float_linear(weight)
        layer = _gptqmodel_layer("torch_awq", "AwqTorchLinear", weight)
        with clock.running(), torch.inference_mode():
            layer.pack(linear=linear, scales=scales, zeros=zeros)
            tensors |= {f"{module}.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_tensors(tensors, out, clock)


def _gptqmodel_layer(file: str, name: str, weight: QuantizedWeight) -> Any:
    kind = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{file}"), name)
    out_features, in_features = weight.shape
    return kind(
        bits=weight.bits,
        group_size=weight.group_size,
        sym=True,
        desc_act=False,
        in_features=in_features,
        out_features=out_features,
        register_buffers=False,
    )


def gguf_py(sample: Sample, out: Path, clock: Clock) -> None:
    """Dequantize, then gguf-py's `quantize` and writer."""
    import gguf

    kind = gguf.GGMLQuantizationType[GGUF_TYPE]
    write_gguf(sample, out, clock, lambda weight: gguf.quantize(weight.dequantize(), kind))


def llama_cpp(sample: Sample, out: Path, clock: Clock) -> None:
    """Dequantize, then llama.cpp's own quantizer in C, and gguf-py's writer."""
    from runtime_tests.engines.ggml_rows import quantize_rows

    write_gguf(sample, out, clock, lambda weight: quantize_rows(weight.dequantize(), GGUF_TYPE))


def compressed_tensors(sample: Sample, out: Path, clock: Clock) -> None:
    """compressed-tensors' own compressor (quantize and pack), as llm-compressor calls it."""
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors: dict[str, Any] = {}
    for module, weight in sample:
        linear, scales, _ = float_linear(weight)
        arguments = QuantizationArgs(
            num_bits=weight.bits, type="int", strategy="group", group_size=weight.group_size, symmetric=True
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        with clock.running(), torch.inference_mode():
            state = {"weight": linear.weight.data, "weight_scale": scales, "weight_zero_point": None}
            packed = PackedQuantizationCompressor.compress(state, scheme)
            packed["weight_scale"] = scales.half()
            tensors |= {f"{module}.{name}": tensor for name, tensor in packed.items() if tensor is not None}
    save_tensors(tensors, out, clock)


def onnxruntime_nbits(sample: Sample, out: Path, clock: Clock) -> None:
    """ONNX Runtime's MatMulNBits quantizer on float32 graphs of one MatMul each, which it has to hold in memory."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    for module, weight in sample:
        model = _matmul(module, weight)
        with clock.running():
            config = DefaultWeightOnlyQuantConfig(block_size=weight.group_size, is_symmetric=True, bits=weight.bits)
            quantizer = MatMulNBitsQuantizer(model, algo_config=config)
            quantizer.process()
            quantizer.model.save_model_to_file(str(out / f"{module}.onnx"), use_external_data_format=True)


def _matmul(module: str, weight: QuantizedWeight) -> Any:
    """A float32 ONNX model y = x @ W^T."""
    from onnx import TensorProto, helper, numpy_helper

    out_features, in_features = weight.shape
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.dequantize().T), f"{module}.weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"{module}.weight"], ["y"], name=module)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out_features])],
        [initializer],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


JUDGE, AUTOROUND = "judges/gptqmodel", "peers/auto-round"
PYTHON_ONLY = (("GPTQMODEL_DISABLE_PACK_EXT", "1"),)
PEERS: tuple[Peer, ...] = (
    Peer(format="gptq", name="gptqmodel", work=gptqmodel_gptq, folder=JUDGE, environment=PYTHON_ONLY),
    Peer(format="gptq", name="gptqmodel-native", work=gptqmodel_gptq, folder=JUDGE, quick=False),
    Peer(format="gptq", name="auto-round", work=autoround_gptq, folder=AUTOROUND),
    Peer(
        format="gptq",
        name="auto-round-iters0",
        work=autoround_gptq_command,
        folder=AUTOROUND,
        quick=False,
        warm=False,
    ),
    Peer(format="awq", name="gptqmodel", work=gptqmodel_awq, folder=JUDGE, environment=PYTHON_ONLY),
    Peer(format="compressed-tensors", name="compressed-tensors", work=compressed_tensors),
    Peer(format="gguf", name="gguf-py", work=gguf_py),
    Peer(format="gguf", name="llama.cpp", work=llama_cpp),
    Peer(format="gguf", name="auto-round", work=autoround_gguf, folder=AUTOROUND),
    Peer(
        format="gguf",
        name="auto-round-iters0",
        work=autoround_gguf_command,
        folder=AUTOROUND,
        quick=False,
        warm=False,
    ),
    Peer(format="onnx", name="onnxruntime", work=onnxruntime_nbits),
)
"""gptqmodel packs with a C++ extension that it compiles on first use ("-native"), in Python where it cannot."""


def run_peer(peer: Peer, checkpoint: L4QCheckpoint, modules: list[str], out: Path) -> tuple[float, int]:
    """Let a peer write modules into an empty folder; (seconds, weights)."""
    clock, sample = Clock(), Sample(checkpoint, modules)
    peer.work(sample, out, clock)
    return clock.seconds, sample.weights
