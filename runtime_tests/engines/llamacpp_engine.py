"""llama.cpp as a parity engine: full prompt log-probabilities and greedy generation from a GGUF file."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt


def _sibling(name: str) -> ModuleType:
    """A module of this folder by its file: in a worker the project is not on the path (see worker.py)."""
    full_name = f"runtime_tests.engines.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, Path(__file__).with_name(f"{name}.py"))
        if spec is None or spec.loader is None:
            raise ImportError(full_name)
        sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


if TYPE_CHECKING:
    from runtime_tests.engines import llama_capi as capi
else:
    capi = _sibling("llama_capi")

LlamaError = capi.LlamaError
Logits = npt.NDArray[np.float32]

BATCH_TOKENS = 512
"""Tokens per llama_decode; also bounds the logits llama.cpp keeps at once."""

ROWS_AT_ONCE = 64
"""Rows normalised together, so that the float64 copy stays small."""


class Engine:
    """One GGUF model with its own context.

    Args:
        model: The .gguf file, or a folder that holds exactly one.
        kv: Type of the KV cache: "f16" (llama.cpp's default) or "f32" (no rounding beyond the weights').
        flash_attn: Use the flash attention kernel.
        n_threads: Compute threads; default from OMP_NUM_THREADS, else 2.
        n_ctx: Longest sequence in tokens; default the model's training length, at most 4096.
    """

    def __init__(
        self,
        model: str,
        *,
        kv: Literal["f32", "f16"] = "f16",
        flash_attn: bool = False,
        n_threads: int | None = None,
        n_ctx: int | None = None,
    ) -> None:
        if kv not in capi.GGML_TYPES:
            raise LlamaError(f"unknown KV cache type {kv!r}; known: {', '.join(capi.GGML_TYPES)}")
        self._model: int | None = None
        self._context: int | None = None
        self._library = capi.load_library()
        self._options = {"kv": kv, "flash_attn": int(flash_attn)}
        self._n_threads = n_threads or int(os.environ.get("OMP_NUM_THREADS", "2"))
        path = find_model(Path(model))
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise self._library.error(f"llama.cpp could not load {path}")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._library.llama_vocab_n_tokens(self._vocab)
        trained: int = self._library.llama_model_n_ctx_train(self._model)
        self._context = self._make_context(n_ctx or min(trained, 4096), kv, flash_attn)

    def prompt_logprobs(self, token_ids: list[int]) -> Logits:
        """Log-probabilities, float32 [len(token_ids), vocab]; row t is log p( . | token_ids[:t + 1]) in nats."""
        self._clear(len(token_ids))
        rows = np.empty((len(token_ids), self.n_vocab), dtype=np.float32)
        for start in range(0, len(token_ids), BATCH_TOKENS):
            chunk = token_ids[start : start + BATCH_TOKENS]
            rows[start : start + len(chunk)] = self._decode(chunk, start, all_rows=True)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            rows[start : start + ROWS_AT_ONCE] = log_softmax(rows[start : start + ROWS_AT_ONCE])
        return rows

    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy (new ids, seconds spent after the first of them); stops after an end token the file declares."""
        self._clear(len(token_ids) + max_new_tokens)
        for start in range(0, len(token_ids), BATCH_TOKENS):
            logits = self._decode(token_ids[start : start + BATCH_TOKENS], start, all_rows=False)
        new = [int(np.argmax(logits[-1]))]
        started = time.perf_counter()
        # The last token needs no further decode.
        while len(new) < max_new_tokens and not self._ends(new[-1]):
            logits = self._decode(new[-1:], len(token_ids) + len(new) - 1, all_rows=False)
            new.append(int(np.argmax(logits[-1])))
        return new[:max_new_tokens], time.perf_counter() - started

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text by the file's own vocabulary.

        Raises:
            LlamaError: The file has no text vocabulary.
        """
        if self._library.llama_vocab_type(self._vocab) == capi.VOCAB_TYPE_NONE:
            raise LlamaError("this GGUF file has no text vocabulary; give token ids")
        data = text.encode("utf-8")
        capacity = len(data) + 8  # a token is at least one byte, plus room for BOS and EOS
        buffer = (ctypes.c_int32 * capacity)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, capacity, add_special, parse_special)
        if count < 0:
            raise self._library.error(f"llama_tokenize failed with {count}")
        return list(buffer[:count])

    def info(self) -> dict[str, str | int | float]:
        """Runtime, version, model and the options in force."""
        return {
            "runtime": "llama.cpp",
            "version": f"xllamacpp {self._library.version}",
            "model": self._describe(),
            "parameters": int(self._library.llama_model_n_params(self._model)),
            "weight_bytes": int(self._library.llama_model_size(self._model)),
            "n_ctx": int(self._library.llama_n_ctx(self._context)),
            "n_threads": self._n_threads,
            **self._options,
            "system": self._library.llama_print_system_info().decode("utf-8", errors="replace").strip(),
        }

    def close(self) -> None:
        """Free context and model; calling it again does nothing."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def _make_context(self, n_ctx: int, kv: str, flash_attn: bool) -> int:
        params = self._library.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(BATCH_TOKENS, n_ctx)
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = capi.FLASH_ATTENTION[flash_attn]
        params.type_k = params.type_v = capi.GGML_TYPES[kv]
        context: int | None = self._library.llama_init_from_model(self._model, params)
        if not context:
            error = self._library.error("llama.cpp could not create a context")
            self.close()
            raise error
        self._n_ctx = int(self._library.llama_n_ctx(context))
        return context

    def _clear(self, needed: int) -> None:
        if self._context is None:
            raise LlamaError("the engine is closed")
        if not 0 < needed <= self._n_ctx:
            raise LlamaError(f"{needed} tokens do not fit a context of {self._n_ctx}; raise n_ctx")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], position: int, *, all_rows: bool) -> Logits:
        """Feed tokens at consecutive positions; logits of all of them, or of the last, as a view llama.cpp owns."""
        out_of_range = [token for token in tokens if not 0 <= token < self.n_vocab]
        if out_of_range:
            raise LlamaError(f"token ids out of range 0..{self.n_vocab - 1}: {out_of_range[:5]}")
        batch: capi.Batch = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = all_rows or index == len(tokens) - 1
            status = self._library.llama_decode(self._context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if status != 0:
            raise self._library.error(f"llama_decode failed with {status}")
        rows = len(tokens) if all_rows else 1
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape=(rows, self.n_vocab))

    def _ends(self, token: int) -> bool:
        # Without a declared EOS llama.cpp takes an ordinary token for one.
        declared = self._metadata("tokenizer.ggml.eos_token_id") is not None
        return declared and bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def _metadata(self, key: str) -> str | None:
        return _string(
            lambda buffer, size: self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
        )

    def _describe(self) -> str:
        return _string(lambda buffer, size: self._library.llama_model_desc(self._model, buffer, size)) or ""


def find_model(path: Path) -> Path:
    """The .gguf file itself, or the only one in a folder.

    Raises:
        LlamaError: There is none, or there are several.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise LlamaError(f"expected exactly one .gguf file in {path}, found {[file.name for file in files]}")
    return files[0]


def log_softmax(logits: Logits) -> Logits:
    """Row-wise log-softmax, summed in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    normalised: Logits = wide.astype(np.float32)
    return normalised


def _string(call: Any) -> str | None:
    """The text a C function writes into a buffer; None when it reports an error."""
    buffer = ctypes.create_string_buffer(256)
    length = call(buffer, len(buffer))
    return buffer.value.decode("utf-8", errors="replace") if length >= 0 else None
