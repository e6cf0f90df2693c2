"""GGUF files: exact under gguf-py, complete metadata, one clear refusal for what the format cannot hold."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters import gguf as gguf_exporter
from exporters.gguf.families import ARCHITECTURES
from exporters.gguf.metadata import model_metadata, rope_freqs
from exporters.gguf.names import permute_rows, unpermute_rows
from exporters.gguf.vocab import merge_scores, pre_tokenizer_steps, read_vocabulary
from exporters.plan import ExportOptions, Fidelity
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.gguf_models import LLAMA3_ROPE, TINY, export_gguf, make_checkpoint, same_bits

# The package offers a function of the same name, which hides the module.
writer = importlib.import_module("exporters.gguf.write")

FREE_SCALES = 0xFFFF
GPT2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_STEP = {"type": "Digits", "individual_digits": True}


def wrong_modules(checkpoint: L4QCheckpoint, folder: Path) -> list[str]:
    """Modules that read back with other bits, or not at all."""
    found = dict(gguf_exporter.read_back(folder))
    return [
        module
        for module in checkpoint.modules
        if module not in found or not same_bits(found[module], checkpoint.quantized(module).dequantize())
    ]


def gguf_file(folder: Path) -> Path:
    """The only GGUF file of an export."""
    (file,) = folder.glob("*.gguf")
    return file


def fields(folder: Path) -> dict[str, Any]:
    """All metadata of a written file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(gguf_file(folder)).fields.items()}


def byte_level_tokenizer(folder: Path, pre_tokenizer: Any, **model: Any) -> None:
    """A tokenizer.json of four letters and one special token."""
    tokens = {"<|end|>": 0, "a": 1, "b": 2, "ab": 3}
    special = {"id": 0, "content": "<|end|>", "special": True}
    content = {
        "model": {"type": "BPE", "vocab": tokens, "merges": [["a", "b"]], **model},
        "pre_tokenizer": pre_tokenizer,
        "added_tokens": [special],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ x }}"}))


@pytest.mark.parametrize(
    ("quant", "options", "encoding"),
    [
        (QuantConfig(zero_point="none", group_size=32), {}, "Q4_0"),
        (QuantConfig(zero_point="none", group_size=-1), {"gguf_type": "Q5_0"}, "Q5_0"),
        (QuantConfig(zero_point="integer", group_size=32), {}, "Q4_1"),
        (QuantConfig(zero_point="integer", group_size=32), {"gguf_type": "F32"}, "F32"),
        (QuantConfig(zero_point="float", group_size=32), {}, "Q4_1"),
        (QuantConfig(zero_point="integer", group_size=-1, bits=3), {}, "Q4_0"),
    ],
)
def test_foreign_decoder_returns_the_checkpoint(
    tmp_path: Path, quant: QuantConfig, options: dict[str, Any], encoding: str
) -> None:
    """gguf-py reads every module bit for bit, in Hugging Face row order, from the file alone."""
    checkpoint = make_checkpoint(tmp_path / "l4q", quant)
    plan = export_gguf(checkpoint, tmp_path / "out", **options)
    assert {tensor.encoding for tensor in plan.quantized} == {encoding}
    assert not plan.rounded
    assert wrong_modules(checkpoint, tmp_path / "out") == []
    assert gguf_file(tmp_path / "out").name == f"l4q-{encoding}.gguf"


def test_mixed_types_in_one_file(tmp_path: Path) -> None:
    """With free fp16 scales auto falls back to Q5_0 tensor by tensor, and all stay exact."""
    quant = QuantConfig(zero_point="integer", group_size=32, scale_grid="fp16")
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, scale_mask=FREE_SCALES)
    plan = export_gguf(checkpoint, tmp_path / "out")
    assert {tensor.encoding for tensor in plan.quantized} == {"Q5_0"}
    assert wrong_modules(checkpoint, tmp_path / "out") == []
    rounded = gguf_exporter.plan(checkpoint, ExportOptions(gguf_type="Q4_1"))
    assert len(rounded.rounded) == len(checkpoint.modules)


