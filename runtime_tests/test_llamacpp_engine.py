"""llama.cpp itself on our GGUF files: torch's numbers from F32, close ones from blocks, the tokenizer's own ids."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.engines import llama_capi
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.engines.llamacpp_engine import Engine, LlamaError
from runtime_tests.gguf_models import LLAMA3_ROPE, export_gguf, make_checkpoint, torch_logprobs

# The package offers a function of the same name, which hides the module.
writer = importlib.import_module("exporters.gguf.write")

NONE = QuantConfig(zero_point="none", group_size=32)
INTEGER = QuantConfig(zero_point="integer", group_size=32)
IDS = [int(token) for token in np.random.default_rng(0).integers(0, 320, 100)]

# Float32 sums in another order: measured 1.5e-6 mean and 2.2e-5 at worst on these models.
F32_MEAN, F32_WORST = 1e-5, 2e-4
# Block types round the activations to int8 per 32: measured KL 2e-4 to 6e-4 on these models.
QUANTIZED_KL = 0.005

TRICKY = (
    "In 1987, 3.14159 × 2 = 6.28318; call +49 (0)30 1234567 or 0x1F.\n\n\ttabs\t and   three spaces  7 8  99\r\n"
    "naïve café, e\u0301 decomposed, Größe, Ελληνικά, Москва, 中文字符 和 日本語, हिन्दी, العربية, 🚀👩‍💻🏳️‍🌈, "
    "I'll we've DON'T don't 's — “quotes”… a_b_c {x: [1, 2]} https://example.org/?q=1&r=2 \u00a0\u200b end  "
)


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine on one thread (a busy machine makes llama.cpp's barriers slow), closed at the end."""
    engine = Engine(str(folder), **{"n_threads": 1, "kv": "f32", **options})
    try:
        yield engine
    finally:
        engine.close()


def logprobs(folder: Path, token_ids: list[int], **options: Any) -> np.ndarray:
    """Full prompt log-probabilities."""
    with running(folder, **options) as engine:
        return engine.prompt_logprobs(token_ids)


def divergence(oracle: np.ndarray, engine: np.ndarray) -> float:
    """Mean KL(oracle || engine) in nats per token."""
    return float((np.exp(oracle) * (oracle - engine)).sum(axis=1).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"num_key_value_heads": 6, "head_dim": 16},
    ],
    ids=["tied", "untied-biases", "llama3-rope", "linear-rope", "mha"],
)
def test_f32_file_gives_torch_logprobs(tmp_path: Path, changes: dict[str, Any]) -> None:
    """An F32 GGUF of the dequantized weights gives transformers' numbers: metadata and row order are right."""
    checkpoint = make_checkpoint(tmp_path / "l4q", INTEGER, **changes)
    export_gguf(checkpoint, tmp_path / "out", gguf_type="F32")
    difference = np.abs(logprobs(tmp_path / "out", IDS) - torch_logprobs(checkpoint, IDS))
    assert difference.mean() < F32_MEAN
    assert difference.max() < F32_WORST


@pytest.mark.parametrize("damage", ["row order", "rope base", "one layer"])
def test_f32_parity_notices_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """A missing q/k permutation, a forgotten RoPE base or one swapped pair of rows breaks the F32 parity."""
    checkpoint = make_checkpoint(tmp_path / "l4q", INTEGER)
    exported = checkpoint
    if damage == "row order":
        monkeypatch.setattr(writer, "permute_rows", lambda rows, heads: rows)
    elif damage == "rope base":
        exported = L4QCheckpoint.open(checkpoint.path)
        exported.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    else:
        monkeypatch.setattr(writer, "permute_rows", lambda rows, heads: np.roll(rows, 1, axis=0))
    export_gguf(exported, tmp_path / "out", gguf_type="F32")
    difference = np.abs(logprobs(tmp_path / "out", IDS) - torch_logprobs(checkpoint, IDS))
    assert difference.mean() > 20 * F32_MEAN


