"""What unofficial converters and loaders get wrong, as edits of our exports: `MISTAKES`.

Each edit turns a correct folder into the one the mistaken program would have written, for every module at once. The
reports they come from are named beside them. Nearly all of these files load without complaint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import torch
from onnx.external_data_helper import load_external_data_for_model
from safetensors.torch import load_file, save_file

from exporters.awq.pack import unpack_awq
from exporters.gguf.names import unpermute_rows
from exporters.gptq.write import LEGACY_CONFIG_NAME
from exporters.words import pack_rows, unpack_cols, unpack_rows
from l4q.config import ZeroPoint
from runtime_tests.hf_exports import edit_config

Edit = Callable[[Path], None]
EIGHTS = -0x77777778
"""int32 with the highest bit of every nibble."""
ONES = 0x11111111


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One way to go wrong."""

    format: str
    zero_point: ZeroPoint
    edit: Edit
    """Applied to a correct export."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the correct export."""
    message: str = ""
    """What the verification says if it refuses the folder instead of listing modules."""


def tensors(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Replace every safetensors tensor with that last name."""

    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        changed = {name: change(value) if name.endswith(f".{suffix}") else value for name, value in found.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def relabel(**changes: Any) -> Edit:
    """Lie in both configs of a GPTQ folder: GPTQModel reads the second one first."""

    def edit(folder: Path) -> None:
        edit_config(lambda section: section.update(changes))(folder)
        path = folder / LEGACY_CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def words(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of NumPy words as one of tensors."""
    return lambda value: torch.from_numpy(np.ascontiguousarray(change(value.numpy())))


def both(*edits: Edit) -> Edit:
    """One after another."""

    def edit(folder: Path) -> None:
        for single in edits:
            single(folder)

    return edit


def signed(value: torch.Tensor) -> torch.Tensor:
    """Fields of q - 8 modulo 16 where q belongs."""
    return value ^ EIGHTS


def flipped(value: torch.Tensor) -> torch.Tensor:
    """One bit of one code in each matrix."""
    value = value.clone()
    value[1, 3] ^= 1
    return value


def lowered(value: torch.Tensor) -> torch.Tensor:
    """Zero-points one lower; they are at least 1, so no field borrows."""
    return value - ONES


def clamped(value: torch.Tensor) -> torch.Tensor:
    """Unsigned codes pressed into a signed range: everything above 7 becomes 7."""
    return words(lambda array: pack_rows(np.minimum(unpack_rows(array, 4), 7), 4))(value)


def wrapped(value: torch.Tensor) -> torch.Tensor:
    """The first zero-point of each group row is 0: stored as 15 by v1, where readers without modulo see 16."""
    return value | 15


def ordered(value: torch.Tensor) -> torch.Tensor:
    """Rows in the order of decreasing activations, here simply reversed, while g_idx goes on counting groups."""
    return words(lambda array: pack_rows(np.ascontiguousarray(unpack_rows(array, 4)[::-1]), 4))(value)


def plain_nibbles(value: torch.Tensor) -> torch.Tensor:
    """AWQ's columns in GPTQ's order 0 1 2 3 4 5 6 7 instead of 0 2 4 6 1 3 5 7."""
    return words(lambda array: np.ascontiguousarray(pack_rows(unpack_awq(array).T.copy(), 4).T))(value)


def gguf_blocks(change: Callable[[gguf.ReaderTensor], np.ndarray], *names: str) -> Edit:
    """Replace the bytes of the block tensors whose names contain one of `names`, in place."""

    def edit(folder: Path) -> None:
        reader = gguf.GGUFReader(next(folder.glob("*.gguf")), "r+")
        for tensor in reader.tensors:
            if tensor.tensor_type.name.startswith("Q4") and any(name in tensor.name for name in names):
                tensor.data[:] = change(tensor)
        reader.data.flush()

    return edit


def quantized_again(tensor: gguf.ReaderTensor) -> np.ndarray:
    """What convert_hf_to_gguf and llama-quantize make of a GPTQ file: dequantized, then rounded to new scales."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return gguf.quants.quantize(values, tensor.tensor_type)


def interleaved(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Codes 2j and 2j + 1 in byte j, where ggml has j and j + 16."""
    blocks = tensor.data.reshape(-1, 18).copy()  # Q4_0: an fp16 scale and 16 bytes
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # [blocks, 32]
    blocks[:, 2:] = codes[:, 0::2] | codes[:, 1::2] << 4
    return blocks.reshape(tensor.data.shape)


def onnx_fields(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Replace the bytes of every initializer with that last name."""

    def edit(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        load_external_data_for_model(model, str(folder))
        for tensor in model.graph.initializer:
            if tensor.name.endswith(f"_proj.{suffix}"):
                tensor.raw_data = change(np.frombuffer(tensor.raw_data, dtype=np.uint8)).tobytes()
        onnx.save(model, folder / "model.onnx")

    return edit


V2 = {"gptq_format": "gptq_v2"}
MISTAKES: Mapping[str, Mistake] = {
    # vllm#38966, vllm#26343: "!!!!"
    "gptq: v2 zero-points labelled v1": Mistake(
        format="gptq",
        zero_point="integer",
        options=V2,
        edit=relabel(checkpoint_format="gptq"),
    ),
    # GPTQModel v5 and later wrote symmetric files so
    "gptq: v2 zero-points of symmetric weights labelled v1": Mistake(
        format="gptq",
        zero_point="none",
        options=V2,
        edit=relabel(checkpoint_format="gptq"),
        message="not the midpoint",
    ),
    "gptq: two configs, of which one was edited": Mistake(
        format="gptq",
        zero_point="integer",
        options=V2,
        edit=edit_config(lambda section: section.update(checkpoint_format="gptq")),
        message="quantize_config.json contradicts config.json",
    ),
    # AutoGPTQ#640
    "gptq: v1 zero-points labelled v2": Mistake(
        format="gptq",
        zero_point="integer",
        edit=relabel(checkpoint_format="gptq_v2"),
    ),
    # GPTQModel#2350, TGI#2120
    "gptq: a zero-point of 0 wrapped around": Mistake(
        format="gptq", zero_point="integer", edit=tensors("qzeros", wrapped)
    ),
    # LightCompress#258: NaN in vLLM, which then ignores qzeros
    "gptq: asymmetric weights called sym": Mistake(
        format="gptq",
        zero_point="integer",
        edit=relabel(sym=True),
        message="not the midpoint",
    ),
    "gptq: signed codes": Mistake(format="gptq", zero_point="none", edit=tensors("qweight", signed)),
    # auto-round#2273: the upper half of each group is lost
    "gptq: codes clamped to a signed range": Mistake(
        format="gptq", zero_point="none", edit=tensors("qweight", clamped)
    ),
    # desc_act files whose g_idx was regenerated: perplexity 37438 instead of 25.7
    "gptq: activation order without its g_idx": Mistake(
        format="gptq", zero_point="none", edit=tensors("qweight", ordered)
    ),
    # the same, with g_idx kept, which vLLM ignores
    "gptq: activation order under desc_act false": Mistake(
        format="gptq",
        zero_point="none",
        edit=both(tensors("qweight", ordered), tensors("g_idx", lambda index: index.flip(0))),
        message="g_idx is not k // group_size",
    ),
    "awq: zero-points of GPTQ v1": Mistake(format="awq", zero_point="integer", edit=tensors("qzeros", lowered)),
    # vLLM's CPU kernel then ignores qzeros: NaN
    "awq: asymmetric weights with zero_point false": Mistake(
        format="awq",
        zero_point="integer",
        edit=edit_config(lambda section: section.update(zero_point=False)),
        message="zero_point: false",
    ),
    # QLLM#170
    "awq: columns in GPTQ's order": Mistake(format="awq", zero_point="integer", edit=tensors("qweight", plain_nibbles)),
    "compressed-tensors: zero-points of GPTQ v1": Mistake(
        format="compressed-tensors", zero_point="integer", edit=tensors("weight_zero_point", lowered)
    ),
    # auto-round#2273
    "compressed-tensors: signed zero-points, unsigned codes": Mistake(
        format="compressed-tensors", zero_point="integer", edit=tensors("weight_zero_point", signed)
    ),
    "compressed-tensors: unsigned zero-points, signed codes": Mistake(
        format="compressed-tensors", zero_point="integer", edit=tensors("weight_packed", signed)
    ),
    # vllm#17862
    "compressed-tensors: zero-points left unpacked": Mistake(
        format="compressed-tensors",
        zero_point="integer",
        edit=tensors("weight_zero_point", words(lambda array: unpack_cols(array.T.copy(), 4).T.astype(np.int32))),
    ),
    "compressed-tensors: asymmetric weights called symmetric": Mistake(
        format="compressed-tensors",
        zero_point="integer",
        edit=edit_config(lambda section: section["config_groups"]["group_0"]["weights"].update(symmetric=True)),
        message="not those of its scheme",
    ),
    # llama.cpp#24603, llama.cpp#14810: 5-9 % relative error, as much as the first quantization
    "gguf: codes quantized again": Mistake(
        format="gguf", zero_point="none", edit=gguf_blocks(quantized_again, "attn", "ffn")
    ),
    "gguf: query and key rows not permuted": Mistake(
        format="gguf",
        zero_point="none",
        edit=both(
            gguf_blocks(lambda tensor: unpermute_rows(tensor.data, 4), "attn_q"),
            gguf_blocks(lambda tensor: unpermute_rows(tensor.data, 2), "attn_k"),
        ),
    ),
    "gguf: neighbours in a byte": Mistake(format="gguf", zero_point="none", edit=gguf_blocks(interleaved, "attn_v")),
    # onnxruntime#19450, QLLM#170
    "onnx: signed codes": Mistake(format="onnx", zero_point="integer", edit=onnx_fields("weight", lambda b: b ^ 0x88)),
    "onnx: zero-points of GPTQ v1": Mistake(
        format="onnx", zero_point="integer", edit=onnx_fields("zeros", lambda b: b - 0x11)
    ),
    "onnx: high nibble first": Mistake(
        format="onnx", zero_point="integer", edit=onnx_fields("weight", lambda b: b << 4 | b >> 4)
    ),
}
