"""The decoding benchmark: its builds hold the same weights, and its ratios are of medians."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from runtime_tests.engines.host import RemoteEngine
from tools.bench_decode import GENAI, RUNTIMES, Speeds, command, summary, table
from tools.bench_decode_builds import gguf_q4_0, gguf_q4_k_m, requantize
from tools.bench_export_models import MODELS, write_random

PROMPT = list(range(100, 116))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """The tiny model, random codes."""
    folder = tmp_path_factory.mktemp("decode") / "checkpoint"
    write_random(MODELS["tiny"], folder, smollm2_dir)
    return folder


def test_llama_cpps_build_has_our_weights_and_types(checkpoint: Path, tmp_path: Path) -> None:
    """Its Q4_0 file has our export's tensors, types and sizes, and the same integers up to the scale's sign."""
    opened = L4QCheckpoint.open(checkpoint)
    export(opened, "gguf", tmp_path / "ours", ExportOptions(gguf_embeddings="q8_0"), check="none")
    requantize(checkpoint, tmp_path / "own", gguf_q4_0)
    ours = {t.name: t for t in gguf.GGUFReader(next((tmp_path / "ours").glob("*.gguf"))).tensors}
    own = {t.name: t for t in gguf.GGUFReader(tmp_path / "own" / "model.gguf").tensors}
    assert {n: (t.tensor_type, t.n_bytes) for n, t in ours.items()} == {
        n: (t.tensor_type, t.n_bytes) for n, t in own.items()
    }
    names = [name for name in ours if name.startswith("blk.0") and ours[name].tensor_type.name == "Q4_0"]
    for name in names:
        left, right = (gguf.quants.dequantize(tensors[name].data, ours[name].tensor_type) for tensors in (ours, own))
        step = np.abs(left).max() / 8
        assert np.abs(left - right).max() < step
        other = ours[name.replace("blk.0", "blk.1")]
        wrong = gguf.quants.dequantize(other.data, other.tensor_type)
        assert np.abs(wrong - right).max() > step


def test_q4_k_m_is_llama_cpps_recipe() -> None:
    """The head and every third value or down projection in the middle, and all at both ends, have 6 bits."""
    assert gguf_q4_k_m("token_embd.weight", -1, 16) == "Q6_K"
    down = [gguf_q4_k_m("blk.0.ffn_down.weight", layer, 16) for layer in range(16)]
    assert [layer for layer, kind in enumerate(down) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {gguf_q4_k_m("blk.0.ffn_up.weight", layer, 16) for layer in range(16)} == {"Q4_K"}


def test_genai_generates_what_onnx_runtime_does(checkpoint: Path, tmp_path: Path) -> None:
    """The engine gives as many ids as asked for and those of a plain session; another prompt gives others."""
    export(L4QCheckpoint.open(checkpoint), "onnx", tmp_path / "onnx", check="none")
    with (
        RemoteEngine(GENAI, tmp_path / "onnx", intra_op_threads=1) as genai,
        RemoteEngine("onnxruntime", tmp_path / "onnx") as plain,
    ):
        ids, seconds = genai.generate(PROMPT, 8)
        assert len(ids) == 8
        assert seconds > 0
        assert ids == plain.generate(PROMPT, 8)[0]
        assert ids != genai.generate(PROMPT[::-1], 8)[0]
        assert genai.info()["runtime"] == "onnxruntime-genai"


def test_the_last_line(tmp_path: Path, smollm2_dir: Path) -> None:
    """--quick prints one table and ends with one JSON object of the documented shape, leaving nothing behind."""
    options = ["--model", "tiny", "--quick", "--repetitions", "1", "--runtime", "llama.cpp"]
    paths = ["--scratch", str(tmp_path), "--assets", str(smollm2_dir.parent), "--report", str(tmp_path / "all.json")]
    result = CliRunner().invoke(command, [*options, *paths], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert set(last) == {"llama.cpp"}
    assert set(last["llama.cpp"]) == {"decode_vs_own_4bit", "decode_vs_16bit"}
    assert all(value > 0 for value in last["llama.cpp"].values())
    assert sum(line.startswith("| llama.cpp |") for line in result.stdout.splitlines()) == len(RUNTIMES["llama.cpp"])
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_ratios_are_of_medians_against_the_fastest() -> None:
    """By hand: the worst pair counts, against the faster 16-bit model; the pair's own base is in the table."""
    rows = [("a", "ours", "p", 9.0), ("b", "own", "p", 10.0), ("c", "ours", "q", 8.0), ("d", "own", "q", 8.0)]
    rows += [("e", "16-bit", "", 4.0), ("f", "16-bit", "", 5.0)]
    found = [
        Speeds(build=name, role=role, pair=pair, nbytes=1, prefill=[1.0], decode=[value, value + 1, value - 9])  # type: ignore[arg-type]
        for name, role, pair, value in rows
    ]
    assert summary(found) == {"decode_vs_own_4bit": 0.9, "decode_vs_16bit": 1.6}
    lines = table("vllm", found)
    assert [line.split(" | ")[6] for line in lines] == ["1.00", "0.90", "1.00", "1.00", "2.25", "1.80"]


def test_every_runtime_can_be_compared() -> None:
    """Each has ours, a 16-bit model, and an own build for every one of ours."""
    for builds in RUNTIMES.values():
        ours = {build.pair for build in builds if build.role == "ours"}
        assert ours
        assert ours <= {build.pair for build in builds if build.role == "own"}
        assert any(build.role == "16-bit" for build in builds)