@pytest.mark.parametrize(
    ("quant", "gguf_type"), [(NONE, "Q4_0"), (INTEGER, "Q4_1"), (INTEGER, "Q5_0")], ids=["Q4_0", "Q4_1", "Q5_0"]
)
def test_quantized_file_is_within_activation_noise(tmp_path: Path, quant: QuantConfig, gguf_type: str) -> None:
    """llama.cpp runs the blocks themselves; what is left is its int8 rounding of activations."""
    checkpoint = make_checkpoint(tmp_path / "l4q", quant)
    export_gguf(checkpoint, tmp_path / "out", gguf_type=gguf_type)
    oracle = torch_logprobs(checkpoint, IDS)
    kl = divergence(oracle, logprobs(tmp_path / "out", IDS))
    assert 0 < kl < QUANTIZED_KL
    # The twin: the same file against another model's numbers.
    other = make_checkpoint(tmp_path / "other", quant, rms_norm_eps=0.5)
    assert divergence(torch_logprobs(other, IDS), logprobs(tmp_path / "out", IDS)) > QUANTIZED_KL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_load(tmp_path: Path, dtype: torch.dtype) -> None:
    """F16 and BF16 embeddings run; the tied output rounds activations to the same type."""
    checkpoint = make_checkpoint(tmp_path / "l4q", NONE, dtype=dtype)
    export_gguf(checkpoint, tmp_path / "out", gguf_type="F32")
    assert divergence(torch_logprobs(checkpoint, IDS), logprobs(tmp_path / "out", IDS)) < 1e-4


def test_generation_follows_the_prompt_distribution(tmp_path: Path) -> None:
    """Greedy decoding through the KV cache picks the arg max of the full prompt's distribution at every step."""
    checkpoint = make_checkpoint(tmp_path / "l4q", NONE)
    export_gguf(checkpoint, tmp_path / "out")
    with running(tmp_path / "out") as engine:
        new, seconds = engine.generate(IDS[:5], 12)
        assert len(new) == 12
        assert seconds > 0
        rows = engine.prompt_logprobs(IDS[:5] + new)
        assert np.argmax(rows, axis=1).tolist()[4:-1] == new
        assert rows.shape == (17, 320)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
        assert engine.prompt_logprobs(IDS[:5]).shape == (5, 320)  # the cache was cleared


def test_prompts_longer_than_one_batch(tmp_path: Path) -> None:
    """700 tokens, two decodes, still torch's numbers."""
    checkpoint = make_checkpoint(tmp_path / "l4q", NONE, max_position_embeddings=1024)
    export_gguf(checkpoint, tmp_path / "out", gguf_type="F32")
    ids = [int(token) for token in np.random.default_rng(1).integers(0, 320, 700)]
    difference = np.abs(logprobs(tmp_path / "out", ids) - torch_logprobs(checkpoint, ids))
    assert difference.mean() < F32_MEAN


def test_worker_process_serves_the_engine(tmp_path: Path) -> None:
    """The engine file runs in a worker that cannot import the project, with the same numbers."""
    checkpoint = make_checkpoint(tmp_path / "l4q", NONE)
    export_gguf(checkpoint, tmp_path / "out")
    with RemoteEngine("llamacpp", tmp_path / "out", kv="f32") as engine:
        assert engine.info()["model"].endswith("Q4_0")
        remote = np.array(engine.prompt_logprobs(IDS))
    assert np.array_equal(remote, logprobs(tmp_path / "out", IDS))


