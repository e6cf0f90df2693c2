"""What the ONNX graphs and the readers of ONNX files say when they refuse, message by message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig

from exporters.inspect.counts import count
from exporters.inspect.open import open_source
from exporters.onnx.family import read_spec
from exporters.onnx.hollow import cache_shapes, hollow_decoder
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.tiny_llama import SIZES


def test_models_the_onnx_graphs_do_not_cover(tmp_path: Path) -> None:
    """Rotations of half a head, and keys longer than values."""
    config: dict[str, Any] = AutoConfig.for_model("llama", **SIZES).to_dict()
    half = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    read_spec("LlamaForCausalLM", {**config, "rope_parameters": half})
    with pytest.raises(UnsupportedError, match="partial rotary embeddings are not covered\n  got: 16\n  expected: hea"):
        read_spec("LlamaForCausalLM", {**config, "rope_parameters": {**half, "partial_rotary_factor": 0.5}})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    latent = AutoConfig.for_model("deepseek_v2", vocab_size=64, first_k_dense_replace=1, **sizes, **heads)
    message = "the ONNX graph needs layers whose cached keys and values have one shape\n  where: DeepseekV2ForCausalLM"
    with pytest.raises(UnsupportedError, match=message):
        cache_shapes(hollow_decoder(latent))


def onnx_file(folder: Path, change: Callable[[onnx.TensorProto], object], scale: float = 1, **attributes: Any) -> Path:
    """A model of one MatMulNBits whose packed weight, 4 rows of 32 columns, was changed."""
    packed = numpy_helper.from_array(np.zeros((4, 1, 16), dtype=np.uint8), "packed")
    scales = numpy_helper.from_array(np.full((4, 1), scale, dtype=np.float32), "scales")
    change(packed)
    options = {"K": 32, "N": 4, "bits": 4, "block_size": 32, **attributes}
    node = helper.make_node("MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", **options)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [packed, scales]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def inspect(path: Path) -> None:
    """What l4q-inspect does."""
    count(open_source(path))


def outside(location: str) -> Callable[[onnx.TensorProto], object]:
    """The data lie in another file."""

    def change(tensor: onnx.TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


ONNX: dict[str, tuple[str, Callable[[onnx.TensorProto], object]]] = {
    "a tensor of unknown type": ("where: packed\n  got: 99", lambda tensor: setattr(tensor, "data_type", 99)),
    "a tensor has impossible sizes": (r"got: \[4, 1, 16, -1\]", lambda tensor: tensor.dims.append(-1)),
    "external data points outside its folder": (r"got: \.\./weights\n  expected: a file of", outside("../weights")),
    "external data is a link that leaves its folder": ("got: /dev/null", outside("linked")),
    "a tensor's data cannot be read": ("got: no file nowhere\n  expected: 64 bytes", outside("nowhere")),
}


@pytest.mark.parametrize("message", ONNX)
def test_onnx_tensors_that_are_somewhere_else(tmp_path: Path, message: str) -> None:
    """Types and sizes of no tensor, and data that are not in the folder."""
    details, change = ONNX[message]
    (tmp_path / "linked").symlink_to("/dev/null")
    inspect(onnx_file(tmp_path, lambda tensor: None))
    with pytest.raises(UsageError, match=f"{message}(?s:.*){details}"):
        inspect(onnx_file(tmp_path, change))


def test_onnx_weights_that_are_not_as_their_node_says(tmp_path: Path) -> None:
    """Seven rows out of 64 bytes, and scales that are none."""
    message = "a quantized weight cannot be decoded\n  where: .*packed\n  got: ValueError: cannot reshape"
    with pytest.raises(UsageError, match=message):
        inspect(onnx_file(tmp_path, lambda tensor: None, N=7))
    with pytest.raises(UsageError, match="a scale is NaN or infinite\n  where: packed\n  do: the file is damaged"):
        inspect(onnx_file(tmp_path, lambda tensor: None, scale=float("inf")))
