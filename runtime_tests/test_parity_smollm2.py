"""The promise itself, on SmolLM2-135M in the real runtimes: the same integers, the same perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporters import gguf as gguf_exporter
from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.errors import VerificationError
from runtime_tests.compare import LogprobComparison, ParityStats
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.gguf_requantize import requantize
from runtime_tests.parity_runs import (
    Oracle,
    ParityOptions,
    ParityRow,
    assert_parity,
    run_oracle,
    run_parity,
    run_target,
)
from runtime_tests.report import markdown, report_rows
from runtime_tests.run import read_windows, update_cards
from runtime_tests.targets import detect

pytestmark = pytest.mark.slow_engine

WINDOWS, WINDOW = 2, 256
F32_KV: dict[str, Any] = {"kv": "f32", "flash_attn": False}

# zero_point -> (folder name, format, options). vLLM's GPTQ loader takes symmetric weights only: no run of "integer".
EXPORTS: dict[str, tuple[tuple[str, str, ExportOptions], ...]] = {
    "none": (
        ("gptq", "gptq", ExportOptions()),
        ("gguf", "gguf", ExportOptions()),
        ("gguf-F32", "gguf", ExportOptions(gguf_type="F32")),
        ("onnx", "onnx", ExportOptions()),
    ),
    "integer": (
        ("gguf", "gguf", ExportOptions()),
        ("gguf-Q5_0", "gguf", ExportOptions(gguf_type="Q5_0")),
        ("onnx", "onnx", ExportOptions()),
    ),
}


class Suite:
    """One checkpoint, its exports, the oracle's answers and every runtime's row."""

    def __init__(self, checkpoint: Path, base: Path, kind: str, text: Path) -> None:
        self.checkpoint = L4QCheckpoint.open(checkpoint)
        self.folders: dict[str, Path] = {}
        self.exact: dict[str, tuple[int, int]] = {}
        for name, format_name, options in EXPORTS[kind]:
            result = export(self.checkpoint, format_name, base / name, options)
            assert result.verified is not None
            self.folders[name] = result.folder
            self.exact[name] = (result.verified.exact, result.verified.total)
        self.windows, prompt = read_windows(checkpoint, text, WINDOWS, WINDOW)
        self.options = ParityOptions(prompt=prompt, new_tokens=16, check_bits=False)
        self.oracle: Oracle = run_oracle(checkpoint, self.windows, self.options)
        self.rows: dict[str, ParityRow] = {}
        for name, folder in self.folders.items():
            for target in detect(folder):
                label = f"{name}@{target.variant}" if target.format == "onnx" else name
                self.rows[label] = run_target(self.checkpoint, target, self.oracle, self.options)


@pytest.fixture(scope="module", params=["none", "integer"])
def suite(
    request: pytest.FixtureRequest,
    smollm2_checkpoint: CheckpointMaker,
    smollm2_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Suite:
    """Everything of one zero-point kind, run once."""
    base = tmp_path_factory.mktemp(f"suite-{request.param}")
    text = smollm2_dir.parent / "text" / "wiki_demo.txt"
    return Suite(smollm2_checkpoint(request.param), base, request.param, text)


def figures(row: ParityRow) -> ParityStats:
    """A row's figures; a row without any shows its error."""
    assert row.stats is not None, row.error
    return row.stats


def test_210_of_210_tensors_are_exact(suite: Suite) -> None:
    """Every quantized tensor of every export decodes bit for bit, judged by foreign decoders."""
    assert suite.exact == dict.fromkeys(suite.folders, (210, 210))


def test_every_runtime_is_within_its_bounds(suite: Suite) -> None:
    """vLLM, llama.cpp and ONNX Runtime all stay within the documented thresholds, and none is missing."""
    failed = {
        name: row.error or [check.to_dict() for check in row.checks if not check.passed]
        for name, row in suite.rows.items()
        if not row.passed
    }
    assert not failed
    engines = {row.target.engine for row in suite.rows.values()}
    expected = {"llamacpp", "onnxruntime"} | ({"vllm"} if "gptq" in suite.folders else set())
    assert engines == expected


def test_float_engines_continue_like_the_oracle(suite: Suite) -> None:
    """Greedy text: where the runtime computes in float32, 16 of 16 tokens equal the oracle's."""
    assert len(suite.oracle.greedy) == 16
    for name in {"gguf-F32", "onnx@0"} & set(suite.rows):
        assert suite.rows[name].greedy_match == (16, 16), name