def test_errors_are_clear(tmp_path: Path) -> None:
    """No file, a broken file, ids out of range, too many tokens, a file without text vocabulary, a closed engine."""
    with pytest.raises(LlamaError, match=r"exactly one \.gguf"):
        Engine(str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(LlamaError, match="could not load"):
        Engine(str(tmp_path))
    export_gguf(make_checkpoint(tmp_path / "l4q", NONE), tmp_path / "out")
    with pytest.raises(LlamaError, match="unknown KV cache type"):
        Engine(str(tmp_path / "out"), kv="q8")  # type: ignore[arg-type]
    with running(tmp_path / "out") as engine:
        with pytest.raises(LlamaError, match=r"out of range 0\.\.319: \[320\]"):
            engine.prompt_logprobs([1, 320])
        with pytest.raises(LlamaError, match="do not fit a context"):
            engine.prompt_logprobs([1] * 5000)
        with pytest.raises(LlamaError, match="no text vocabulary"):
            engine.tokenize("text")
    with pytest.raises(LlamaError, match="closed"):
        engine.prompt_logprobs([1])


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structures of another build would be wrong, so its version or its defaults stop the engine."""
    with monkeypatch.context() as patch:
        patch.setattr(xllamacpp, "__version__", "2027.1.1")
        with pytest.raises(LlamaError, match=r"2027\.1\.1 is installed.*pip install xllamacpp=="):
            llama_capi.Library()
    moved = {"llama_context_default_params": {"n_ctx": 512, "n_batch": 512}}
    monkeypatch.setattr(llama_capi, "_DEFAULTS", moved)
    with pytest.raises(LlamaError, match=r"another layout: got .*2048"):
        llama_capi.Library()


def test_smollm2_ids_equal_hugging_face(tmp_path: Path, smollm2_dir: Path, wiki_text: str) -> None:
    """On real text, numbers, unicode, special tokens and the chat template, llama.cpp's ids are the tokenizer's."""
    files = [path for path in smollm2_dir.iterdir() if path.name.startswith(("tokenizer", "chat_template"))]
    checkpoint = make_checkpoint(tmp_path / "l4q", NONE, vocab_size=49152, side_files=files)
    plan = export_gguf(checkpoint, tmp_path / "out")
    assert plan.notes[1].endswith("smollm")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 345?"}], tokenize=False, add_generation_prompt=True
    )
    text = wiki_text[:150_000] + TRICKY + chat
    expected = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    with running(tmp_path / "out") as engine:
        assert engine.tokenize(text) == expected
        assert engine.tokenize("1 2", add_special=True) == tokenizer("1 2")["input_ids"]
        # The twin: without the digit splitter the same text has other ids.
        plain = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert plain.encode(text, add_special_tokens=False).ids != expected


@pytest.mark.parametrize(
    ("splitter", "ignore_merges", "name"),
    [
        (r"\p{N}{1,3}", True, "llama-bpe"),
        (r"\p{N}", False, "qwen2"),
        (None, False, "gpt-2"),
    ],
)
def test_trained_byte_level_vocabularies(
    tmp_path: Path, wiki_text: str, splitter: str | None, ignore_merges: bool, name: str
) -> None:
    """A vocabulary of our own under each known pre-tokenizer has the same ids in llama.cpp."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + str(splitter)
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated")] if splitter else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter is None))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    check_trained(tmp_path, tokenizer, trainer, wiki_text, name)


def test_trained_byte_fallback_vocabulary(tmp_path: Path, wiki_text: str) -> None:
    """A BPE with byte fallback, llama 2's kind, has the same ids in llama.cpp's SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, limit_alphabet=100)
    check_trained(tmp_path, tokenizer, trainer, wiki_text, "SentencePiece")


def check_trained(tmp_path: Path, tokenizer: Any, trainer: Any, text: str, name: str) -> None:
    """Train on half of a text, export beside a tiny model, and compare the ids of the other half."""
    tokenizer.train_from_iterator(text[:100_000].split("\n"), trainer)
    content = json.loads(tokenizer.to_str())
    # Byte tokens are ordinary entries of the vocabulary, as in llama 2's tokenizer.json.
    content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["content"].startswith("<0x")]
    if content["model"]["byte_fallback"]:
        content["pre_tokenizer"] = None
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": content["added_tokens"][-1]["content"]}))
    checkpoint = make_checkpoint(
        tmp_path / "l4q", NONE, vocab_size=tokenizer.get_vocab_size(), side_files=list(source.iterdir())
    )
    plan = export_gguf(checkpoint, tmp_path / "out")
    assert plan.notes[1].endswith(name)
    judge = Tokenizer.from_file(str(source / "tokenizer.json"))
    sample = text[100_000:130_000] + TRICKY
    with running(tmp_path / "out") as engine:
        assert engine.tokenize(sample) == judge.encode(sample, add_special_tokens=False).ids


def test_log_softmax_of_extreme_logits() -> None:
    """Large logits neither overflow nor lose their normalisation."""
    from runtime_tests.engines.llamacpp_engine import log_softmax

    rows = log_softmax(np.array([[1e4, 1e4, -1e4]], np.float32))
    np.testing.assert_allclose(rows[0, :2], -math.log(2), rtol=1e-6)