@pytest.mark.parametrize("position", ["scale", "nibble"])
def test_read_back_notices_damage(tmp_path: Path, position: str) -> None:
    """One flipped bit in a scale or a nibble of the file is one wrong module."""
    checkpoint = make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="none", group_size=32))
    export_gguf(checkpoint, tmp_path / "out")
    file = gguf_file(tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    data = bytearray(file.read_bytes())
    data[tensors["blk.1.attn_k.weight"].data_offset + {"scale": 0, "nibble": 7}[position]] ^= 1
    file.write_bytes(data)
    assert wrong_modules(checkpoint, tmp_path / "out") == ["model.layers.1.self_attn.k_proj"]


def test_read_back_notices_rows_out_of_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that forgets llama.cpp's q/k row order is caught by the reader's own inverse."""
    checkpoint = make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="none", group_size=32))
    monkeypatch.setattr(writer, "permute_rows", lambda rows, heads: rows)
    export_gguf(checkpoint, tmp_path / "out")
    wrong = {module.rpartition(".")[2] for module in wrong_modules(checkpoint, tmp_path / "out")}
    assert wrong == {"q_proj", "k_proj"}


def test_row_orders_are_inverse_and_literal() -> None:
    """Row half * d/2 + i of each head goes to 2 * i + half."""
    assert permute_rows(np.arange(12), 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    rows = np.random.default_rng(0).integers(0, 9, (6 * 8, 3))
    assert np.array_equal(unpermute_rows(permute_rows(rows, 6), 6), rows)


def test_equal_checkpoints_give_equal_bytes(tmp_path: Path) -> None:
    """Writing twice gives the same file, and the plan's bytes are the tensors' bytes."""
    checkpoint = make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="integer", group_size=32))
    plan = export_gguf(checkpoint, tmp_path / "one")
    export_gguf(checkpoint, tmp_path / "two")
    assert gguf_file(tmp_path / "one").read_bytes() == gguf_file(tmp_path / "two").read_bytes()
    reader = gguf.GGUFReader(gguf_file(tmp_path / "one"))
    assert {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors} == {
        tensor.target: tensor.nbytes for tensor in plan.tensors
    }


@pytest.mark.parametrize(
    ("dtype", "encoding"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_dense_tensors_keep_their_values(tmp_path: Path, dtype: torch.dtype, encoding: str) -> None:
    """Embeddings keep their stored dtype, norms and biases become F32, tied embeddings have no output.weight."""
    quant = QuantConfig(zero_point="none", group_size=32)
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, dtype=dtype, attention_bias=True)
    plan = export_gguf(checkpoint, tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file(tmp_path / "out")).tensors}
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type.name == encoding
    for planned in plan.tensors:
        if planned.quantized:
            continue
        tensor = tensors[planned.target]
        assert len(planned.shape) > 1 or tensor.tensor_type == gguf.GGMLQuantizationType.F32
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(planned.shape)
        if planned.target.endswith(("attn_q.bias", "attn_k.bias")):
            values = unpermute_rows(values, 6 if "attn_q" in planned.target else 2)
        assert same_bits(np.asarray(values, np.float32), checkpoint.dense(planned.name).float().numpy())


def test_metadata_is_the_config(tmp_path: Path) -> None:
    """Every hyperparameter llama.cpp reads is written under its key; nothing is left to its defaults."""
    checkpoint = make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="integer", group_size=32))
    export_gguf(checkpoint, tmp_path / "out")
    found = fields(tmp_path / "out")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.block_count": TINY["num_hidden_layers"],
        "llama.context_length": TINY["max_position_embeddings"],
        "llama.embedding_length": TINY["hidden_size"],
        "llama.feed_forward_length": TINY["intermediate_size"],
        "llama.vocab_size": TINY["vocab_size"],
        "llama.attention.head_count": TINY["num_attention_heads"],
        "llama.attention.head_count_kv": TINY["num_key_value_heads"],
        "llama.attention.key_length": TINY["head_dim"],
        "llama.attention.value_length": TINY["head_dim"],
        "llama.rope.dimension_count": TINY["head_dim"],
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {key: found[key] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_older_config_keys_mean_the_same() -> None:
    """rope_theta and rope_scaling at the top level, as older configs have them, give the same metadata."""
    new = {**TINY, "rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}}
    old = {**TINY, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    del old["rope_parameters"]
    row = ARCHITECTURES["LlamaForCausalLM"]
    assert model_metadata(row, old) == model_metadata(row, new)
    assert {entry.key: entry.value for entry in model_metadata(row, new)}["llama.rope.scaling.factor"] == 2.0


def test_llama3_rope_divisors_are_transformers(tmp_path: Path) -> None:
    """rope_freqs.weight divides the plain frequencies into those transformers computes."""
    config = LlamaConfig(**{**TINY, "rope_parameters": LLAMA3_ROPE})
    expected = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    divisors = rope_freqs(config.to_dict())
    assert divisors is not None
    assert 1.0 in divisors
    assert 8.0 in divisors
    assert len(set(divisors.tolist())) > 2  # some are interpolated
    np.testing.assert_allclose(plain / divisors, expected, rtol=1e-6)
    quant = QuantConfig(zero_point="none", group_size=32)
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, rope_parameters=LLAMA3_ROPE)
    export_gguf(checkpoint, tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file(tmp_path / "out")).tensors}
    assert np.array_equal(tensors["rope_freqs.weight"].data, divisors)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    """An architecture outside the table is refused before anything is written."""
    make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="none", group_size=32))
    path = tmp_path / "l4q" / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "FalconForCausalLM"))
    with pytest.raises(UnsupportedError, match=r"(?s)got: FalconForCausalLM.*one of .*LlamaForCausalLM"):
        gguf_exporter.plan(L4QCheckpoint.open(tmp_path / "l4q"), ExportOptions())


def test_modules_that_do_not_fill_blocks_are_all_listed(tmp_path: Path) -> None:
    """Rows that do not fill blocks of 32 name every module in the way; F32 takes them."""
    quant = QuantConfig(zero_point="none", group_size=-1)
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, intermediate_size=83)
    listed = r"(?s)2 module.*layers\.0\.mlp\.down_proj \(in_features 83.*layers\.1\.mlp\.down_proj"
    with pytest.raises(UnsupportedError, match=listed):
        gguf_exporter.plan(checkpoint, ExportOptions())
    export_gguf(checkpoint, tmp_path / "out", gguf_type="F32")
    assert wrong_modules(checkpoint, tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ],
)
def test_graphs_llama_cpp_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    """An activation or RoPE type that llama.cpp would silently replace is an error."""
    with pytest.raises(UnsupportedError, match=message):
        model_metadata(ARCHITECTURES["LlamaForCausalLM"], {**TINY, **changes})


def test_read_back_needs_exactly_one_file(tmp_path: Path) -> None:
    """An empty folder is an error, not an empty answer."""
    with pytest.raises(UsageError, match=r"exactly one \.gguf"):
        next(gguf_exporter.read_back(tmp_path))


@pytest.mark.parametrize(
    ("pre_tokenizer", "model", "name"),
    [
        (GPT2_STEP, {}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS_STEP, GPT2_STEP]}, {}, "smollm"),
        (GPT2_STEP, {"ignore_merges": True}, "default"),
        ({"type": "Sequence", "pretokenizers": [GPT2_STEP, DIGITS_STEP]}, {}, "default"),
    ],
)
def test_pre_tokenizer_is_named_from_its_steps(
    tmp_path: Path, pre_tokenizer: Any, model: dict[str, Any], name: str
) -> None:
    """Known steps get llama.cpp's name; unknown ones "default" and a note in the plan."""
    byte_level_tokenizer(tmp_path, pre_tokenizer, **model)
    vocabulary = read_vocabulary(tmp_path, 6)
    values = {entry.key: entry.value for entry in vocabulary.metadata}
    assert values["tokenizer.ggml.pre"] == name
    assert any("may be cut differently" in note for note in vocabulary.notes) == (name == "default")


def test_vocabulary_reaches_the_file(tmp_path: Path) -> None:
    """Tokens padded to the embedding, token types, merges, special ids, both add flags and the chat template."""
    quant = QuantConfig(zero_point="none", group_size=32)
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, vocab_size=6, eos_token_id=0, bos_token_id=None)
    byte_level_tokenizer(checkpoint.path, GPT2_STEP)
    export_gguf(checkpoint, tmp_path / "out")
    found = fields(tmp_path / "out")
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "[PAD4]", "[PAD5]"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 5, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }
    assert {key: found[key] for key in expected} == expected


