"""Which kernels ONNX Runtime really uses, for every block size, scale type and zero-point; and its saved graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import helper

import exporters.onnx as onnx_exporter
from exporters.cli import command
from exporters.driver import export
from exporters.onnx.optimized import OPTIMIZED_DATA, OPTIMIZED_NAME, check_fused, write_optimized
from exporters.onnx.pack import pack_uint4, unpack_uint4
from exporters.plan import ExportOptions, OnnxScales
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import VerificationError
from runtime_tests.architectures import wrong_modules
from runtime_tests.engines.onnxruntime_engine import Engine
from runtime_tests.onnx_models import Case, corrupted, export_onnx, make_checkpoint, torch_logits, torch_model

BLOCKS = (16, 32, 64, 128, 256)
IDS = [int(token) for token in np.random.default_rng(0).integers(3, 77, 12)]
# One group of 256 columns per row or two, so that every block size fits.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "initializer_range": 0.1,
}
TOLERANCE = 4e-4
"""Logits of order 5 here; measured 8e-5."""
LEVEL_TOLERANCE = 2e-4
"""Between the plain and the saved graph at one level; measured 6e-6. The levels are 0.5 apart."""

Checkpoints = Callable[[str], L4QCheckpoint]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """One checkpoint per kind of zero-point."""
    root = tmp_path_factory.mktemp("fusion")

    @cache
    def make(zero_point: str) -> L4QCheckpoint:
        quant = QuantConfig.from_dict({"bits": 4, "group_size": 256, "zero_point": zero_point})
        return make_checkpoint(Case(changes=SIZES, quant=quant), root / zero_point)

    return make


@pytest.fixture(scope="module")
def expected(checkpoints: Checkpoints) -> Callable[[str], np.ndarray]:
    """Torch's logits per kind of zero-point."""
    return cache(lambda zero_point: torch_logits(torch_model(checkpoints(zero_point)), np.array([IDS]))[0])


