"""The same integers in GPTQ, AWQ and compressed-tensors give the same numbers in vLLM, asymmetric and int3 included.

One worker serves every model here: importing vLLM takes about 13 s, loading a tiny model 3 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig
from runtime_tests.compare import LogprobComparison
from runtime_tests.engines.host import EngineError, RemoteEngine
from runtime_tests.mixed_models import MIXES, mixed_checkpoint
from runtime_tests.thresholds import limits_for
from runtime_tests.tiny_llama import random_weight, tiny_checkpoint

TOKENS = np.random.default_rng(5).integers(3, 320, 64).tolist()

# grid -> formats whose rows must be equal. vLLM's GPTQ loader takes symmetric weights only.
GRIDS: dict[str, tuple[QuantConfig, tuple[str, ...]]] = {
    "int4 symmetric": (QuantConfig(), ("gptq", "awq", "compressed-tensors")),
    "int4 asymmetric": (QuantConfig(zero_point="integer"), ("awq", "compressed-tensors")),
    "int3 symmetric": (QuantConfig(bits=3, group_size=-1), ("gptq", "compressed-tensors")),
    "int3 asymmetric": (QuantConfig(bits=3, group_size=32, zero_point="integer"), ("awq", "compressed-tensors")),
}


class Served:
    """Two workers, vLLM and the torch oracle, and what they answered for each folder."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._engines: dict[str, RemoteEngine] = {}
        self._rows: dict[Path, np.ndarray] = {}
        self._checkpoints: dict[str, L4QCheckpoint] = {}

    def checkpoint(self, grid: str) -> L4QCheckpoint:
        """The tiny checkpoint of a row of GRIDS."""
        if grid not in self._checkpoints:
            self._checkpoints[grid] = tiny_checkpoint(self.base / grid, GRIDS[grid][0])
        return self._checkpoints[grid]

    def folder(self, grid: str, format_name: str) -> Path:
        """Its export, verified bit for bit on the way."""
        target = self.base / grid / format_name
        if not target.exists():
            result = export(self.checkpoint(grid), format_name, target)
            assert result.verified is not None
            assert next(row for row in result.plan.runtimes if row.runtime == "vLLM").loads
        return target

    def rows(self, engine: str, folder: Path) -> np.ndarray:
        """Log-probabilities of TOKENS."""
        if folder not in self._rows:
            if engine not in self._engines:
                options: dict[str, Any] = {"max_model_len": 128} if engine == "vllm" else {}
                self._engines[engine] = RemoteEngine(engine, folder, timeout_s=300, **options)
            elif engine == "vllm":
                self._engines[engine].reload(folder, max_model_len=128)
            else:
                self._engines[engine].reload(folder)
            self._rows[folder] = np.array(self._engines[engine].prompt_logprobs(TOKENS))
        return self._rows[folder]

    def info(self) -> dict[str, str | int | float]:
        """vLLM's facts on the model it loaded last."""
        return self._engines["vllm"].info()

    def close(self) -> None:
        """End both workers."""
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The workers of all tests here."""
    suite = Served(tmp_path_factory.mktemp("formats"))
    yield suite
    suite.close()


def failed(expected: np.ndarray, got: np.ndarray, format_name: str) -> list[str]:
    """The documented bounds of a format that rows break against the oracle's."""
    comparison = LogprobComparison()
    comparison.add(TOKENS, expected, got)
    checks = [limit.check(comparison.stats) for limit in limits_for(format_name, "")]
    assert checks
    return [f"{check.limit.figure} {check.value:g}" for check in checks if not check.passed]


@pytest.mark.parametrize("grid", GRIDS)
def test_formats_of_the_same_integers_give_equal_logprobs(served: Served, grid: str) -> None:
    """Not close but equal: every format hands vLLM's kernel the same codes, scales and zero-points."""
    formats = GRIDS[grid][1]
    first, *others = (served.rows("vllm", served.folder(grid, name)) for name in formats)
    for name, rows in zip(formats[1:], others, strict=True):
        assert np.array_equal(first.view(np.uint32), rows.view(np.uint32)), name
    assert '"CPUWNA16LinearKernel": 8' in str(served.info()["kernels"])


@pytest.mark.parametrize("grid", GRIDS)
def test_vllm_is_within_its_bounds_of_the_oracle(served: Served, grid: str) -> None:
    """The one answer of all formats lies within fp16 noise of torch float32 on the checkpoint."""
    expected = served.rows("torch", served.checkpoint(grid).path)
    for name in GRIDS[grid][1]:
        assert failed(expected, served.rows("vllm", served.folder(grid, name)), name) == []


