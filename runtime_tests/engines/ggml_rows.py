"""llama.cpp's own row quantizers and dequantizers, in C, through ctypes on xllamacpp's shared object."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from runtime_tests.engines.llama_capi import PINNED_VERSION, LlamaError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TYPES: Final = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q3_K": 11, "Q4_K": 12, "Q6_K": 14}
"""ggml_type."""
SIZES: Final = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q6_K": (256, 210),
}
"""(columns, bytes) of a block."""


@functools.cache
def _shared() -> Any:
    import xllamacpp
    from xllamacpp import xllamacpp as extension

    if xllamacpp.__version__ != PINNED_VERSION:
        raise LlamaError(
            f"xllamacpp {xllamacpp.__version__} is installed; these functions are those of {PINNED_VERSION}"
        )
    return ctypes.CDLL(extension.__file__)


def quantize_rows(values: F32, kind: str) -> U8:
    """ggml_quantize_chunk without an importance matrix: float32 [rows, columns] to uint8 [rows, row bytes]."""
    rows, columns = values.shape
    block, size = SIZES[kind]
    packed = np.zeros((rows, columns // block * size), dtype=np.uint8)
    function = _shared().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = (ctypes.c_int, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p)
    source = np.ascontiguousarray(values, dtype=np.float32)
    written = function(TYPES[kind], source.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    if written != packed.nbytes:
        raise LlamaError(f"ggml_quantize_chunk wrote {written} bytes of {packed.nbytes}")
    return packed


def dequantize_rows(packed: U8, kind: str) -> F32:
    """dequantize_row_<kind>: uint8 [rows, row bytes] to float32 [rows, columns]."""
    block, size = SIZES[kind]
    values = np.empty((packed.shape[0], packed.shape[1] // size * block), dtype=np.float32)
    function = getattr(_shared(), f"dequantize_row_{kind[0].lower()}{kind[1:]}")
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    source = np.ascontiguousarray(packed)
    function(source.ctypes.data, values.ctypes.data, values.size)
    return values
