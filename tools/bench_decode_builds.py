"""The models tools.bench_decode times: our exports, and what each runtime's own tools make of the same 16-bit model.

Every function writes one folder. The 16-bit model is the dequantized checkpoint, so that all builds hold the same
weights; `own` builds have the same bits for linears and for the output head as ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.files import copy_files
from l4q.shard_layout import INDEX
from l4q.shard_writer import ShardWriter
from tools.bench_export_jobs import Worker
from tools.bench_export_peers import PEERS, run_peer
from tools.bench_float import write_float

HEAD = "Q8_0"
SUPERBLOCK = 256
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""llama.cpp's for rows that superblocks of 256 do not fill (llama-quant.cpp)."""
GROUP = 64
SECTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "desc_act": False, "sym": True, "lm_head": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
}
"""quantization_config as GPTQModel writes it, without bits and group_size."""


def ours(name: str, **options: Any) -> Callable[[Path, Path, Path], None]:
    """Export the checkpoint to a format; beside ONNX Runtime's own graph the standard one, which it replaces, goes."""

    def build(checkpoint: Path, half: Path, out: Path) -> None:
        export(L4QCheckpoint.open(checkpoint), name, out, ExportOptions(**options), check="none")
        for unused in ("model.onnx", "model.onnx.data") if options.get("onnx_runtime_optimized") else ():
            (out / unused).unlink()

    return build


def half_precision(checkpoint: Path, half: Path, out: Path) -> None:
    """The 16-bit folder itself."""
    out.symlink_to(half.resolve())


def gguf_q4_0(name: str, layer: int, layers: int) -> str:
    """llama-quantize --pure Q4_0 with --output-tensor-type and --token-embedding-type q8_0."""
    return HEAD if layer < 0 else "Q4_0"


def gguf_q4_k_m(name: str, layer: int, layers: int) -> str:
    """llama-quantize Q4_K_M (llama-quant.cpp, llama_tensor_get_type and use_more_bits)."""
    if layer < 0:
        return "Q6_K"
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return "Q6_K" if more and name.endswith(("attn_v.weight", "ffn_down.weight")) else "Q4_K"


def gguf_f16(name: str, layer: int, layers: int) -> str:
    """Nothing quantized."""
    return "F16"


def gguf_by_llama_cpp(choose: Callable[[str, int, int], str]) -> Callable[[Path, Path, Path], None]:
    """Quantize the 16-bit weights with llama.cpp's own code; the wheel has no llama-quantize, so gguf-py writes."""

    def build(checkpoint: Path, half: Path, out: Path) -> None:
        requantize(checkpoint, out, choose)

    return build


def requantize(checkpoint: Path, out: Path, choose: Callable[[str, int, int], str]) -> None:
    """Copy our GGUF export with every matrix in the type that `choose` names, one tensor in memory at a time."""
    import gguf

    plain = out.with_name(f"{out.name}-plain")
    export(L4QCheckpoint.open(checkpoint), "gguf", plain, check="none")
    reader = gguf.GGUFReader(next(plain.glob("*.gguf")))
    out.mkdir()
    writer = gguf.GGUFWriter(out / "model.gguf", arch=str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None
            )
    layers = 1 + max(_layer(tensor.name) for tensor in reader.tensors)
    kinds = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        kinds[tensor.name] = _kind(choose(tensor.name, _layer(tensor.name), layers), shape)
        kind = gguf.GGMLQuantizationType[kinds[tensor.name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(_encode(values, kinds[tensor.name]))
    writer.close()


def _kind(kind: str, shape: list[int]) -> str:
    if len(shape) < 2:
        return "F32"
    return FALLBACK.get(kind, kind) if shape[-1] % SUPERBLOCK else kind


def _encode(values: np.ndarray, kind: str) -> np.ndarray:
    from runtime_tests.engines.ggml_rows import TYPES, quantize_rows

    half = values.astype(np.float16)
    if kind in TYPES:
        return quantize_rows(half.astype(np.float32), kind)
    return half if kind == "F16" else values.astype(np.float32)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def by_genai_builder(precision: str, *options: str) -> Callable[[Path, Path, Path], None]:
    """onnxruntime-genai's model builder for the CPU, with KEY=VALUE options."""

    def build(checkpoint: Path, half: Path, out: Path) -> None:
        with Worker() as worker:
            worker.ask(_run_genai_builder, half, out, precision, list(options))

    return build


def _run_genai_builder(half: Path, out: Path, precision: str, options: list[str]) -> None:
    from onnxruntime_genai.models import builder

    cache = out.with_name(f"{out.name}-cache")
    arguments = (None, str(half), str(out), precision, "cpu", str(cache))
    builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))


def by_gptqmodel(name: str, build_folder: Path) -> Callable[[Path, Path, Path], None]:
    """GPTQModel's packing of the same integers."""

    def build(checkpoint: Path, half: Path, out: Path) -> None:
        peer = next(peer for peer in PEERS if (peer.format, peer.name) == (name, "gptqmodel"))
        with Worker(build_folder / str(peer.folder), peer.environment) as worker:
            worker.ask(_run_gptqmodel, name, checkpoint, out)

    return build


def _run_gptqmodel(name: str, checkpoint: Path, out: Path) -> None:
    import torch
    from safetensors import safe_open

    opened = L4QCheckpoint.open(checkpoint)
    peer = next(peer for peer in PEERS if (peer.format, peer.name) == (name, "gptqmodel"))
    out.mkdir()
    run_peer(peer, opened, list(opened.modules), out)
    packed = (out / "model.safetensors").rename(out / "packed.safetensors")
    writer = ShardWriter(out)
    for dense in opened.dense_names:
        writer.add({dense: opened.dense(dense).to(torch.float16)}, {})
    writer.close()
    plain = (out / "model.safetensors").rename(out / "dense.safetensors")
    weight_map: dict[str, str] = {}
    for path in (packed, plain):
        with safe_open(path, framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), path.name)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    section = {**SECTIONS[name], "bits": opened.quant.bits, "group_size": opened.quant.group_size}
    config = {**opened.config, "dtype": "float16", "quantization_config": section}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_files(opened.side_files(), out)


def write_half(checkpoint: Path, out: Path) -> None:
    """The 16-bit model everything else starts from."""
    write_float(L4QCheckpoint.open(checkpoint), out)


def round_to_nearest(source: Path, out: Path) -> None:
    """A checkpoint of a real model without training: the grid's start."""
    from transformers import AutoModelForCausalLM

    from l4q.config import LoraConfig, QuantConfig
    from l4q.model import save_l4q, wrap_linears

    quant = QuantConfig(bits=4, group_size=GROUP, zero_point="none")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    wrap_linears(model, quant, LoraConfig(rank=1))
    save_l4q(model, out, quant=quant, side_files_from=source)