def test_zero_points_off_by_one_are_noticed(served: Served) -> None:
    """The twin: GPTQ's z - 1 stored in compressed-tensors loads without complaint, and breaks equality and bounds."""
    intact = served.folder("int4 asymmetric", "compressed-tensors")
    damaged = served.base / "off by one"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((intact / "config.json").read_bytes())
    tensors = load_file(intact / "model.safetensors")
    for name, words in tensors.items():
        if name.endswith("weight_zero_point"):
            words -= 0x11111111  # zero-points are at least 1: no nibble borrows
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    rows = served.rows("vllm", damaged)
    assert not np.array_equal(rows, served.rows("vllm", intact))
    expected = served.rows("torch", served.checkpoint("int4 asymmetric").path)
    assert failed(expected, rows, "compressed-tensors")


@pytest.fixture(scope="module")
def partly(served: Served) -> L4QCheckpoint:
    """A symmetric checkpoint whose o_proj stayed dense."""
    return tiny_checkpoint(served.base / "partly", QuantConfig(), dense_linears=["o_proj"])


def test_awq_leaves_dense_linears_alone(served: Served, partly: L4QCheckpoint) -> None:
    """The names in modules_to_not_convert are the ones vLLM skips: 6 of 8 linears run the int4 kernel."""
    folder = export(partly, "awq", served.base / "partly awq").folder
    rows = served.rows("vllm", folder)
    assert '"CPUWNA16LinearKernel": 6' in str(served.info()["kernels"])
    assert failed(served.rows("torch", partly.path), rows, "awq") == []


def test_several_schemes_and_dense_linears_in_one_model(served: Served, partly: L4QCheckpoint) -> None:
    """down_proj asymmetric in groups of 32, the rest symmetric in 64, o_proj dense: compressed-tensors serves it."""
    weights = {module: partly.quantized(module) for module in partly.modules}
    for module in [name for name in weights if name.endswith("down_proj")]:
        finer = QuantConfig(group_size=32, zero_point="integer")
        weights[module] = random_weight(weights[module].shape, finer, 7)
    save_checkpoint(
        served.base / "mixed",
        config=partly.config,
        weights=weights.items(),
        dense=[(name, partly.dense(name)) for name in partly.dense_names],
        quant=partly.quant,
        modules_to_not_convert=[f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)],
    )
    mixed = L4QCheckpoint.open(served.base / "mixed")
    folder = export(mixed, "compressed-tensors", served.base / "mixed export").folder
    rows = served.rows("vllm", folder)
    assert '"CPUWNA16LinearKernel": 6' in str(served.info()["kernels"])
    assert failed(served.rows("torch", mixed.path), rows, "compressed-tensors") == []


@pytest.mark.parametrize("name", MIXES)
def test_modules_on_their_own_grids_and_a_quantized_head(served: Served, name: str) -> None:
    """Mixed grids, skipped modules and lm_head: equal rows in every format that mixes so, within the oracle's bounds.

    Kernels: q, k, v and gate, up are one each, four in a layer; with the head 9, less those left dense. The twin: a
    head whose rows are turned by one is outside of the bounds.
    """
    mix = MIXES[name]
    checkpoint = mixed_checkpoint(mix, served.base / name / "l4q")
    expected = served.rows("torch", checkpoint.path)
    rows = []
    for format_name in mix.formats:
        folder = export(checkpoint, format_name, served.base / name / format_name).folder
        rows.append(served.rows("vllm", folder))
        kernels = 9 - len(mix.skip)
        assert f'"CPUWNA16LinearKernel": {kernels}' in str(served.info()["kernels"])
        assert failed(expected, rows[-1], format_name) == []
    assert np.array_equal(rows[0].view(np.uint32), rows[1].view(np.uint32))
    assert failed(np.roll(expected, 1, axis=1), rows[0], mix.formats[0])


def test_the_rows_are_not_trivially_equal(served: Served) -> None:
    """Other integers give other numbers, so equality above says something."""
    symmetric = served.rows("vllm", served.folder("int4 symmetric", "awq"))
    asymmetric = served.rows("vllm", served.folder("int4 asymmetric", "awq"))
    assert torch.from_numpy(symmetric - asymmetric).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gptq", "Unsupported quantization config: bits=3"),
        ("compressed-tensors", "Failed to find a kernel that can implement the WNA16 linear layer"),
    ],
)
def test_dense_int3_is_refused_as_the_plan_says(served: Served, name: str, message: str) -> None:
    """--container-bits 3 is for other runtimes: vLLM on a CPU refuses it in the plan and in the flesh."""
    options = ExportOptions(container_bits=3)
    result = export(served.checkpoint("int3 symmetric"), name, served.base / f"dense {name}", options, check="none")
    assert not next(row for row in result.plan.runtimes if row.runtime == "vLLM").loads
    with pytest.raises(EngineError, match=message):
        served.rows("vllm", result.folder)