def run(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Logits without their row's constant, and (MatMulNBits, DequantizeLinear) in the optimized graph."""
    engine = Engine(str(path), threads=1, accuracy_level=0)
    try:
        info = engine.info()
        return engine.prompt_logprobs(IDS), (int(info["matmulnbits"]), int(info["dequantize_linear"]))
    finally:
        engine.close()


def distance(logprobs: np.ndarray, logits: np.ndarray) -> float:
    """Largest difference up to a constant per row."""
    difference = logprobs - logits
    return float(np.abs(difference - difference.mean(axis=-1, keepdims=True)).max())


@pytest.mark.parametrize("scales", ["float32", "float16"])
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_size_fuses_and_computes_the_model(
    block: int,
    zero_point: str,
    scales: OnnxScales,
    checkpoints: Checkpoints,
    expected: Callable[[str], np.ndarray],
    tmp_path: Path,
) -> None:
    """All seven linears run in MatMulNBits, none is dequantized first, the numbers are torch's."""
    checkpoint = checkpoints(zero_point)
    folder = export_onnx(checkpoint, tmp_path / "onnx", onnx_block_size=block, onnx_scales=scales)
    assert {tensor.encoding.split()[2] for tensor in plan_of(checkpoint, block)} == {str(block)}
    logprobs, kernels = run(folder)
    assert kernels == (len(checkpoint.modules), 0)
    assert distance(logprobs, expected(zero_point)) < TOLERANCE
    assert wrong_modules(checkpoint, onnx_exporter, folder) == ()


def plan_of(checkpoint: L4QCheckpoint, block: int) -> list:
    """The plan's quantized tensors."""
    return list(onnx_exporter.plan(checkpoint, ExportOptions(onnx_block_size=block)).quantized)


@pytest.mark.parametrize("fault", ["nibble", "scale", "row swap"])
def test_a_corrupted_weight_moves_the_numbers(fault: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The comparison above fails when one linear holds one wrong code, scale or row order."""
    checkpoint = checkpoints("integer")
    logprobs, _ = run(export_onnx(checkpoint, tmp_path / "onnx", onnx_block_size=64))
    module = "model.layers.0.mlp.up_proj"
    wrong = corrupted(checkpoint.quantized(module))[fault]
    logits = torch_logits(torch_model(checkpoint, {module: wrong}), np.array([IDS]))[0]
    assert distance(logprobs, logits) > 4 * TOLERANCE


def turn_weights(folder: Path) -> None:
    """Rewrite a folder to the other layout: codes [N, K] with blocks on axis 1, and a Transpose behind."""
    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        for name in node.input:
            tensor = tensors[name]
            rows, columns = tensor.dims
            if tensor.data_type == onnx.TensorProto.FLOAT:
                turned = onnx.numpy_helper.to_array(tensor).T.tobytes()
            else:
                codes = unpack_uint4(np.frombuffer(tensor.raw_data, np.uint8), (rows, columns))
                turned = pack_uint4(np.ascontiguousarray(codes.T)).tobytes()
            tensor.raw_data = turned
            tensor.dims[:] = [columns, rows]
        next(a for a in node.attribute if a.name == "axis").i = 1
        output, node.output[0] = node.output[0], f"{node.output[0]}/turned"
        position = list(model.graph.node).index(node)
        transpose = helper.make_node("Transpose", [node.output[0]], [output], perm=[1, 0])
        model.graph.node.insert(position + 1, transpose)
    onnx.save(model, folder / "model.onnx")


def test_the_layout_with_a_transpose_is_seen_as_unfused(
    checkpoints: Checkpoints, expected: Callable[[str], np.ndarray], tmp_path: Path
) -> None:
    """The same weights stored [N, K] give the same numbers, but unfused: the count says so."""
    checkpoint = checkpoints("integer")
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    turn_weights(folder)
    logprobs, kernels = run(folder)
    assert distance(logprobs, expected("integer")) < TOLERANCE
    assert kernels == (0, len(checkpoint.modules))


@pytest.fixture(scope="module")
def optimized(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with ONNX Runtime's own graph beside it, accuracy level 4."""
    folder = tmp_path_factory.mktemp("optimized") / "onnx"
    options = ExportOptions(onnx_runtime_optimized=True, onnx_accuracy_level=4)
    export(checkpoints("float"), "onnx", folder, options)
    return folder


def level_4_logits(path: Path) -> np.ndarray:
    """Logits at the level the file was made for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    past = {v.name: np.zeros((1, 2, 0, 32), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    feeds = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64), **past}
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


def test_the_saved_graph_has_its_level(optimized: Path) -> None:
    """The optimized graph computes at level 4, for which it was made, whatever level a session asks for."""
    plain = level_4_logits(optimized / "model.onnx")
    assert distance(level_4_logits(optimized / OPTIMIZED_NAME)[0], plain[0]) < LEVEL_TOLERANCE
    fixed = Engine(str(optimized / OPTIMIZED_NAME), threads=1, accuracy_level=0)
    asked = Engine(str(optimized / "model.onnx"), threads=1, accuracy_level=0)
    rounded = Engine(str(optimized / "model.onnx"), threads=1, accuracy_level=4)
    results = [engine.prompt_logprobs(IDS) for engine in (fixed, asked, rounded)]
    assert np.abs(results[0] - results[2]).max() < LEVEL_TOLERANCE
    assert np.abs(results[0] - results[1]).max() > 4 * LEVEL_TOLERANCE


def test_a_damaged_saved_graph_is_noticed(optimized: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """One flipped code in the saved graph's data changes its logits."""
    whole = level_4_logits(optimized / OPTIMIZED_NAME)
    model = onnx.load(optimized / OPTIMIZED_NAME, load_external_data=False)
    (kernel, *_) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == kernel.input[1])
    place = {entry.key: entry.value for entry in codes.external_data}
    data = bytearray((optimized / OPTIMIZED_DATA).read_bytes())
    data[int(place["offset"]) + 5] ^= 0x88
    (tmp_path / OPTIMIZED_NAME).write_bytes((optimized / OPTIMIZED_NAME).read_bytes())
    (tmp_path / OPTIMIZED_DATA).write_bytes(data)
    assert not np.array_equal(level_4_logits(tmp_path / OPTIMIZED_NAME), whole)


def test_the_saved_graph_says_whom_it_belongs_to(optimized: Path, checkpoints: Checkpoints) -> None:
    """Metadata, plan and model card name the release and the provider; the plain file stays portable."""
    metadata = ort.InferenceSession(str(optimized / OPTIMIZED_NAME)).get_modelmeta().custom_metadata_map
    assert metadata["l4q.onnxruntime"] == ort.__version__
    assert metadata["l4q.execution_provider"] == "CPUExecutionProvider"
    assert metadata["l4q.accuracy_level"] == "4"
    card = (optimized / "README.md").read_text(encoding="utf-8")
    assert f"onnxruntime {ort.__version__} and CPUExecutionProvider only" in card
    plain = onnx.load(optimized / "model.onnx", load_external_data=False)
    assert {node.domain for node in plain.graph.node} == {""}
    saved = onnx.load(optimized / OPTIMIZED_NAME, load_external_data=False)
    kernels = [node for node in saved.graph.node if node.op_type == "MatMulNBits"]
    assert len(kernels) == 4  # q, k and v are one, gate and up are one
    assert {a.i for node in kernels for a in node.attribute if a.name == "accuracy_level"} == {4}
    # Float zero-points add one small product over group sums to each linear; the head is the last.
    small = [node for node in saved.graph.node if node.op_type == "MatMul"]
    assert len(small) == len(checkpoints("float").modules) + 1


def test_an_unfused_graph_is_not_saved(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The count that guards the saved graph refuses the layout with a Transpose, and one kernel too few."""
    folder = export_onnx(checkpoints("none"), tmp_path / "onnx", onnx_runtime_optimized=True)
    saved = onnx.load(folder / OPTIMIZED_NAME, load_external_data=False)
    check_fused(saved, 4)
    with pytest.raises(
        VerificationError,
        match=r"(?s)ONNX Runtime did not fuse every quantized linear.*4 MatMulNBits, 0 Deq.*expected: 8 MatMulNBits",
    ):
        check_fused(saved, 8)
    turn_weights(folder)
    with pytest.raises(VerificationError, match=r"(?s)0 MatMulNBits, 7 DequantizeLinear"):
        write_optimized(folder, 0, 7)


def test_the_command_takes_the_flag(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """--onnx-runtime-optimized is off unless given; the plan then names the file and the release."""
    arguments = [str(checkpoints("none").path), "--to", "onnx", "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    plain, asked = (CliRunner().invoke(command, [*arguments, *extra]) for extra in ([], ["--onnx-runtime-optimized"]))
    assert plain.exit_code == asked.exit_code == 0
    assert OPTIMIZED_NAME not in plain.output
    assert f"{OPTIMIZED_NAME} beside it is for onnxruntime {ort.__version__}" in asked.output
