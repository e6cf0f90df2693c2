"""What runtimes refuse, ignore or misread is said before anything is written; what gives NaN is refused."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from exporters.card import CARD_NAME
from exporters.cli import command
from exporters.container import FLOAT16_MAX, widen_packed
from exporters.driver import export, make_plan
from exporters.plan import ExportOptions
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError
from l4q.packed_weight import PackedWeight
from runtime_tests.engines import ggml_rows
from runtime_tests.engines.ggml_rows import quantize_rows
from runtime_tests.random_models import random_weight
from runtime_tests.tiny_llama import tiny_checkpoint

BF16 = "casts the fp16 scales to bfloat16"
AMX = "VLLM_CPU_INT4_W4A8=0"
HUMMING = "--quantization humming reads the zero-points one too low"
ASYMMETRIC = "vLLM does not load it: vLLM refuses GPTQ with sym: false"
DENSE = "compressed-tensors before 0.18 expects 3-bit fields in other words"
Q4_1 = "14 tensors are Q4_1: llama.cpp keeps the sum of 32 activations in fp16"
LEVEL = "does not read the accuracy level from the model: a session without the option"

# format, grid, options -> the cautions, one pattern each
CASES: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("gptq", {}, {}, []),
    ("gptq", {"zero_point": "integer"}, {}, [HUMMING, ASYMMETRIC]),
    ("gptq", {"zero_point": "integer"}, {"gptq_format": "gptq_v2"}, [ASYMMETRIC]),
    ("gptq", {}, {"dtype": "bfloat16"}, [BF16, AMX]),
    ("awq", {"zero_point": "integer"}, {}, []),
    ("awq", {}, {"dtype": "bfloat16"}, [BF16, AMX]),
    ("compressed-tensors", {"zero_point": "integer"}, {}, []),
    ("compressed-tensors", {}, {"dtype": "bfloat16"}, [BF16, AMX]),
    ("compressed-tensors", {"bits": 3}, {}, []),
    ("compressed-tensors", {"bits": 3}, {"container_bits": 3}, [DENSE, "vLLM does not load it: .*3-bit fields"]),
    ("gguf", {}, {}, []),
    ("gguf", {"zero_point": "float"}, {}, [Q4_1]),
    ("gguf", {"zero_point": "integer"}, {"gguf_type": "Q5_0"}, []),
    ("onnx", {}, {}, [f"{LEVEL} session.qdq_matmulnbits_accuracy_level=0"]),
    ("onnx", {}, {"onnx_accuracy_level": 4}, []),
]


@pytest.mark.parametrize(("name", "grid", "options", "expected"), CASES)
def test_the_plan_warns_exactly_then(
    name: str, grid: dict[str, Any], options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    """Every caution appears where its cause is and nowhere else, in the order cause, refusal."""
    cautions = make_plan(tiny_checkpoint(tmp_path, QuantConfig(**grid)), name, ExportOptions(**options)).cautions
    assert len(cautions) == len(expected), cautions
    for caution, pattern in zip(cautions, expected, strict=True):
        assert pattern.partition(".*")[0] in caution
        assert pattern.rpartition(".*")[2] in caution


@pytest.mark.parametrize("words", [["--dry-run"], ["--json"], []])
def test_the_command_says_it_on_stderr(words: list[str], tmp_path: Path) -> None:
    """Plan, JSON and table alike leave the warnings on stderr; JSON and the model card hold them too."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    arguments = [str(checkpoint.path), "--to", "gptq", "awq", "--out", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert f"warning: gptq: vLLM's {HUMMING}" in result.stderr
    assert f"warning: gptq: {ASYMMETRIC}" in result.stderr
    assert "warning: awq" not in result.stderr
    if words == ["--json"]:
        assert ASYMMETRIC in json.loads(result.stdout)["gptq"]["warnings"][1]
    if words != ["--dry-run"]:
        assert f"- Warning: vLLM's {HUMMING}" in (tmp_path / "out" / "gptq" / CARD_NAME).read_text(encoding="utf-8")


def q4_1_product(activation: float) -> float:
    """ggml's own dot product of a random Q4_1 row of 64 weights with 64 equal activations."""
    shared = ggml_rows._shared()
    shared.ggml_cpu_init()
    weights = quantize_rows(np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32), "Q4_1")
    activations = np.full(64, activation, dtype=np.float32)
    packed = np.zeros(2 * 36, dtype=np.uint8)  # two block_q8_1
    quantize, dot = shared.quantize_row_q8_1, shared.ggml_vec_dot_q4_1_q8_1
    quantize.restype = dot.restype = None
    quantize.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    quantize(activations.ctypes.data, packed.ctypes.data, 64)
    result = ctypes.c_float()
    pair, size = ctypes.c_void_p, ctypes.c_size_t
    dot.argtypes = (ctypes.c_int, pair, size, pair, size, pair, size, ctypes.c_int)
    dot(64, ctypes.addressof(result), 0, weights.ctypes.data, 0, packed.ctypes.data, 0, 1)
    return float(result.value)


def test_llama_cpp_really_overflows_in_q4_1() -> None:
    """The warning is true of the installed llama.cpp: 32 * 2000 is finite, 32 * 3000 is not."""
    assert np.isfinite(q4_1_product(2000.0))
    assert not np.isfinite(q4_1_product(3000.0))


@pytest.mark.parametrize(("zero_point", "reach"), [("none", 8), ("integer", 15)])
def test_weights_beyond_float16_are_refused(zero_point: Any, reach: int) -> None:
    """A scale is fine as long as its farthest code is a float16; one step more and vLLM would compute infinity."""
    weight = random_weight((8, 64), QuantConfig(bits=4, group_size=32, zero_point=zero_point), 0)
    zeros = None if weight.zeros is None else np.full_like(weight.zeros, 15)
    scales = weight.scales.copy()
    scales[3, 1] = np.nextafter(np.float16(FLOAT16_MAX / reach), np.float16(0))
    fits = replace(weight, scales=scales, zeros=zeros, name="layer")
    assert np.float32(scales[3, 1]) * reach <= FLOAT16_MAX
    packed = PackedWeight.of(fits)
    assert widen_packed(packed, 4) is packed
    scales = scales.copy()
    scales[3, 1] *= np.float16(1.002)  # two or three float16 numbers more
    with pytest.raises(UnsupportedError, match=r"(?s)a weight can exceed float16.*where: layer.*at most 65504"):
        widen_packed(PackedWeight.of(replace(fits, scales=scales)), 4)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_no_export_holds_such_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal reaches every format whose kernels compute in float16, and leaves nothing behind."""
    monkeypatch.setattr("runtime_tests.tiny_llama.random_weight", diverged)
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32))
    with pytest.raises(UnsupportedError, match="a weight can exceed float16"):
        export(checkpoint, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def diverged(shape: tuple[int, int], quant: QuantConfig, seed: int) -> Any:
    """Random weights with one scale of 10,000."""
    weight = random_weight(shape, quant, seed)
    weight.scales[0, 0] = 10_000
    return weight
