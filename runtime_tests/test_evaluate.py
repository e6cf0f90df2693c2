"""Perplexity, judged by transformers' own loss and by a model whose perplexity is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.errors import UsageError
from l4q.evaluate import perplexity, text_windows, windows_perplexity


@pytest.fixture
def model(glassllm_dir: Path) -> Any:
    """A small real model, fresh for tests that change it."""
    return AutoModelForCausalLM.from_pretrained(glassllm_dir)


@pytest.fixture(scope="module")
def windows(glassllm_dir: Path) -> list[list[int]]:
    """Six windows of real text."""
    text = (glassllm_dir.parent / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    return text_windows(AutoTokenizer.from_pretrained(glassllm_dir), text, 128, 6)


def test_agrees_with_transformers_loss(model: Any, windows: list[list[int]]) -> None:
    """The perplexity is exp of the mean of transformers' own per-window losses."""
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.double().item() for ids in windows
        ]
    result = windows_perplexity(model, windows)
    assert result.tokens == 6 * 127
    assert result.value == pytest.approx(math.exp(math.fsum(losses) / 6), rel=1e-6)


def test_uniform_model_has_perplexity_of_its_vocabulary(model: Any, windows: list[list[int]]) -> None:
    """A model that knows nothing scores exactly its vocabulary size."""
    model.get_input_embeddings().weight.data.zero_()
    assert windows_perplexity(model, windows).value == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_swapped_rows_raise_it(model: Any, windows: list[list[int]]) -> None:
    """Corrupting one projection is visible in the figure."""
    before = windows_perplexity(model, windows).value
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    weight.copy_(weight.flip(0))
    assert windows_perplexity(model, windows).value > before * 1.01


def test_batches_and_mode(model: Any, windows: list[list[int]]) -> None:
    """The batch size does not change the result, and training mode is restored."""
    model.train()
    one, four = (windows_perplexity(model, windows, batch_size=size) for size in (1, 4))
    assert four.tokens == one.tokens
    assert four.value == pytest.approx(one.value, rel=1e-5)
    assert model.training


def test_flat_ids_are_cut_into_whole_windows(model: Any, windows: list[list[int]]) -> None:
    """`perplexity` reads the same windows from one sequence and leaves a shorter rest out."""
    flat = [token for ids in windows for token in ids] + [5] * 100
    assert perplexity(model, flat, 128) == windows_perplexity(model, windows)


def test_broken_model_is_infinite(model: Any, windows: list[list[int]]) -> None:
    """A model that answers NaN has infinite perplexity, not a small one."""
    model.model.norm.weight.data.fill_(math.nan)
    assert windows_perplexity(model, windows[:1]).value == math.inf


def test_windows_come_from_the_middle(glassllm_dir: Path) -> None:
    """Windows are consecutive and leave equally much before and after."""
    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    text = " ".join(str(n) for n in range(400))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    flat = [token for window in text_windows(tokenizer, text, 16, 5) for token in window]
    start = (len(ids) - 80) // 2
    assert flat == ids[start : start + 80]


def test_short_text_is_refused(glassllm_dir: Path, model: Any) -> None:
    """Too little text is an error that says how much is needed."""
    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    with pytest.raises(UsageError, match=r"(?s)3 x 64 = 192 tokens"):
        text_windows(tokenizer, "short", 64, 3)
    with pytest.raises(UsageError, match="too few tokens"):
        perplexity(model, [1, 2, 3], 64)
    with pytest.raises(UsageError, match="one length"):
        windows_perplexity(model, [[1, 2], [1, 2, 3]])
