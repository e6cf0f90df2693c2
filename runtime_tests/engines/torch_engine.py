"""The oracle: PyTorch in float32 on plain weights, one operation after another, no quantized kernel.

An L4Q checkpoint is dequantized once into the ordinary transformers model; any other folder is loaded as it is.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from l4q.checkpoint import QUANT_METHOD, L4QCheckpoint

ROWS_PER_CHUNK = 64


class Engine:
    """transformers' own model class in float32 with eager attention."""

    def __init__(self, model: str) -> None:
        folder = Path(model)
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        self._dequantized = section.get("quant_method") == QUANT_METHOD
        self._model = _load_l4q(folder) if self._dequantized else _load_plain(folder)
        self._model.eval()
        self._stop_ids = stop_ids(folder)

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: list[int]) -> np.ndarray:
        """float32 [len(token_ids), vocab]: row t = log p(. | token_ids[: t + 1])."""
        logits = self._model(torch.tensor([token_ids]), use_cache=False).logits[0]  # [tokens, vocab]
        rows = np.empty(tuple(logits.shape), dtype=np.float32)
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = logits[start : start + ROWS_PER_CHUNK]
            rows[start : start + ROWS_PER_CHUNK] = torch.log_softmax(chunk.double(), dim=-1).float().numpy()
        return rows

    @torch.inference_mode()
    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy new ids, the stop token included, and the seconds spent after the first of them."""
        new_ids: list[int] = []
        inputs, cache, started = torch.tensor([token_ids]), None, 0.0
        while len(new_ids) < max_new_tokens:
            output = self._model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            new_ids.append(int(output.logits[0, -1].argmax()))
            if len(new_ids) == 1:
                started = time.perf_counter()
            if new_ids[-1] in self._stop_ids:
                break
            inputs = torch.tensor([new_ids[-1:]])
        return new_ids, time.perf_counter() - started

    def info(self) -> dict[str, str | int | float]:
        """Versions and whether an L4Q checkpoint was dequantized."""
        return {
            "runtime": "torch",
            "version": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "dequantized": int(self._dequantized),
        }

    def close(self) -> None:
        """Drop the model."""
        del self._model


def stop_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if value is not None:
            return frozenset([value] if isinstance(value, int) else value)
    return frozenset()


def _load_plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _load_l4q(folder: Path) -> Any:
    checkpoint = L4QCheckpoint.open(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = {name: checkpoint.dense(name).float() for name in checkpoint.dense_names}
    for module in checkpoint.modules:
        state[f"{module}.weight"] = torch.from_numpy(checkpoint.quantized(module).dequantize())
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"{folder}: unexpected tensors {unexpected}, missing tensors {sorted(set(missing) - tied)}")
    return model
