"""The ONNX folder: what the plan says, what the files hold, what is refused."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import exporters.onnx as onnx_exporter
from exporters.onnx.pack import pack_uint4, unpack_uint4
from exporters.plan import ExportOptions, Fidelity
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig
from runtime_tests.engines.onnxruntime_engine import Engine, read_metadata, read_operators
from runtime_tests.onnx_models import (
    CASES,
    export_onnx,
    make_checkpoint,
    open_session,
    random_weight,
    run_session,
    torch_logits,
    torch_model,
)

MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """A tiny llama on the integer grid."""
    return make_checkpoint(CASES["integer-untied-llama3"], tmp_path_factory.mktemp("source") / "checkpoint")


def mismatches(folder: Path, checkpoint: L4QCheckpoint) -> list[str]:
    """Modules whose foreign decoding differs in any bit from the checkpoint."""
    decoded = dict(onnx_exporter.read_back(folder))
    assert set(decoded) == set(checkpoint.modules)
    wrong = []
    for module, values in decoded.items():
        expected = checkpoint.quantized(module).dequantize()
        assert values.dtype == np.float32
        assert values.shape == expected.shape
        if not np.array_equal(values.view(np.uint32), expected.view(np.uint32)):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The reference evaluator of onnx decodes the file's own nodes to the trained weights, and its checker accepts."""
    checkpoint = make_checkpoint(CASES[name], tmp_path / "checkpoint")
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    assert mismatches(folder, checkpoint) == []
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)


def flip_nibble(codes: np.ndarray) -> np.ndarray:
    """One code with its lowest bit flipped."""
    codes[3, 5] ^= 1
    return codes


def swap_rows(codes: np.ndarray) -> np.ndarray:
    """Two output rows (columns of [K, N]) exchanged."""
    codes[:, [0, 1]] = codes[:, [1, 0]]
    return codes


@pytest.mark.parametrize("fault", [flip_nibble, swap_rows])
def test_corrupted_codes_are_read_back_as_such(
    fault: Callable[[np.ndarray], np.ndarray], checkpoint: L4QCheckpoint, tmp_path: Path
) -> None:
    """One changed nibble, or two swapped rows, in model.onnx.data shows as exactly that module."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    shape = checkpoint.quantized(MODULE).codes.T.shape
    patch_data(folder, f"{MODULE}.weight", lambda raw: pack_uint4(fault(unpack_uint4(raw.view(np.uint8), shape))))
    assert mismatches(folder, checkpoint) == [MODULE]


@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_corrupted_group_parameters_are_read_back_as_such(part: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """The lowest bit of one scale or zero-point in model.onnx.data shows as exactly that module."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")

    def flip(raw: np.ndarray) -> np.ndarray:
        raw[0] ^= 1
        return raw

    patch_data(folder, f"{MODULE}.{part}", flip)
    assert mismatches(folder, checkpoint) == [MODULE]


