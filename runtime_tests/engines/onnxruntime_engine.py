"""ONNX Runtime as an engine: one forward for log-probabilities, a key-value cache for generation.

Imports numpy and onnxruntime only, so that it runs under a Python that has nothing of l4q. The counts in `info` come
from the graph that ONNX Runtime itself saved after optimizing; its protobuf is walked by hand because the onnx package
is not needed to run a model.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

ACCURACY_KEY = "l4q.accuracy_level"
ACCURACY_OPTION = "session.qdq_matmulnbits_accuracy_level"
DEFAULT_LEVEL = 4
"""ONNX Runtime's own choice when the option is not set."""

# Field numbers of onnx.proto (ModelProto, GraphProto, NodeProto, StringStringEntryProto), unchanged since IR version 3.
MODEL_GRAPH, MODEL_METADATA, GRAPH_NODE, NODE_OP_TYPE, ENTRY_KEY, ENTRY_VALUE = 7, 14, 1, 4, 1, 2
WIRE_VARINT, WIRE_64, WIRE_BYTES, WIRE_32 = 0, 1, 2, 5
FIXED_BYTES = {WIRE_64: 8, WIRE_32: 4}


class Engine:
    """One loaded model.

    Args:
        model: Folder of the export, or a .onnx file.
        **options: `accuracy_level` (0 to 4; default: the level recorded in the file, else ONNX Runtime's 4) and
            `threads` (intra-op threads, default 2).
    """

    def __init__(self, model: str, **options: Any) -> None:
        path = Path(model)
        self._path = path / "model.onnx" if path.is_dir() else path
        threads = int(options.pop("threads", 2))
        level = options.pop("accuracy_level", None)
        if options:
            raise ValueError(f"unknown options {sorted(options)}; known: accuracy_level, threads")
        recorded = read_metadata(self._path.read_bytes()).get(ACCURACY_KEY, str(DEFAULT_LEVEL))
        self._level = int(recorded if level is None else level)
        with tempfile.TemporaryDirectory() as scratch:
            optimized = Path(scratch) / "optimized.onnx"
            self._session = ort.InferenceSession(
                str(self._path), self._session_options(threads, optimized), providers=["CPUExecutionProvider"]
            )
            self._operators = Counter(read_operators(optimized.read_bytes()))
        self._caches = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._stop = read_eos(self._path.parent)

    def prompt_logprobs(self, token_ids: list[int]) -> npt.NDArray[np.float32]:
        """Float32 [len(token_ids), vocab]: row t is log p(. | token_ids[:t + 1]), from one forward, empty cache."""
        logits = self._forward(token_ids, len(token_ids), self._empty_cache())[0][0]  # [length, vocab]
        result = np.empty_like(logits)
        for row, values in enumerate(logits):  # row by row: float64 doubles the memory
            result[row] = log_softmax(values)
        return result

    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy continuation and the seconds its decode steps took (the prompt's forward not counted)."""
        logits, *cache = self._forward(token_ids, len(token_ids), self._empty_cache())
        started = time.perf_counter()
        new: list[int] = []
        while len(new) < max_new_tokens:
            new.append(int(np.argmax(logits[0, -1])))
            if new[-1] in self._stop or len(new) == max_new_tokens:
                break
            logits, *cache = self._forward(new[-1:], len(token_ids) + len(new), cache)
        return new, time.perf_counter() - started

    def info(self) -> dict[str, str | int | float]:
        """Version, accuracy level and what became of the quantized linears."""
        return {
            "runtime": "onnxruntime",
            "version": ort.__version__,
            "accuracy_level": self._level,
            "matmulnbits": self._operators["MatMulNBits"],
            "dequantize_linear": self._operators["DequantizeLinear"],
            "nodes": sum(self._operators.values()),
        }

    def close(self) -> None:
        """Release the session."""
        del self._session

    def _session_options(self, threads: int, optimized: Path) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # saving an optimized graph warns that it suits this machine only
        options.add_session_config_entry(ACCURACY_OPTION, str(self._level))
        options.optimized_model_filepath = str(optimized)
        # Weights go to a file beside it, so that the graph stays small enough to parse.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "64")
        return options

    def _empty_cache(self) -> list[npt.NDArray[np.float32]]:
        # shape: [batch, kv_heads, past, head_dim]
        return [np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float32) for value in self._caches]

    def _forward(
        self, new: list[int], total: int, cache: list[npt.NDArray[np.float32]]
    ) -> list[npt.NDArray[np.float32]]:
        feeds = {value.name: array for value, array in zip(self._caches, cache, strict=True)}
        feeds["input_ids"] = np.array([new], dtype=np.int64)
        feeds["attention_mask"] = np.ones((1, total), dtype=np.int64)
        outputs: list[npt.NDArray[np.float32]] = self._session.run(self._outputs, feeds)
        return outputs


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Natural log-probabilities over the last axis, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    values: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return values


def read_eos(folder: Path) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json before config.json, one id or a list."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def read_metadata(model: bytes) -> dict[str, str]:
    """The metadata_props of a serialized ModelProto."""
    entries = (dict(walk(entry)) for entry in fields(model, MODEL_METADATA))
    return {bytes(entry[ENTRY_KEY]).decode(): bytes(entry[ENTRY_VALUE]).decode() for entry in entries}


def read_operators(model: bytes) -> Iterator[str]:
    """The operator of every node of a serialized ModelProto's main graph."""
    for graph in fields(model, MODEL_GRAPH):
        for node in fields(graph, GRAPH_NODE):
            yield from (bytes(name).decode() for name in fields(node, NODE_OP_TYPE))


def fields(message: bytes | memoryview, number: int) -> Iterator[memoryview]:
    """The values of one length-delimited field."""
    return (value for found, value in walk(message) if found == number)


def walk(message: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, bytes) of every length-delimited field, skipping numbers.

    https://protobuf.dev/programming-guides/encoding: each field starts with the varint number << 3 | wire type.
    """
    view = memoryview(message)
    position = 0
    while position < len(view):
        tag, position = varint(view, position)
        wire = tag & 7
        if wire == WIRE_VARINT:
            _, position = varint(view, position)
        elif wire == WIRE_BYTES:
            size, position = varint(view, position)
            yield tag >> 3, view[position : position + size]
            position += size
        elif wire in FIXED_BYTES:
            position += FIXED_BYTES[wire]
        else:
            raise ValueError(f"not an ONNX file: protobuf wire type {wire} at byte {position}")


def varint(view: memoryview, position: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    value = shift = 0
    while True:
        byte = view[position]
        value |= (byte & 127) << shift
        position += 1
        shift += 7
        if byte < 128:
            return value, position
