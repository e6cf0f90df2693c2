"""vLLM itself on GPTQ exports of a tiny llama: what it loads, what it refuses, and that its full rows can be trusted.

One worker serves every model here: importing vLLM takes about 13 s, loading a tiny model 4 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.engines.host import EngineError, RemoteEngine
from runtime_tests.engines.vllm_engine import check_reported, join_captured
from runtime_tests.tiny_llama import export_gptq, tiny_checkpoint

TOKENS = np.random.default_rng(3).integers(3, 320, 64).tolist()
# float16 activations against float32 (FORMAT: vLLM on SmolLM2 stays below 0.005 with any 4-bit format and with none)
MEAN_TOLERANCE = 0.01


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """A symmetric tiny checkpoint."""
    return tiny_checkpoint(tmp_path_factory.mktemp("symmetric"), QuantConfig())


@pytest.fixture(scope="module")
def exported(checkpoint: L4QCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its GPTQ export."""
    folder = tmp_path_factory.mktemp("exports") / "gptq"
    export_gptq(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def started(exported: Path) -> Iterator[tuple[RemoteEngine, np.ndarray]]:
    """The one vLLM worker and its rows for TOKENS on the export it starts with."""
    with RemoteEngine("vllm", exported, timeout_s=300, max_model_len=256) as remote:
        yield remote, np.array(remote.prompt_logprobs(TOKENS))


@pytest.fixture(scope="module")
def vllm(started: tuple[RemoteEngine, np.ndarray]) -> RemoteEngine:
    """The worker; tests load what they need."""
    return started[0]


@pytest.fixture(scope="module")
def served(started: tuple[RemoteEngine, np.ndarray]) -> np.ndarray:
    """The full rows of vLLM for TOKENS on the export."""
    return started[1]


@pytest.fixture(scope="module")
def judged(checkpoint: L4QCheckpoint) -> Iterator[tuple[RemoteEngine, np.ndarray]]:
    """The torch oracle and its rows for TOKENS on the checkpoint."""
    with RemoteEngine("torch", checkpoint.path, timeout_s=120) as remote:
        yield remote, np.array(remote.prompt_logprobs(TOKENS))


@pytest.fixture(scope="module")
def oracle(judged: tuple[RemoteEngine, np.ndarray]) -> RemoteEngine:
    """The oracle; tests load what they need."""
    return judged[0]


@pytest.fixture(scope="module")
def expected(judged: tuple[RemoteEngine, np.ndarray]) -> np.ndarray:
    """The oracle's rows for TOKENS on the checkpoint."""
    return judged[1]


def test_rows_are_distributions_and_agree_with_vllms_own_numbers(vllm: RemoteEngine, served: np.ndarray) -> None:
    """Full-vocabulary rows sum to one and match the prompt logprobs vLLM reports; the linears run its int4 kernel."""
    assert served.shape == (len(TOKENS), 320)
    assert np.abs(np.exp(served.astype(np.float64)).sum(axis=1) - 1).max() < 1e-5
    facts = vllm.info()
    assert facts["capture_deviation"] < 1e-5
    assert facts["quantization"] == "auto_gptq"
    assert '"CPUWNA16LinearKernel": 8' in facts["kernels"]


def test_vllm_agrees_with_the_oracle(served: np.ndarray, expected: np.ndarray) -> None:
    """The exported integers in vLLM stay within float16 noise of torch on the dequantized checkpoint."""
    assert np.abs(served - expected).mean() < MEAN_TOLERANCE


def test_a_damaged_export_leaves_the_noise_floor(
    vllm: RemoteEngine, exported: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """Swapping two halves of one layer's rows loads without complaint and is far outside the tolerance."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((exported / "config.json").read_bytes())
    tensors = load_file(exported / "model.safetensors")
    words = tensors["model.layers.0.mlp.down_proj.qweight"]
    tensors["model.layers.0.mlp.down_proj.qweight"] = words.roll(words.shape[1] // 2, dims=1).contiguous()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    vllm.reload(damaged, max_model_len=256)
    assert np.abs(vllm.prompt_logprobs(TOKENS) - expected).mean() > 5 * MEAN_TOLERANCE


def test_both_zero_point_conventions_give_equal_logprobs(
    vllm: RemoteEngine, checkpoint: L4QCheckpoint, served: np.ndarray, tmp_path: Path
) -> None:
    """The same integers as "gptq_v2" give the very same numbers."""
    export_gptq(checkpoint, tmp_path / "v2", gptq_format="gptq_v2")
    vllm.reload(tmp_path / "v2", max_model_len=256)
    assert np.array_equal(vllm.prompt_logprobs(TOKENS), served)


def test_greedy_tokens_are_the_oracles_choice(
    vllm: RemoteEngine, exported: Path, oracle: RemoteEngine, checkpoint: L4QCheckpoint
) -> None:
    """Every token vLLM generates is within float16 noise of the oracle's best one, and decode time is reported."""
    vllm.reload(exported, max_model_len=256)
    oracle.reload(checkpoint.path)
    new_ids, seconds = vllm.generate(TOKENS, 16)
    rows = oracle.prompt_logprobs(TOKENS + new_ids)[len(TOKENS) - 1 : -1]
    chosen = rows[np.arange(len(new_ids)), new_ids]
    assert len(new_ids) == 16 or new_ids[-1] == 2
    assert (rows.max(axis=1) - chosen).max() < 10 * MEAN_TOLERANCE
    assert seconds > 0


def test_a_model_with_dense_linears_loads(vllm: RemoteEngine, oracle: RemoteEngine, tmp_path: Path) -> None:
    """Linears that stayed dense are skipped through `dynamic` and computed with their own weights."""
    partly = tiny_checkpoint(tmp_path, QuantConfig(group_size=32), dense_linears=["o_proj"])
    export_gptq(partly, tmp_path / "out")
    vllm.reload(tmp_path / "out", max_model_len=256)
    rows = np.array(vllm.prompt_logprobs(TOKENS))
    assert '"CPUWNA16LinearKernel": 6' in vllm.info()["kernels"]
    oracle.reload(partly.path)
    assert np.abs(rows - oracle.prompt_logprobs(TOKENS)).mean() < MEAN_TOLERANCE


def test_vllm_refuses_asymmetric_gptq_as_planned(vllm: RemoteEngine, exported: Path, tmp_path: Path) -> None:
    """The plan's warning is real: sym: false does not load, and the worker goes on to serve the next model."""
    plan = export_gptq(tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer")), tmp_path / "out")
    assert not next(row for row in plan.runtimes if row.runtime == "vLLM").loads
    with pytest.raises(EngineError, match=r"bits=4, sym=False"):
        vllm.reload(tmp_path / "out", max_model_len=256)
    vllm.reload(exported, max_model_len=256)
    assert vllm.prompt_logprobs(TOKENS[:1]).shape == (1, 320)


def test_shifted_or_missing_rows_are_noticed() -> None:
    """The capture check fails when rows are off by one position, doubled or incomplete."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    tokens = [4, 8, 15, 16, 23, 42]
    rows = join_captured([logits[5:], logits[:5]], 6)
    reported = [float(rows[t, tokens[t + 1]]) for t in range(5)]
    assert check_reported(rows, tokens, reported) == 0.0
    with pytest.raises(RuntimeError, match="differ from vLLM's own"):
        check_reported(np.roll(rows, 1, axis=0), tokens, reported)
    for calls in (
        [logits[:5], logits[5:]],
        [logits[5:], logits[:4]],
        [logits[5:]],
        [logits[5:], logits[:3], logits[3:5]],
    ):
        with pytest.raises(RuntimeError, match="computed logits in calls of"):
            join_captured(calls, 6)
