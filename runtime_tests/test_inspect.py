"""`l4q-inspect`: the integers of one checkpoint are counted alike in every format, and foreign files are read right."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from rich.console import Console

from exporters.driver import export
from exporters.inspect.cli import command
from exporters.inspect.counts import count, fold, part_of
from exporters.inspect.open import open_source
from exporters.inspect.show import as_json, bars, show
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_common import status
from l4q.config import QuantConfig
from l4q.errors import UsageError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.start_files import ct_parts, ct_section, edit_section, edit_tensors, packed_folder
from runtime_tests.tiny_llama import tiny_checkpoint

FORMATS = ("gptq", "awq", "compressed-tensors", "onnx")


def inspect(path: Path, *flags: str) -> dict[str, Any]:
    """The command's JSON."""
    done = CliRunner().invoke(command, [str(path), "--json", *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def counted(checkpoint: L4QCheckpoint) -> tuple[list[int], dict[str, int]]:
    """Codes and powers of two of the scales, straight from the trained values."""
    codes = np.zeros(1 << checkpoint.quant.bits, dtype=np.int64)
    scales: dict[str, int] = {}
    for module in checkpoint.modules:
        weight = checkpoint.quantized(module)
        codes += np.bincount(weight.codes.ravel(), minlength=len(codes))
        for scale in weight.scales.ravel().tolist():
            power = str(int(np.frexp(scale)[1]) - 1)
            scales[power] = scales.get(power, 0) + 1
    return codes.tolist(), scales


@pytest.fixture(scope="module", params=["none", "integer"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[L4QCheckpoint, Path]:
    """A small llama's checkpoint and its exports to all formats of Hugging Face folders and ONNX."""
    base = tmp_path_factory.mktemp(f"inspect-{request.param}")
    quant = QuantConfig(bits=4, group_size=32, zero_point=request.param)
    checkpoint = tiny_checkpoint(base / "made", quant)
    for name in FORMATS:
        export(checkpoint, name, base / name)
    return checkpoint, base


def test_every_format_shows_the_same_integers(family: tuple[L4QCheckpoint, Path]) -> None:
    """Codes, scales, bits, group size and zero-points of all exports are the checkpoint's own."""
    checkpoint, base = family
    codes, scales = counted(checkpoint)
    for path in (checkpoint.path, *(base / name for name in FORMATS)):
        found = inspect(path)
        assert found["codes"] == {"4": codes}, path
        assert found["scales_log2"] == scales, path
        modules = len(checkpoint.modules)
        kind = checkpoint.quant.zero_point
        assert found["grids"] == {
            "bits": {"4": modules}, "group_sizes": {"32": modules}, "kinds": {kind: modules}, "undecoded": 0,
        }, path  # fmt: skip
        assert found["format"] == (path.name if path != checkpoint.path else "l4q")
    files = sum(file.stat().st_size for file in (base / "gptq").glob("*.safetensors"))
    assert 0 < files - inspect(base / "gptq")["bytes"] < 20_000  # all but the header


def test_a_changed_code_is_seen(family: tuple[L4QCheckpoint, Path], tmp_path: Path) -> None:
    """The twin: one flipped nibble moves one code; one doubled scale moves one scale."""
    shutil.copytree(family[1] / "gptq", tmp_path / "gptq")
    before = inspect(tmp_path / "gptq")

    def damage(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.q_proj.qweight"][0, 0] ^= 1
        tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] *= 2

    edit_tensors(tmp_path / "gptq", damage)
    after = inspect(tmp_path / "gptq")
    moved = np.array(after["codes"]["4"]) - np.array(before["codes"]["4"])
    assert sorted(moved.tolist()) == [-1, *([0] * 14), 1]
    assert after["scales_log2"] != before["scales_log2"]


def test_runtimes(family: tuple[L4QCheckpoint, Path]) -> None:
    """What loads follows from what was found: vLLM refuses asymmetric GPTQ only; plans answer for checkpoints."""
    checkpoint, base = family
    symmetric = checkpoint.quant.zero_point == "none"
    loads = {
        name: {runtime["runtime"]: runtime["loads"] for runtime in inspect(base / name)["runtimes"]} for name in FORMATS
    }
    assert loads["gptq"]["vLLM"] == symmetric
    assert loads["awq"]["vLLM"]
    assert loads["compressed-tensors"]["vLLM"]
    assert loads["onnx"]["ONNX Runtime"]
    plans = {runtime["runtime"]: runtime for runtime in inspect(checkpoint.path)["runtimes"]}
    assert plans["l4q-export --to gptq"]["loads"]
    assert ("vLLM" in plans["l4q-export --to gptq"]["reason"]) == symmetric
    encoding = "Q4_0" if symmetric else "Q5_0"  # its random scales need more bits than Q4_1 holds exactly
    assert plans["l4q-export --to gguf"]["reason"] == f"exact, as {encoding}; runs in llama.cpp"


def test_refused_exports_say_why(tmp_path: Path) -> None:
    """Float zero-points have no AWQ form: the checkpoint's page says so, and still shows its values."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3, group_size=64, zero_point="float"))
    found = inspect(checkpoint.path)
    refused = {runtime["runtime"]: runtime for runtime in found["runtimes"]}["l4q-export --to awq"]
    assert not refused["loads"]
    assert "zero-point" in refused["reason"]
    assert found["codes"] == {"3": counted(checkpoint)[0]}
    assert found["grids"]["kinds"] == {"float": len(checkpoint.modules)}


def test_folders_of_other_peoples_packers(tmp_path: Path) -> None:
    """A folder packed by compressed-tensors' own code holds the codes it was packed from."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=4, group_size=64, zero_point="none"))
    section = ct_section({"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64})
    folder = packed_folder(tmp_path / "theirs", checkpoint, section, ct_parts)
    found = inspect(folder)
    assert found["codes"] == {"4": counted(checkpoint)[0]}
    assert found["grids"]["kinds"] == {"none": len(checkpoint.modules)}
    edit_section(folder, quant_method="elsewhere")
    unknown = inspect(folder)
    assert "no reader for this kind" in unknown["notes"][0]
    assert unknown["codes"] == {}
    assert len(unknown["layers"]) > 10  # its tensors are listed all the same


def test_a_real_third_party_gguf(smollm2_dir: Path) -> None:
    """SmolLM2's Q4_1 and Q8_0 blocks: codes and sizes as gguf-py's own dequantizer and reader give them."""
    path = smollm2_dir / "source.gguf"
    source = open_source(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {entry.name: entry.nbytes for entry in source.entries} == {n: t.n_bytes for n, t in tensors.items()}
    entries = {entry.name: entry for entry in source.entries}
    for name in ("blk.0.attn_k.weight", "blk.29.ffn_down.weight"):
        tensor = tensors[name]
        make = entries[name].values
        assert make is not None
        values = make()
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        blocks = weight.reshape(*values.scales.shape, 32).astype(np.float64)
        steps = (blocks - blocks.min(-1, keepdims=True)) / values.scales.astype(np.float64)[..., None]
        codes = values.codes.reshape(blocks.shape).astype(int)
        low = np.where(values.scales[..., None] > 0, codes.min(-1, keepdims=True), codes.max(-1, keepdims=True))
        assert np.array_equal(np.rint(steps).astype(int), codes - low)
        assert (values.bits, values.group_size, values.kind) == (4, 32, "float")
    counts = count(source, read=False)
    listed = as_json(path, source, counts)
    assert listed["codes"] is None
    assert listed["facts"]["architecture"] == "llama"
    assert listed["bytes"] == sum(int(tensor.n_bytes) for tensor in tensors.values())
    assert {row["encoding"] for row in listed["layers"]} == {"Q8_0", "Q4_1", "F32"}
    assert listed["parts"]["attention"]["tensors"] == 120
    with io.StringIO() as shown:
        show(path, source, counts, Console(width=80, file=shown))
        lines = shown.getvalue().splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert any("blk.*." in line for line in lines)


def test_gguf_and_onnx_of_one_checkpoint(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A folder with one file is that file; ONNX Runtime's own rewriting to MatMulNBits holds the same codes."""
    checkpoint = L4QCheckpoint.open(glass_checkpoint("integer", group_size=32))
    codes, scales = counted(checkpoint)
    for name in ("gguf", "onnx"):
        export(checkpoint, name, tmp_path / name)
        found = inspect(tmp_path / name)
        assert found["codes"] == {"4": codes}
        assert found["scales_log2"] == scales
        assert found["grids"]["kinds"] == {"integer": 24}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = inspect(tmp_path / "optimized.onnx")
    assert {row["encoding"] for row in fused["layers"] if row["grid"]} == {"MatMulNBits 4"}
    # Each of the 341 outputs of gate and up, and every row of the rest, has whole blocks: no padding is counted.
    assert fused["codes"] == {"4": codes}
    assert fused["grids"]["kinds"] == {"integer": 24}
    assert not {r["runtime"]: r["loads"] for r in fused["runtimes"]}["another ONNX runtime"]


def test_tables_fit_80_columns(family: tuple[L4QCheckpoint, Path]) -> None:
    """Nothing printed is wider than 80 columns; layers are folded, parts and histograms are there."""
    for path, flags in ((family[0].path, ()), (family[1] / "onnx", ()), (family[1] / "awq", ("--headers",))):
        shown = CliRunner().invoke(command, [str(path), *flags], catch_exceptions=False).output
        lines = shown.splitlines()
        assert max(map(len, lines[1:])) <= 80, path
        assert "size by part" in shown
        assert ("codes, 4 bits" in shown) == (not flags)
        assert "q_proj" in shown
    assert inspect(family[1] / "awq", "--headers")["codes"] is None


GARBAGE = {
    "nothing": (None, "no such file or folder"),
    "notes.txt": (b"hello", "nothing that l4q-inspect knows"),
    "random.gguf": (b"\x00" * 64, "not a GGUF file"),
    "short.gguf": (b"GGUF\x03\x00\x00\x00", "truncated or damaged"),
    "random.onnx": (bytes(range(256)) * 4, "not an ONNX model"),
    "empty.onnx": (b"", "has no nodes"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_clear_error(name: str, tmp_path: Path) -> None:
    """Files that are nothing, or are damaged, end in one message that names the file."""
    content, expected = GARBAGE[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=expected) as caught:
        open_source(path)
    assert name in str(caught.value)


def test_damaged_folders(family: tuple[L4QCheckpoint, Path], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Cut-off safetensors, a broken config and an empty folder are exit code 2 and one message, never a traceback."""
    cut, broken, empty = tmp_path / "cut", tmp_path / "broken", tmp_path / "empty"
    for folder in (cut, broken):
        shutil.copytree(family[1] / "gptq", folder)
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    (broken / "config.json").write_text("{")
    empty.mkdir()
    for folder, expected in (
        (cut, "not valid safetensors"),
        (broken, "config.json cannot be read"),
        (empty, "an empty folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["l4q-inspect", str(folder)])
        assert status(command) == 2
        told = capsys.readouterr().err
        assert expected in told
        assert str(folder) in told
        assert "Traceback" not in told


def test_names_from_files_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in tensor names are shown as question marks."""
    weight = helper.make_tensor("w\x1b[31m", TensorProto.FLOAT, [8, 8], [0.0] * 64)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 8])
    node = helper.make_node("Identity", ["w\x1b[31m"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [output], [weight])), tmp_path / "odd.onnx")
    shown = CliRunner().invoke(command, [str(tmp_path / "odd.onnx")], catch_exceptions=False).output
    assert "\x1b" not in shown
    assert "w?[31m" in shown


def test_folding_parts_and_bars() -> None:
    """Names fold over layers, belong to parts in Hugging Face's and GGUF's words, and bars keep their proportions."""
    assert fold("model.layers.12.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    expected = {
        "model.embed_tokens.weight": "embeddings", "token_embd.weight": "embeddings", "lm_head.weight": "output head",
        "output.weight": "output head", "blk.0.attn_output.weight": "attention", "blk.0.ffn_norm.weight": "norms",
        "model.layers.0.self_attn.q_norm.weight": "norms", "blk.3.ffn_gate_exps.weight": "experts",
        "model.layers.0.mlp.down_proj": "mlp", "rope_freqs.weight": "other",
    }  # fmt: skip
    assert {name: part_of(name) for name in expected} == expected
    half, full, none = bars([("0", 5), ("1", 10), ("2", 0)])
    assert (half.count("#"), full.count("#"), none.count("#")) == (18, 36, 0)
    assert "33.3 %" in half
