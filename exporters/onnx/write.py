"""Write an ONNX folder: model.onnx, its external data, the configs and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.files import copy_side_files, write_json
from exporters.onnx.optimized import ACCURACY_OPTION, write_optimized
from exporters.onnx.source import DecoderSizes, choose_source
from exporters.plan import ExportOptions, ExportPlan
from l4q.checkpoint import L4QCheckpoint

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
ACCURACY_KEY = "l4q.accuracy_level"
"""Key of model.onnx's metadata that records the chosen accuracy level."""
GRAPH_KEY = "l4q.graph"
"""Key that records where the graph came from: "built" or "exported"."""
INLINE_BYTES = 256
"""Smaller tensors stay in model.onnx, where shape inference needs them."""
PAGE_BYTES = 4096
"""Tensors over 1 MiB start on a page, as memory mapping wants them (ONNX ExternalData.md)."""


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
) -> None:
    """Write the planned folder, reading one module at a time.

    Raises:
        UnsupportedError: As `exporters.onnx.plan.plan`.
        VerificationError: As `exporters.onnx.optimized.write_optimized`.
    """
    source = choose_source(checkpoint, options.onnx_graph)
    metadata = {
        ACCURACY_KEY: str(options.onnx_accuracy_level),
        GRAPH_KEY: source.kind,
        "l4q.zero_point": checkpoint.quant.zero_point,
        "l4q.bits": str(checkpoint.quant.bits),
        "l4q.group_size": str(checkpoint.quant.group_size),
    }
    model = source.build(options, metadata)
    waiting = {tensor.target: tensor.name for tensor in plan.tensors}

    def report(tensor: ir.TensorProtocol, _: object) -> None:
        name = waiting.pop(tensor.name or "", None)
        if name is not None:
            on_tensor(name)

    ir.save(
        model,
        folder / MODEL_NAME,
        external_data=DATA_NAME,
        size_threshold_bytes=INLINE_BYTES,
        alignment=PAGE_BYTES,
        callback=report,
    )
    for name in waiting.values():  # tensors small enough to live in model.onnx itself
        on_tensor(name)
    if options.onnx_runtime_optimized:
        write_optimized(folder, options.onnx_accuracy_level, len(checkpoint.modules))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_json(folder / "config.json", {**config, "dtype": "float32"})
    write_json(folder / "genai_config.json", genai_config(source.sizes, checkpoint.config, options.onnx_accuracy_level))
    copy_side_files(checkpoint, folder)


def genai_config(spec: DecoderSizes, config: Mapping[str, Any], accuracy_level: int) -> dict[str, Any]:
    """onnxruntime-genai's description of the folder.

    `past_present_share_buffer` must be false: the Attention operator returns the grown cache instead of updating one.
    """
    eos = config.get("eos_token_id")
    bos = config.get("bos_token_id")
    pad = config.get("pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "type": "llama",
            "bos_token_id": bos if bos is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else first_eos,
            "context_length": spec.context_length,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "filename": MODEL_NAME,
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.heads,
                "num_key_value_heads": spec.kv_heads,
                "num_hidden_layers": spec.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"provider_options": [], ACCURACY_OPTION: str(accuracy_level)},
            },
        },
        "search": {"do_sample": False, "max_length": spec.context_length, "past_present_share_buffer": False},
    }
