"""ONNX Runtime's saved graph: the standard graph's numbers through a padded cache, the trained integers, one buffer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from exporters.onnx.external import with_data
from exporters.onnx.merge import merge_linears
from exporters.onnx.optimized import OPTIMIZED_DATA, OPTIMIZED_NAME
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from l4q.weight import F32
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.onnx_models import CASES, Case, corrupted, export_onnx, make_checkpoint, open_session, run_session
from runtime_tests.test_onnx_genai import checkpoint, expected, generate, prompts, start

__all__ = ["checkpoint", "expected", "prompts"]  # fixtures of the other module
TOLERANCE = 2e-4
"""Logits of order 6, float32 sums in another order; measured 1.3e-5."""
NAMES = ("integer-untied-llama3", "float-linear", "llama-biases", "mistral-window", "qwen3")


def saved_session(path: Path) -> ort.InferenceSession:
    """A session of one file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(session: ort.InferenceSession, side: str, lengths: tuple[int, ...] = (9, 1, 1, 1, 1)) -> np.ndarray:
    """Logits [tokens, vocab] of the real tokens of two rows, one padded: a prompt, then steps through the cache."""
    rng = np.random.default_rng(3)
    mask, cache, found = np.ones((2, 0), np.int64), None, []
    for number, length in enumerate(lengths):
        new = np.ones((2, length), np.int64)
        if number == 0:
            new[0, :4] = side != "left"
            new[0, 5:] = side != "right"
        mask = np.concatenate([mask, new], axis=1)
        logits, cache = run_session(session, rng.integers(3, 77, (2, length)), mask, cache)
        found.append(logits[new.astype(bool)])
    return np.concatenate(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_graph_computes_the_standard_one(name: str, tmp_path: Path) -> None:
    """A batch padded left or right, prompt and cached steps: equal logits; with one wrong linear they are not."""
    source = make_checkpoint(CASES[name], tmp_path / "checkpoint")
    folder = export_onnx(source, tmp_path / "onnx", onnx_runtime_optimized=True)
    saved, plain = saved_session(folder / OPTIMIZED_NAME), open_session(folder)
    for side in ("left", "right"):
        assert np.abs(answers(saved, side) - answers(plain, side)).max() < TOLERANCE
    operators = [node.op_type for node in onnx.load(folder / OPTIMIZED_NAME, load_external_data=False).graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert "Attention" not in operators
    assert operators.count("SkipSimplifiedLayerNormalization") == 4
    assert operators.count("MatMulNBits") == 8
    flip_code(folder)
    assert np.abs(answers(saved_session(folder / OPTIMIZED_NAME), "left") - answers(plain, "left")).max() > TOLERANCE


def place_of_codes(folder: Path, kernel: int = 0) -> int:
    """Where one kernel's codes begin in the data file."""
    model = onnx.load(folder / OPTIMIZED_NAME, load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == "MatMulNBits"][kernel]
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    return int({entry.key: entry.value for entry in codes.external_data}["offset"])


def flip_code(folder: Path) -> None:
    """Flip the top bit of one code of a merged kernel."""
    data = np.memmap(folder / OPTIMIZED_DATA, mode="r+", dtype=np.uint8)
    data[place_of_codes(folder) + 5] ^= 0x80
    data.flush()


def decode(folder: Path) -> dict[str, F32]:
    """Weights [out, in] by module, decoded by ONNX Runtime's own kernel on the identity, cut where the Split cuts."""
    path = folder / OPTIMIZED_NAME
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    splits = {node.input[0]: list(node.output) for node in model.graph.node if node.op_type == "Split"}
    found: dict[str, F32] = {}
    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        columns = next(attribute.i for attribute in node.attribute if attribute.name == "K")
        weights = [with_data(tensors[name], path, "unreadable", remedy="") for name in node.input[1:5] if name]
        bare = helper.make_node(node.op_type, ["x", *node.input[1:5]], ["y"], domain=node.domain)
        bare.attribute.extend(node.attribute)
        outputs = splits.get(node.output[0], list(node.output))
        nodes = [bare]
        if len(outputs) > 1:
            (split,) = (split for split in model.graph.node if split.input[0] == node.output[0])
            weights.append(with_data(tensors[split.input[1]], path, "unreadable", remedy=""))
            nodes.append(helper.make_node("Split", ["y", split.input[1]], outputs, axis=-1))
        else:
            bare.output[0] = outputs[0]
        values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", *outputs)]
        graph = helper.make_graph(nodes, "weight", values[:1], values[1:], weights)
        single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        session = ort.InferenceSession(single.SerializeToString(), providers=["CPUExecutionProvider"])
        parts = session.run(outputs, {"x": np.eye(columns, dtype=np.float32)})
        found |= {name.rsplit("/", 1)[0]: part.T for name, part in zip(outputs, parts, strict=True)}
    return found


@pytest.mark.parametrize("name", ["none-tied", "integer-3bit-row", "llama-biases"])
def test_every_merged_weight_is_the_trained_one(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's kernel decodes the saved integers to the trained weights bit for bit; a flipped bit shows."""
    source = make_checkpoint(CASES[name], tmp_path / "checkpoint")
    folder = export_onnx(source, tmp_path / "onnx", onnx_runtime_optimized=True)
    weights = decode(folder)
    assert weights.keys() == set(source.modules)
    for module, weight in weights.items():
        assert np.array_equal(weight, source.quantized(module).dequantize()), module
    wrong = corrupted(source.quantized("model.layers.0.self_attn.q_proj"))
    assert not any(
        np.array_equal(weights["model.layers.0.self_attn.q_proj"], bad.dequantize()) for bad in wrong.values()
    )
    flip_code(folder)
    again = decode(folder)
    different = [module for module in weights if not np.array_equal(weights[module], again[module])]
    assert len(different) == 1


@pytest.fixture(scope="module")
def shared(checkpoint: L4QCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glassllm with the saved graph, which genai_config.json names."""
    folder = tmp_path_factory.mktemp("shared") / "onnx"
    return export_onnx(checkpoint, folder, onnx_runtime_optimized=True)


def test_genai_generates_the_oracles_ids_in_one_buffer(
    shared: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Alone and as a padded batch, past and present in one buffer, the ids are torch's."""
    described = json.loads((shared / "genai_config.json").read_text())
    assert described["model"]["decoder"]["filename"] == OPTIMIZED_NAME
    assert described["search"]["past_present_share_buffer"] is True
    assert [generate(shared, [prompt])[0] for prompt in prompts] == expected
    for answer, alone in zip(generate(shared, prompts), expected, strict=True):
        assert answer[: len(alone)] == alone


def test_a_longer_conversation_continues_in_the_buffer(
    shared: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """A prompt given in two parts, the second through the cache, is answered like the whole."""
    import onnxruntime_genai as og

    generator = start(og.Model(str(shared)), 1, len(expected[1]))
    for part in (prompts[1][:13], prompts[1][13:]):
        generator.append_tokens(np.array(part, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)] == expected[1]


def test_a_damaged_buffer_graph_gives_other_ids(
    glass_checkpoint: CheckpointMaker, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """The twin: a row of codes of a merged kernel with every top bit flipped."""
    folder = export_onnx(
        L4QCheckpoint.open(glass_checkpoint("integer")), tmp_path / "onnx", onnx_runtime_optimized=True
    )
    begin = place_of_codes(folder, 2)  # gate and up of the first layer
    data = np.memmap(folder / OPTIMIZED_DATA, mode="r+", dtype=np.uint8)
    data[begin : begin + 4096] ^= 0x88
    data.flush()
    assert [generate(folder, [prompt])[0] for prompt in prompts] != expected


def test_a_head_size_the_operator_refuses_keeps_attention(tmp_path: Path) -> None:
    """head_dim 12: the saved graph has the standard Attention, and no buffer is shared."""
    case = Case(changes={"head_dim": 12}, quant=CASES["none-tied"].quant)
    changes = {**case.changes, "num_attention_heads": 8}  # 96 columns, three groups of 32
    source = make_checkpoint(Case(changes=changes, quant=case.quant), tmp_path / "checkpoint")
    folder = export_onnx(source, tmp_path / "onnx", onnx_runtime_optimized=True)
    operators = {node.op_type for node in onnx.load(folder / OPTIMIZED_NAME, load_external_data=False).graph.node}
    assert "Attention" in operators
    assert "GroupQueryAttention" not in operators
    assert json.loads((folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is False
    difference = answers(saved_session(folder / OPTIMIZED_NAME), "left") - answers(open_session(folder), "left")
    assert np.abs(difference).max() < TOLERANCE


def test_several_tokens_behind_a_batch_s_cache_are_refused(tmp_path: Path) -> None:
    """ONNX Runtime's operator says so instead of computing something else; the plain graph takes them."""
    source = make_checkpoint(CASES["none-tied"], tmp_path / "checkpoint")
    folder = export_onnx(source, tmp_path / "onnx", onnx_runtime_optimized=True)
    assert answers(open_session(folder), "left", (9, 3)).shape == (20, 77)
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        answers(saved_session(folder / OPTIMIZED_NAME), "left", (9, 3))


def test_missing_data_of_the_saved_graph_is_an_error(tmp_path: Path) -> None:
    """Merging a graph whose data is gone names the file."""
    source = make_checkpoint(CASES["none-tied"], tmp_path / "checkpoint")
    folder = export_onnx(source, tmp_path / "onnx", onnx_runtime_optimized=True)
    (folder / OPTIMIZED_DATA).unlink()
    model = onnx.load(folder / OPTIMIZED_NAME, load_external_data=False)
    with pytest.raises(UsageError, match=r"(?s)saved graph cannot be read.*model.ort-cpu.onnx"):
        merge_linears(model, folder / OPTIMIZED_NAME, "other.data")