def patch_data(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite one initializer's bytes in place, wherever it is stored."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    if tensor.raw_data:
        tensor.raw_data = change(np.frombuffer(tensor.raw_data, dtype=np.uint8).copy()).tobytes()
        onnx.save(model, folder / "model.onnx")
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, size = int(place["offset"]), int(place["length"])
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[start : start + size] = change(
        np.frombuffer(bytes(data[start : start + size]), dtype=np.uint8).copy()
    ).tobytes()
    (folder / "model.onnx.data").write_bytes(data)


def test_equal_exports_have_equal_bytes(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Writing twice gives the same bytes in every file."""
    first, second = (export_onnx(checkpoint, tmp_path / name) for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert names[-2:] == ["model.onnx", "model.onnx.data"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_plan_counts_the_bytes_and_the_writer_reports_each_tensor(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Planned bytes are the file's tensor bytes, all exact; on_tensor hears every planned name once."""
    plan = onnx_exporter.plan(checkpoint, ExportOptions())
    seen: list[str] = []
    tmp_path = tmp_path / "onnx"
    tmp_path.mkdir()
    onnx_exporter.write(checkpoint, plan, tmp_path, ExportOptions(), seen.append)
    assert sorted(seen) == sorted(tensor.name for tensor in plan.tensors)
    assert {tensor.fidelity for tensor in plan.tensors} == {Fidelity.EXACT}
    assert [tensor.name for tensor in plan.quantized] == list(checkpoint.modules)
    stored = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for tensor in plan.quantized:
        parts = [stored[f"{tensor.name}.{part}"] for part in ("weight", "scales", "zeros")]
        assert sum(len(part.raw_data) for part in parts) == tensor.nbytes


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    """The embedding matrix serves the head: one initializer, read by Gather and by the head's Transpose."""
    checkpoint = make_checkpoint(CASES["none-tied"], tmp_path / "checkpoint")
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    readers = [node.op_type for node in model.graph.node if "model.embed_tokens.weight" in node.input]
    assert readers == ["Gather", "Transpose"]


def test_the_file_holds_standard_operators_only(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """No contrib domain, no Transpose on quantized weights, one DequantizeLinear per linear with one reader."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert [r.op_type for r in model.graph.node if node.output[0] in r.input] == ["MatMul"]
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == len(checkpoint.modules)


def test_the_folder_records_the_accuracy_level(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Level 4 goes to the model's metadata, to genai_config.json and, by default, to our engine."""
    folder = export_onnx(checkpoint, tmp_path / "onnx", onnx_accuracy_level=4)
    metadata = open_session(folder).get_modelmeta().custom_metadata_map
    assert metadata["l4q.accuracy_level"] == "4"
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "4"
    assert genai["search"]["past_present_share_buffer"] is False
    assert Engine(str(folder), threads=1).info()["accuracy_level"] == 4


def test_config_json_is_the_plain_models(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """config.json describes the float32 model and no longer asks for l4q."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_engines_protobuf_walk_agrees_with_onnx(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Operators and metadata read without the onnx package are those onnx reads."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    raw = (folder / "model.onnx").read_bytes()
    assert list(read_operators(raw)) == [node.op_type for node in model.graph.node]
    assert read_metadata(raw) == {entry.key: entry.value for entry in model.metadata_props}
    with pytest.raises(ValueError, match="not an ONNX file"):
        read_metadata(b"\x07")


def test_mixed_and_half_precision_checkpoints_export(tmp_path: Path) -> None:
    """bfloat16 dense tensors are widened exactly, and a linear left dense stays a float32 matrix."""
    base = make_checkpoint(CASES["none-tied"], tmp_path / "base")
    dense = {name: base.dense(name).to(torch.bfloat16) for name in base.dense_names}
    weights = {module: base.quantized(module) for module in base.modules}
    dense[f"{MODULE}.weight"] = torch.from_numpy(weights.pop(MODULE).dequantize())
    save_checkpoint(tmp_path / "c", config=base.config, weights=weights.items(), dense=dense.items(), quant=base.quant)
    checkpoint = L4QCheckpoint.open(tmp_path / "c")
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    ids = np.random.default_rng(0).integers(3, 77, (1, 11))
    logits, _ = run_session(open_session(folder), ids, np.ones_like(ids))
    assert np.abs(logits - torch_logits(torch_model(checkpoint), ids)).max() <= 1e-4
    assert Engine(str(folder), threads=1).info()["matmulnbits"] == len(base.modules) - 1


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_a_real_model_keeps_its_logprobs(zero_point: str, glassllm_dir: Path, tmp_path: Path) -> None:
    """GlassLLM, whose down_proj has 341 columns: exact bytes, all fused, torch's log-probabilities."""
    quant = QuantConfig.from_dict({"bits": 4, "group_size": -1, "zero_point": zero_point})
    checkpoint = quantize_folder(glassllm_dir, quant, tmp_path / "checkpoint")
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    assert mismatches(folder, checkpoint) == []
    engine = Engine(str(folder), threads=1)
    info = engine.info()
    assert (info["matmulnbits"], info["dequantize_linear"]) == (len(checkpoint.modules), 0)
    ids = np.random.default_rng(0).integers(4, 1000, 96)
    expected = torch.log_softmax(torch.from_numpy(torch_logits(torch_model(checkpoint), ids[None])[0]).double(), dim=-1)
    assert np.abs(engine.prompt_logprobs(ids.tolist()) - expected.numpy()).max() < 1e-4
    assert (folder / "tokenizer.json").is_file()


def quantize_folder(source: Path, quant: QuantConfig, target: Path) -> L4QCheckpoint:
    """Round-to-nearest codes of a real model's layer linears: test material, not a quantizer to compare with."""
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    linears = [name.removesuffix(".weight") for name in state if name.endswith("_proj.weight")]
    weights = {}
    for seed, module in enumerate(linears):
        values = state.pop(f"{module}.weight").numpy()
        scales = (np.abs(values).max(axis=1, keepdims=True) / 7).astype(np.float16)
        zeros = None if quant.zero_point == "none" else np.full(scales.shape, 7, dtype=np.uint8)
        codes = np.clip(np.rint(values / scales.astype(np.float32)) + (8 if zeros is None else 7), 0, 15)
        grid = random_weight((values.shape[0], values.shape[1]), quant, seed)
        weights[module] = replace(grid, codes=codes.astype(np.uint8), scales=scales, zeros=zeros)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    side_files = [source / "tokenizer.json"]
    save_checkpoint(
        target, config=config, weights=weights.items(), dense=state.items(), quant=quant, side_files=side_files
    )
    return L4QCheckpoint.open(target)


def test_the_model_cards_snippet_runs(
    checkpoint: L4QCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python of usage() runs inside the folder and prints the recorded level."""
    folder = export_onnx(checkpoint, tmp_path / "onnx", onnx_accuracy_level=4)
    (tmp_path / "snippet.py").write_text(onnx_exporter.usage().split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(folder)
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert capsys.readouterr().out == "4\n"
