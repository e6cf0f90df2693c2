"""ONNX files: weights behind DequantizeLinear and com.microsoft MatMulNBits, and every other initializer."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from exporters.inspect.facts import GridValues, Source, TensorEntry
from exporters.inspect.runtimes import of_onnx
from l4q.bitpack import unpack_codes
from l4q.errors import UsageError

# element type of codes -> (bits, added to make a stored value an unsigned code)
CODE_TYPES = {"UINT4": (4, 0), "INT4": (4, 8), "UINT8": (8, 0), "INT8": (8, 128)}
BITS_OF = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT64": 64, "INT32": 32, "INT16": 16}
BITS_OF |= {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "BOOL": 8, "UINT2": 2, "INT2": 2}


def open_source(path: Path) -> Source:
    """Open an ONNX file; external data is read tensor by tensor, when its codes are counted.

    Raises:
        UsageError: It is no ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError, RuntimeError) as error:
        raise UsageError("not an ONNX model", where=path, got=error, remedy="copy it again") from error
    if not model.graph.node:
        raise UsageError("the ONNX model has no nodes", where=path, remedy="copy it again")
    reader = _Reader(model, path)
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
        entries=reader.entries(),
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
        bits: int = math.prod(tensor.dims) * BITS_OF.get(_type(tensor), 8)
        return -(-bits // 8)

    def _array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """An initializer's values, from the file beside the model if they lie there."""
        copy = onnx.TensorProto()
        copy.CopyFrom(self._tensors[name])
        try:
            if copy.data_location == onnx.TensorProto.EXTERNAL:
                load_external_data_for_tensor(copy, str(self.path.parent))
                copy.ClearField("external_data")
                copy.data_location = onnx.TensorProto.DEFAULT
            return np.asarray(numpy_helper.to_array(copy))
        except (OSError, ValueError, TypeError, onnx.checker.ValidationError) as error:
            raise UsageError(
                "a tensor's data cannot be read",
                where=f"{self.path}: {name}",
                got=error,
                remedy="copy the whole folder",
            ) from error


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _type(tensor: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(tensor.data_type))
