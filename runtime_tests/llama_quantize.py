"""llama.cpp's own quantizer through its C API: the yardstick for how noisy a block type is in its runtime."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from runtime_tests.engines.llama_capi import load_library

# enum llama_ftype, enum ggml_type
FTYPES = {"Q4_0": 2, "Q4_1": 3}
GGML_TYPE_F32 = 0


class QuantizeParams(ctypes.Structure):
    """The head of struct llama_model_quantize_params; the rest stays as the library's defaults left it."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 240),  # larger than any release's struct: only room for what the library writes
    )


def llama_quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a float GGUF file as llama-quantize would, leaving embeddings and head in float32.

    Raises:
        LlamaError: The library refused.
    """
    library = load_library()
    defaults = library.llama_model_quantize_default_params
    defaults.restype = QuantizeParams
    params = defaults()
    params.nthread, params.ftype = 1, FTYPES[kind]
    params.output_tensor_type = params.token_embedding_type = GGML_TYPE_F32
    quantize = library.llama_model_quantize
    quantize.restype = ctypes.c_uint32
    if quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise library.error(f"llama_model_quantize could not write {kind}")
