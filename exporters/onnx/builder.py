"""A thin layer over onnx_ir: nodes with readable, repeatable names and initializers that are read only when written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Attribute = int | float | str | Sequence[int]


Array = npt.NDArray[np.generic]


class Pieces(ir.LazyTensor):
    """A tensor that is written piece after piece and never is in memory as a whole.

    Args:
        read: Its arrays in order; those of sub-byte types hold packed bytes.
        dtype: Of the tensor.
        shape: Of the tensor.
        name: Of the tensor.
    """

    def __init__(
        self, read: Callable[[], Iterable[Array]], dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> None:
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self.pieces = read
        """Gives the arrays; may be replaced by what has them ready."""
        self.put: Callable[[Any, npt.NDArray[np.uint8]], object] = lambda file, data: file.write(data.data)
        """Writes bytes where the file stands, and leaves it behind them."""

    def tofile(self, file: Any) -> None:
        """Write its bytes to an open file."""
        for piece in self.pieces():
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            self.put(file, data)

    def _whole(self) -> ir.TensorProtocol:
        data = np.concatenate([np.ascontiguousarray(piece).reshape(-1).view(np.uint8) for piece in self.pieces()])
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(data, self.dtype, shape=self.shape, name=self.name)
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


class GraphBuilder:
    """Collects nodes and initializers in order; equal calls give equal graphs."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._uses: dict[str, int] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, scope: str, **attributes: Attribute) -> ir.Value:
        """Append a node of the default ONNX domain and return its one output, named `<scope>/<op_type>`."""
        output = ir.Value(name=self._unique(f"{scope}/{op_type}"))
        return self.node(op_type, inputs, [output], attributes)[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        attributes: dict[str, Attribute],
    ) -> Sequence[ir.Value]:
        """Append a node with given output values, named after the first."""
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=outputs, name=outputs[0].name))
        return outputs

    def split(self, x: ir.Value, parts: int | Sequence[int], *, scope: str) -> Sequence[ir.Value]:
        """Cut x along its last axis into equal parts, or into parts of given sizes."""
        count = parts if isinstance(parts, int) else len(parts)
        outputs = [ir.Value(name=self._unique(f"{scope}/Split")) for _ in range(count)]
        if isinstance(parts, int):
            return self.node("Split", [x], outputs, {"axis": -1, "num_outputs": parts})
        return self.node("Split", [x, self.integers(*parts)], outputs, {"axis": -1})

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A small initializer held in memory; the same name is the same value."""
        if name not in self.initializers:
            tensor = ir.tensor(np.asarray(array), name=name)
            self._add(name, tensor)
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A 1-D int64 constant, for axes and shapes."""
        return self.constant("const/" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def scalar(self, value: int) -> ir.Value:
        """A 0-D int64 constant."""
        return self.constant(f"const/scalar_{value}", np.array(value, dtype=np.int64))

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Iterable[Array]]
    ) -> ir.Value:
        """An initializer whose bytes `read` provides, piece after piece, each time they are needed; see `Pieces`."""
        if name not in self.initializers:
            self._add(name, Pieces(read, dtype, shape, name))
        return self.initializers[name]

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        self.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )

    def _unique(self, name: str) -> str:
        count = self._uses.get(name, 0)
        self._uses[name] = count + 1
        return f"{name}_{count}" if count else name


def tensor_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A graph input or output; strings are dynamic dimensions."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
