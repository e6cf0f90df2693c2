"""The part of llama.h that the llama.cpp engine needs, through ctypes on xllamacpp's shared object.

xllamacpp's Python side gives log-probabilities of generated tokens only; its shared object exports the whole C API.
The parameter structures are passed by value and change from build to build, so exactly one build is accepted and the
defaults it reports are compared with the header's before anything else is called.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from typing import Any, Final

PINNED_VERSION: Final = "2026.10.11549"
"""xllamacpp release whose structures are declared below (llama.cpp build b11549)."""

GGML_TYPES: Final = {"f32": 0, "f16": 1}
"""ggml_type of the KV cache."""

FLASH_ATTENTION: Final = {False: 0, True: 1}
"""llama_flash_attn_type."""

VOCAB_TYPE_NONE: Final = 0
LOG_LINES: Final = 60


class LlamaError(RuntimeError):
    """llama.cpp refused something; the message ends with its latest log lines."""


class ModelParams(Structure):
    """struct llama_model_params, 80 bytes."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(Structure):
    """struct llama_context_params, 168 bytes; the last 56 (callbacks, flags, samplers) stay as the library set them."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("tail", c_uint8 * 56),
    )


class Batch(Structure):
    """struct llama_batch: n_tokens parallel entries."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG_CALLBACK, c_void_p)),
    "llama_version": (c_char_p, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_n_params": (ctypes.c_uint64, (c_void_p,)),
    "llama_model_size": (ctypes.c_uint64, (c_void_p,)),
    "llama_model_desc": (c_int32, (c_void_p, c_char_p, c_size_t)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, c_size_t)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_type": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
}
"""Function: (result type, argument types)."""

_DEFAULTS: Final[dict[str, dict[str, int | float | bool]]] = {
    "llama_model_default_params": {"n_gpu_layers": -1, "load_mode": -1, "use_extra_bufts": True, "vocab_only": False},
    "llama_context_default_params": {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "pooling_type": -1,
        "flash_attn_type": -1,
        "yarn_beta_slow": -1.0,
        "defrag_thold": -1.0,
        "type_k": GGML_TYPES["f16"],
        "type_v": GGML_TYPES["f16"],
    },
}
"""Defaults of the pinned build; a moved field would show another value."""


class Library:
    """The loaded shared object with typed functions as attributes, and the tail of its log."""

    def __init__(self) -> None:
        import xllamacpp
        from xllamacpp import xllamacpp as extension

        if xllamacpp.__version__ != PINNED_VERSION:
            raise LlamaError(
                f"xllamacpp {xllamacpp.__version__} is installed, but llama.h is declared here for {PINNED_VERSION} "
                f"only: pip install xllamacpp=={PINNED_VERSION}"
            )
        self.version = PINNED_VERSION
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._shared = ctypes.CDLL(extension.__file__)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(self._shared, name)
            function.restype, function.argtypes = result, arguments
        self._check_layouts()
        # ctypes does not keep callbacks alive.
        self._log_callback = LOG_CALLBACK(self._on_log)
        self.llama_log_set(self._log_callback, None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        if name not in _PROTOTYPES:
            raise AttributeError(name)
        return getattr(self._shared, name)

    def error(self, what: str) -> LlamaError:
        """An error that carries the latest log lines."""
        return LlamaError("\n".join((what, *"".join(self.log).splitlines()[-12:])))

    def _on_log(self, level: int, text: bytes | None, user: int | None) -> None:
        self.log.append((text or b"").decode("utf-8", errors="replace"))

    def _check_layouts(self) -> None:
        for function, expected in _DEFAULTS.items():
            params = getattr(self, function)()
            got = {field: getattr(params, field) for field in expected}
            if got != expected:
                raise LlamaError(f"{function} of this build has another layout: got {got}, expected {expected}")


@functools.cache
def load_library() -> Library:
    """The library, loaded and checked once per process.

    Raises:
        LlamaError: Another xllamacpp release is installed, or its structures differ.
    """
    return Library()