def test_every_linear_is_fused_in_onnx_runtime(suite: Suite) -> None:
    """210 MatMulNBits nodes and no DequantizeLinear in the optimized graph, at both accuracy levels."""
    for name in ("onnx@0", "onnx@4"):
        info = suite.rows[name].info
        assert info["matmulnbits"] == 210, info
        assert info["dequantize_linear"] == 0, info
    assert figures(suite.rows["onnx@4"]).kl > 10 * figures(suite.rows["onnx@0"]).kl  # int8 activations do differ


def test_gguf_noise_is_llama_cpps_own(suite: Suite, smollm2_dir: Path, tmp_path: Path) -> None:
    """Our file's distance from torch is at most 1.3 times that of llama.cpp's own Q4_0 / Q4_1 of the same weights."""
    kind = next(row.target.variant for name, row in suite.rows.items() if name == "gguf")
    float_folder = suite.folders.get("gguf-F32")
    if float_folder is None:
        float_folder = export(suite.checkpoint, "gguf", tmp_path / "f32", ExportOptions(gguf_type="F32")).folder
    own = tmp_path / "own"
    own.mkdir()
    assert requantize(next(float_folder.glob("*.gguf")), own / f"own-{kind}.gguf", kind) == 210
    own_kl = own_noise(own, smollm2_dir, suite.windows)
    assert figures(suite.rows["gguf"]).kl <= 1.3 * own_kl


def own_noise(folder: Path, model_dir: Path, windows: list[list[int]]) -> float:
    """KL between torch on a GGUF file's dequantized weights and llama.cpp on the file."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    replaced = 0
    with torch.no_grad():
        for module, weight in gguf_exporter.read_back(folder):
            model.get_submodule(module).weight.copy_(torch.from_numpy(weight))
            replaced += 1
    assert replaced == 210
    comparison = LogprobComparison()
    with RemoteEngine("llamacpp", folder, threads=2, **F32_KV) as engine, torch.no_grad():
        for window in windows:
            expected = torch.log_softmax(model(torch.tensor([window])).logits[0].double(), -1).float().numpy()
            comparison.add(window, expected, engine.prompt_logprobs(window))
    return comparison.stats.kl


DAMAGES = ("scale", "row swap", "nibble")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_fails_the_bounds(
    damage: str, smollm2_checkpoint: CheckpointMaker, smollm2_dir: Path, tmp_path: Path
) -> None:
    """The twin: an export of a damaged copy, held against the intact oracle, breaks bounds in a real runtime."""
    source = L4QCheckpoint.open(smollm2_checkpoint("none"))
    save_checkpoint(
        tmp_path / "damaged",
        config=source.config,
        weights=((module, damaged(source, module, damage)) for module in source.modules),
        dense=((name, source.dense(name)) for name in source.dense_names),
        quant=source.quant,
        modules_to_not_convert=["lm_head"],
        side_files=source.side_files(),
    )
    folder = export(L4QCheckpoint.open(tmp_path / "damaged"), "onnx", tmp_path / "onnx").folder
    windows, _ = read_windows(source.path, smollm2_dir.parent / "text" / "wiki_demo.txt", 1, 128)
    report = run_parity(source.path, detect(folder)[:1], windows)
    row = report.rows[0]
    assert not row.passed
    assert row.exact == 209  # the foreign decoder names the damaged module
    assert any(not check.passed for check in row.checks), figures(row)
    with pytest.raises(VerificationError, match="parity failed"):
        assert_parity(report)


def damaged(source: L4QCheckpoint, module: str, damage: str) -> Any:
    """One module of the model with wrong scales, two exchanged halves of rows, or flipped high bits."""
    weight = source.quantized(module)
    if module == "model.layers.12.mlp.down_proj":
        if damage == "scale":
            weight.scales[:] = weight.scales * np.float16(1.5)
        elif damage == "row swap":
            half = weight.out_features // 2
            weight.codes[:] = np.roll(weight.codes, half, axis=0)
        else:
            weight.codes[:, ::16] ^= 8
    return weight


def test_reports_and_cards_carry_the_figures(suite: Suite) -> None:
    """Table, Markdown and model card show the measured numbers of the run."""
    report: dict[str, Any] = {
        "settings": {"text": "wiki_demo.txt", "windows": 1, "tokens_per_window": suite.oracle.stats.tokens},
        "tokens": suite.oracle.stats.tokens,
        "oracle": {"perplexity": suite.oracle.stats.oracle_perplexity, "tokens_per_s": suite.oracle.tokens_per_s},
        "rows": [row.to_dict() for row in suite.rows.values()],
    }
    cells = report_rows(report)
    assert len(cells) == 1 + len(suite.rows)
    assert all(row[-1] == "ok" for row in cells[1:])
    shown = f"{figures(suite.rows['gguf']).perplexity:.4f}"
    assert shown in markdown(report, report["rows"])
    update_cards(report)
    assert shown in (suite.folders["gguf"] / "README.md").read_text()
