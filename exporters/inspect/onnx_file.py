"""ONNX files: weights behind DequantizeLinear and com.microsoft MatMulNBits, and every other initializer."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from exporters.inspect.facts import GridValues, Source, TensorEntry
from exporters.inspect.runtimes import of_onnx
from exporters.onnx.external import check_data, load_model, tensor_bits, with_data
from l4q.bitpack import unpack_codes
from l4q.errors import UsageError
from l4q.guards import foreign

# element type of codes -> (bits, added to make a stored value an unsigned code)
CODE_TYPES = {"UINT4": (4, 0), "INT4": (4, 8), "UINT8": (8, 0), "INT8": (8, 128)}
UNREADABLE = "a tensor's data cannot be read"
AGAIN = "copy the whole folder"


def open_source(path: Path) -> Source:
    """Open an ONNX file; external data is read tensor by tensor, when its codes are counted.

    Raises:
        UsageError: It is no ONNX model.
    """
    model = load_model(path, "not an ONNX model", remedy="copy it again")
    if not model.graph.node:
        raise UsageError("the ONNX model has no nodes", where=path, remedy="copy it again")
    with foreign("the ONNX model's nodes cannot be read", where=path):
        for tensor in model.graph.initializer:
            check_data(tensor, path, "a tensor's data cannot be read", absent=True)
        entries = _Reader(model, path).entries()
    operators = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    facts = {
        "producer": f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        "opsets": ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
        "operators": ", ".join(f"{many} {name}" for name, many in operators.most_common(6)),
    }
    return Source(
        format="onnx",
        title="ONNX model",
        facts=facts | {entry.key: entry.value for entry in model.metadata_props if len(entry.value) < 60},
        entries=entries,
        runtimes=lambda _: of_onnx(opsets, operators),
    )


class _Reader:
    """Initializers of a model by name, and which of them belong together."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.path = path
        self._nodes = list(model.graph.node)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        # scales that pass a Cast on their way
        self._cast = {node.output[0]: node.input[0] for node in self._nodes if node.op_type == "Cast"}

    def entries(self) -> tuple[TensorEntry, ...]:
        """Quantized weights in graph order, then the rest."""
        found: list[TensorEntry] = []
        used: set[str] = set()
        for node in self._nodes:
            make = {"DequantizeLinear": self._dequantized, "MatMulNBits": self._matmul_nbits}.get(node.op_type)
            names = [self._cast.get(name, name) for name in node.input]
            owned = [name for name in names if name in self._tensors]
            if make is not None and owned and not used & set(owned):
                found.append(make(node, names, owned))
                used |= set(owned)
        return (*found, *(self._dense(tensor) for name, tensor in self._tensors.items() if name not in used))

    def _dequantized(self, node: onnx.NodeProto, names: list[str], owned: list[str]) -> TensorEntry:
        codes = self._tensors[owned[0]]
        kind = _type(codes)
        attributes = _attributes(node)

        def values() -> GridValues:
            with foreign("a quantized weight cannot be decoded", where=f"{self.path}: {codes.name}"):
                return decode()

        def decode() -> GridValues:
            bits, raised = CODE_TYPES[kind]
            stored = self._array(codes.name).astype(np.int16) + raised
            scales = self._array(names[1])
            size = attributes.get("block_size") or math.prod(codes.dims) // max(scales.size, 1)
            return GridValues(
                codes=stored.astype(np.uint8),
                scales=scales,
                bits=bits,
                group_size=int(size),
                kind="integer" if len(names) > 2 and names[2] else "none",
            )

        readable = kind in CODE_TYPES and names[0] == codes.name and names[1] in self._tensors
        return TensorEntry(
            name=codes.name.removesuffix(".weight"),
            shape=tuple(codes.dims),
            encoding=f"{kind.lower()} QDQ",
            nbytes=sum(self._nbytes(name) for name in owned),
            values=values if readable else None,
            note="" if readable else f"{kind} codes are not decoded",
        )

    def _matmul_nbits(self, node: onnx.NodeProto, names: list[str], owned: list[str]) -> TensorEntry:
        attributes = _attributes(node)
        rows, columns, bits = (int(attributes[key]) for key in ("N", "K", "bits"))
        size = int(attributes["block_size"])

        def values() -> GridValues:
            with foreign("a quantized weight cannot be decoded", where=f"{self.path}: {names[1]}"):
                return decode()

        def decode() -> GridValues:
            packed = self._array(names[1]).reshape(rows, -1)  # [N, blocks * block_size * bits / 8]
            codes = packed if bits == 8 else unpack_codes(packed, packed.shape[1] * 8 // bits, bits)
            return GridValues(
                codes=codes[:, :columns],
                scales=self._array(names[2]),
                bits=bits,
                group_size=size,
                kind="integer" if len(names) > 3 and names[3] else "none",
            )

        readable = bits in (2, 4, 8) and names[1] in self._tensors and names[2] in self._tensors
        return TensorEntry(
            name=node.name or names[1],
            shape=(columns, rows),
            encoding=f"MatMulNBits {bits}",
            nbytes=sum(self._nbytes(name) for name in owned),
            values=values if readable else None,
            note="" if readable else f"MatMulNBits of {bits} bits is not decoded",
        )

    def _dense(self, tensor: onnx.TensorProto) -> TensorEntry:
        return TensorEntry(
            name=tensor.name, shape=tuple(tensor.dims), encoding=_type(tensor).lower(), nbytes=self._nbytes(tensor.name)
        )

    def _nbytes(self, name: str) -> int:
        tensor = self._tensors[name]
        return -(-tensor_bits(tensor) // 8)

    def _array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """An initializer's values, from the file beside the model if they lie there."""
        copy = with_data(self._tensors[name], self.path, UNREADABLE, remedy=AGAIN)
        with foreign(UNREADABLE, where=f"{self.path}: {name}", remedy=AGAIN):
            return np.asarray(numpy_helper.to_array(copy))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _type(tensor: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(tensor.data_type))
