"""The ONNX graph's numbers: ONNX Runtime against transformers on the dequantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime_tests.engines.onnxruntime_engine import Engine
from runtime_tests.onnx_models import (
    CASES,
    Exported,
    corrupted,
    export_onnx,
    make_checkpoint,
    open_session,
    run_session,
    torch_logits,
    torch_model,
)

# Logits here are of order 10 and both sides add up the same float32 products in another order: 3e-5 or less as drawn,
# 1.7e-4 for the worst of other draws (per-row groups with float zero-points).
LOGIT_TOLERANCE = 3e-4
FAULT = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each case of the table, exported once."""
    root = tmp_path_factory.mktemp("onnx")
    checkpoint = make_checkpoint(CASES[request.param], root / "checkpoint")
    return Exported.make(checkpoint, root / "onnx")


def token_batch(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids below 77 and a mask of ones, both int64 [rows, length]."""
    ids = np.random.default_rng(seed).integers(3, 77, (rows, length))
    return ids, np.ones_like(ids)


def test_logits_equal_transformers(exported: Exported) -> None:
    """Every architecture and grid computes transformers' logits on a dynamic batch."""
    ids, mask = token_batch(2, 19)
    logits, _ = run_session(exported.session, ids, mask)
    expected = torch_logits(exported.model, ids)
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() <= LOGIT_TOLERANCE


def test_a_left_padded_batch_is_right(exported: Exported) -> None:
    """A padded row gives the logits it gives alone, whatever stands in the padding."""
    ids, mask = token_batch(2, 12)
    mask[1, :5] = 0
    logits, _ = run_session(exported.session, ids, mask)
    assert np.isfinite(logits).all()
    alone = torch_logits(exported.model, ids[1:, 5:])
    assert np.abs(logits[1:, 5:] - alone).max() <= LOGIT_TOLERANCE
    assert np.abs(logits[0] - torch_logits(exported.model, ids[:1])[0]).max() <= LOGIT_TOLERANCE


def test_ignoring_the_padding_is_detected(exported: Exported) -> None:
    """With a mask of ones the padded row is wrong, so the test above can fail."""
    ids, mask = token_batch(2, 12)
    logits, _ = run_session(exported.session, ids, mask)
    difference = np.abs(logits[1:, 5:] - torch_logits(exported.model, ids[1:, 5:])).max()
    assert difference > 10 * LOGIT_TOLERANCE


def test_cached_steps_equal_the_full_forward(exported: Exported) -> None:
    """Prompt, chunk and single steps through the cache, left padding included, give one forward's logits."""
    ids, mask = token_batch(2, 14)
    mask[0, :3] = 0
    full, _ = run_session(exported.session, ids, mask)
    cache: list[np.ndarray] | None = None
    parts = []
    for start, stop in [(0, 8), (8, 11), (11, 12), (12, 13), (13, 14)]:
        logits, cache = run_session(exported.session, ids[:, start:stop], mask[:, :stop], cache)
        parts.append(logits)
    stepped = np.concatenate(parts, axis=1)
    assert np.abs(stepped - full)[mask.astype(bool)].max() <= LOGIT_TOLERANCE
    assert cache is not None
    assert cache[0].shape == (2, 2, 14, 32)  # [batch, kv_heads, total, head_dim]


def test_every_linear_became_matmulnbits(exported: Exported) -> None:
    """ONNX Runtime's optimized graph has one MatMulNBits per quantized linear and no DequantizeLinear."""
    engine = Engine(str(exported.folder), threads=1)
    info = engine.info()
    engine.close()
    assert info["matmulnbits"] == len(exported.checkpoint.modules)
    assert info["dequantize_linear"] == 0
    assert info["accuracy_level"] == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The simplest case, for tests that need one model only."""
    root = tmp_path_factory.mktemp("onnx-plain")
    checkpoint = make_checkpoint(CASES["none-tied"], root / "checkpoint")
    return Exported.make(checkpoint, root / "onnx")


@pytest.mark.parametrize("fault", ["nibble", "scale", "row swap"])
def test_a_corrupted_weight_moves_the_logits(plain: Exported, fault: str) -> None:
    """The logit comparison fails when one layer holds one wrong code, scale or row order."""
    wrong = corrupted(plain.checkpoint.quantized(FAULT))[fault]
    ids, mask = token_batch(2, 19)
    logits, _ = run_session(plain.session, ids, mask)
    expected = torch_logits(torch_model(plain.checkpoint, {FAULT: wrong}), ids)
    assert np.abs(logits - expected).max() > 10 * LOGIT_TOLERANCE


def test_accuracy_level_4_rounds_activations(plain: Exported) -> None:
    """Level 4 answers differently from level 0, and it is what a session without the option gets."""
    ids, mask = token_batch(1, 19)
    exact, four, default = (run_session(open_session(plain.folder, level), ids, mask)[0] for level in (0, 4, None))
    assert np.abs(four - exact).max() > 10 * LOGIT_TOLERANCE
    assert np.array_equal(four, default)


def test_finer_blocks_keep_the_weights_and_fuse(tmp_path: Path) -> None:
    """onnx_block_size 16 on groups of 32 gives the same logits at level 0 and still fuses."""
    checkpoint = make_checkpoint(CASES["integer-untied-llama3"], tmp_path / "checkpoint")
    folder = export_onnx(checkpoint, tmp_path / "onnx", onnx_block_size=16)
    ids, mask = token_batch(1, 9)
    logits, _ = run_session(open_session(folder), ids, mask)
    assert np.abs(logits - torch_logits(torch_model(checkpoint), ids)).max() <= LOGIT_TOLERANCE
    assert Engine(str(folder), threads=1).info()["matmulnbits"] == len(checkpoint.modules)


@pytest.fixture
def engine(plain: Exported) -> Iterator[Engine]:
    """The engine on the simplest case."""
    engine = Engine(str(plain.folder), threads=1)
    yield engine
    engine.close()


def test_engine_logprobs_equal_torch(plain: Exported, engine: Engine) -> None:
    """The engine's full distributions are transformers' and sum to one."""
    ids, _ = token_batch(1, 17)
    logprobs = engine.prompt_logprobs(ids[0].tolist())
    expected = torch.log_softmax(torch.from_numpy(torch_logits(plain.model, ids)[0]).double(), dim=-1).numpy()
    assert logprobs.dtype == np.float32
    assert np.abs(logprobs - expected).max() <= LOGIT_TOLERANCE
    assert np.abs(np.exp(logprobs.astype(np.float64)).sum(axis=-1) - 1).max() < 1e-6


def test_engine_generates_greedily_through_the_cache(plain: Exported, engine: Engine) -> None:
    """Each new token is the argmax of a full forward over everything before it, until an end token or the limit."""
    ids = token_batch(1, 6, seed=3)[0][0].tolist()
    new, seconds = engine.generate(ids, 12)
    assert seconds > 0
    for step, token in enumerate(new):
        logits = torch_logits(plain.model, np.array([ids + new[:step]]))
        assert token == int(logits[0, -1].argmax())
    assert len(new) == 12 or new[-1] == 2


def test_engine_level_option_overrides_the_recorded_one(plain: Exported) -> None:
    """accuracy_level 4 reaches the kernels and is what info reports."""
    ids = token_batch(1, 17)[0][0].tolist()
    exact, rounded = (Engine(str(plain.folder), threads=1, accuracy_level=level) for level in (0, 4))
    assert rounded.info()["accuracy_level"] == 4
    assert np.abs(exact.prompt_logprobs(ids) - rounded.prompt_logprobs(ids)).max() > LOGIT_TOLERANCE


def test_engine_refuses_unknown_options(plain: Exported) -> None:
    """A misspelt option is an error that lists the known ones."""
    with pytest.raises(ValueError, match="known: accuracy_level, threads"):
        Engine(str(plain.folder), thread=1)
