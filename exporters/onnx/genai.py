"""`genai_config.json`: what onnxruntime-genai must know to generate from the folder."""

from __future__ import annotations

import json
from typing import Any

from exporters.onnx.source import DecoderSizes
from l4q.checkpoint import L4QCheckpoint

CONFIG_NAME = "genai_config.json"


def genai_config(
    checkpoint: L4QCheckpoint,
    spec: DecoderSizes,
    *,
    filename: str,
    session_options: dict[str, str],
    shares_buffer: bool,
) -> dict[str, Any]:
    """onnxruntime-genai's description of the folder (https://onnxruntime.ai/docs/genai/reference/config.html).

    `type` "llama" is its plain decoder-only loop, with the names of inputs and outputs given below; what differs
    between architectures is inside the graph.

    Args:
        checkpoint: Gives the special tokens.
        spec: The model's sizes.
        filename: The graph's file, relative to the folder.
        session_options: ONNX Runtime's, for example the accuracy level.
        shares_buffer: The graph updates one cache of `max_length` columns. False for the Attention operator, which
            returns a grown one.
    """
    return {
        "model": {
            "type": "llama",
            **special_tokens(checkpoint),
            "context_length": spec.context_length,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "filename": filename,
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.heads,
                "num_key_value_heads": spec.kv_heads,
                "num_hidden_layers": spec.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"provider_options": [], **session_options},
            },
        },
        "search": {"do_sample": False, "max_length": spec.context_length, "past_present_share_buffer": shares_buffer},
    }


def special_tokens(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """bos, eos and pad ids that are known; the generation config's come before the model config's.

    onnxruntime-genai reads neither of those files, so a chat model's further stop tokens must be listed here. It
    refuses null: an unknown id is left out. Padding falls back to a stop token, which is what batches need.
    """
    path = checkpoint.path / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def known(name: str) -> Any:
        value = generation.get(name)
        return checkpoint.config.get(name) if value is None else value

    eos = known("eos_token_id")
    first_eos = next(iter(eos), None) if isinstance(eos, list) else eos
    bos, pad = known("bos_token_id"), known("pad_token_id")
    ids = {
        "bos_token_id": first_eos if bos is None else bos,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
    }
    return {name: value for name, value in ids.items() if value is not None}
