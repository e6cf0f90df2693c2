"""Linear layers of the graph: blocked DequantizeLinear into MatMul, or a dense float32 matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from exporters.onnx.builder import Array, GraphBuilder
from exporters.onnx.pack import PackedParameters, choose_block, code_pieces, float_center, pack_parameters
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.weight import F32

PIECE_BYTES = 4 << 20
"""Stored bytes of a dense tensor that are widened at a time: few, so that caches and the allocator keep them."""


class LinearEmitter:
    """Emits the checkpoint's linears into one graph; tensors are read from the checkpoint when the file is written."""

    def __init__(
        self, builder: GraphBuilder, checkpoint: L4QCheckpoint, block_size: int | None, *, half_scales: bool = False
    ) -> None:
        self._builder = builder
        self._checkpoint = checkpoint
        self._block_size = block_size
        self._half_scales = half_scales
        self._quantized = frozenset(checkpoint.modules)
        self._dense = frozenset(checkpoint.dense_names)
        self._sums: dict[tuple[str | None, int], ir.Value] = {}
        # The writer asks for a module's arrays one after the other; one slot saves computing them once per array.
        self._parameters: Callable[[str, int], PackedParameters] = lru_cache(maxsize=1)(self._pack)

    def linear(self, x: ir.Value, module: str) -> ir.Value:
        """Multiply x [..., in_features] into [..., out_features], with the module's bias if it has one."""
        if module in self._quantized:
            y = self.product(x, module)
        else:
            y = self.dense_product(x, self.dense(f"{module}.weight"), scope=module)
        if f"{module}.bias" in self._dense:
            y = self._builder.op("Add", y, self.dense(f"{module}.bias"), scope=module)
        return y

    def fused(self, x: ir.Value, modules: Sequence[str], sizes: Sequence[int] | None) -> Sequence[ir.Value]:
        """Products of several modules, or the parts of the one module that holds them all, cut by `sizes` or in two."""
        if len(modules) > 1:
            return [self.linear(x, module) for module in modules]
        return self._builder.split(self.linear(x, modules[0]), sizes or 2, scope=modules[0])

    def dense(self, name: str, *, plus: float = 0.0) -> ir.Value:
        """An unquantized tensor, widened to float32 (exact from every stored dtype the plan admits), plus a number."""

        def read() -> Iterator[Array]:
            for rows in self._checkpoint.dense_row_slices(name, PIECE_BYTES):
                values = self._checkpoint.dense(name, rows).float()
                yield (values + plus if plus else values).contiguous().numpy()

        return self._builder.lazy(name, ir.DataType.FLOAT, self._checkpoint.dense_shape(name), read)

    def dense_product(self, x: ir.Value, weight: ir.Value, *, scope: str) -> ir.Value:
        """Multiply x by the transpose of a dense [N, K] matrix, which other nodes (the embedding) may share."""
        transposed = self._builder.op("Transpose", weight, scope=scope, perm=[1, 0])
        return self._builder.op("MatMul", x, transposed, scope=scope)

    def product(self, x: ir.Value, module: str) -> ir.Value:
        """Multiply x [..., in_features] by a quantized weight, without bias."""
        info = self._checkpoint.info(module)
        block = choose_block(
            in_features=info.in_features, group_size=info.group_size, requested=self._block_size, where=module
        )
        rows = -(-info.in_features // block)
        inputs = [
            self._codes(module, block),
            self._scales(module, (rows, info.out_features), block),
        ]
        if info.zero_point == "integer":
            inputs.append(self._lazy(module, "zeros", ir.DataType.UINT4, (rows, info.out_features), block))
        # One DequantizeLinear per consumer, on axis 0 of [K, N]: what ONNX Runtime's fusion asks for.
        weight = self._builder.op("DequantizeLinear", *inputs, scope=module, axis=0, block_size=block)
        y = self._builder.op("MatMul", x, weight, scope=module)
        if info.zero_point == "float":
            bias = self._lazy(module, "group_bias", ir.DataType.FLOAT, (info.groups, info.out_features), block)
            correction = self._builder.op("MatMul", self._group_sums(x, info), bias, scope=module)
            y = self._builder.op("Add", y, correction, scope=module)
        return y

    def _codes(self, module: str, block: int) -> ir.Value:
        """The codes of [K, N], packed."""
        info = self._checkpoint.info(module)

        def read() -> Iterator[Array]:
            signed = self._parameters(module, block).signed
            return code_pieces(self._checkpoint.packed(module), signed=signed)

        shape = (info.in_features, info.out_features)
        return self._builder.lazy(f"{module}.weight", self._code_dtype(module), shape, read)

    def _scales(self, module: str, shape: tuple[int, int], block: int) -> ir.Value:
        """Scales as float32; stored as float16 they pass a Cast, which runtimes fold when they load the model."""
        if not self._half_scales:
            return self._lazy(module, "scales", ir.DataType.FLOAT, shape, block)
        half = self._builder.lazy(
            f"{module}.scales",
            ir.DataType.FLOAT16,
            shape,
            lambda: [self._parameters(module, block).scales.astype(np.float16)],  # exact: they were float16 in training
        )
        return self._builder.op("Cast", half, scope=f"{module}.scales", to=int(ir.DataType.FLOAT))

    def _code_dtype(self, module: str) -> ir.DataType:
        zero_point = self._checkpoint.info(module).zero_point
        # Only a float zero-point's values decide between signed and unsigned codes.
        if zero_point == "float" and float_center(self._checkpoint.parameters(module)) == 0:
            return ir.DataType.UINT4
        return ir.DataType.UINT4 if zero_point == "integer" else ir.DataType.INT4

    def _group_sums(self, x: ir.Value, info: WeightInfo) -> ir.Value:
        """Sum x [..., K] into [..., groups]; linears that read the same x share the node."""
        key = (x.name, info.group_size)
        if key not in self._sums:
            scope = f"{x.name}/group_sums"
            leading = len(x.shape) - 1 if x.shape is not None else 2  # values of the built graph are [batch, length, K]
            shape = self._builder.integers(*[0] * leading, info.groups, info.group_size)
            grouped = self._builder.op("Reshape", x, shape, scope=scope)  # [..., groups, group_size]
            self._sums[key] = self._builder.op(
                "ReduceSum", grouped, self._builder.integers(-1), scope=scope, keepdims=0
            )
        return self._sums[key]

    def _lazy(self, module: str, part: str, dtype: ir.DataType, shape: tuple[int, int], block: int) -> ir.Value:
        return self._builder.lazy(
            f"{module}.{part}", dtype, shape, lambda: [getattr(self._parameters(module, block), part)]
        )

    def _pack(self, module: str, block: int) -> PackedParameters:
        return pack_parameters(self._checkpoint.parameters(module), block)


def as_float32(values: Array | float) -> F32:
    """A float32 constant."""
    return np.asarray(values, dtype=np.float32)