def test_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    """A tokenizer of another model is an error with both sizes."""
    byte_level_tokenizer(tmp_path, GPT2_STEP)
    with pytest.raises(UsageError, match=r"(?s)got: 4.*at most 3"):
        read_vocabulary(tmp_path, 3)


def test_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    """Broken JSON names the file."""
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        read_vocabulary(tmp_path, 3)


@pytest.mark.parametrize(
    "content",
    [None, {"model": {"type": "Unigram", "vocab": []}}, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}],
)
def test_tokenizers_llama_cpp_lacks_leave_ids_only(tmp_path: Path, content: Any) -> None:
    """No vocabulary is written rather than a wrong one, and the plan says so."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    vocabulary = read_vocabulary(tmp_path, 3)
    assert [entry.value for entry in vocabulary.metadata] == ["no_vocab"]
    assert "token ids, not text" in vocabulary.notes[0]


def test_merge_scores_fall_with_rank() -> None:
    """The first merge scores highest and unmerged tokens lowest, for both JSON spellings of a merge."""
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        assert merge_scores({"merges": merges}, ["a", "ab", "abc"]) == [-2.0, 0.0, -1.0]
    assert pre_tokenizer_steps(None) == ()


def test_plan_reasons_and_runtime(tmp_path: Path) -> None:
    """The plan names the runtime, the file and why each encoding was taken."""
    checkpoint = make_checkpoint(tmp_path / "l4q", QuantConfig(zero_point="none", group_size=32))
    plan = gguf_exporter.plan(checkpoint, ExportOptions())
    assert [(support.runtime, support.loads) for support in plan.runtimes] == [("llama.cpp", True)]
    assert plan.notes[0] == "file: l4q-Q4_0.gguf"
    assert all(tensor.reason and tensor.fidelity is Fidelity.EXACT for tensor in plan.tensors)
    assert plan.bits_per_weight == 4.5
