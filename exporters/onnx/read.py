"""Decode a written folder with onnx's own reference evaluator, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.reference import ReferenceEvaluator

from l4q.errors import UsageError
from l4q.weight import F32

WEIGHT_SUFFIX = ".weight"
BIAS_SUFFIX = ".group_bias"


def read_back(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, F32]]:
    """Decode every DequantizeLinear of model.onnx, or those of the modules in `only`: (module, float32 [out, in]).

    Raises:
        UsageError: model.onnx or its data is missing or damaged.
    """
    path = folder / "model.onnx"
    model = _load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            module = node.input[0].removesuffix(WEIGHT_SUFFIX)
            if only is not None and module not in only:
                continue
            nodes = [*(casts[name] for name in node.input if name in casts), node]
            sources = [casts[name].input[0] if name in casts else name for name in node.input]
            names = [*sources, *(name for name in (module + BIAS_SUFFIX,) if name in tensors)]
            parts = [_with_data(tensors[name], path) for name in names]
            yield module, np.ascontiguousarray(_evaluate(nodes, parts, model).T)


def _evaluate(nodes: list[onnx.NodeProto], parts: list[onnx.TensorProto], model: onnx.ModelProto) -> F32:
    """Run the file's own nodes, with the group bias if there is one, in a graph of their own: float32 [K, N]."""
    result = nodes[-1].output[0]
    if parts[-1].name.endswith(BIAS_SUFFIX):
        nodes += _add_group_bias(result, list(parts[0].dims), parts[-1])
        result = "weight"
    inputs = [helper.make_tensor_value_info(part.name, part.data_type, list(part.dims)) for part in parts]
    output = helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, list(parts[0].dims))
    graph = helper.make_graph(nodes, "weight", inputs, [output])
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    # Inputs, not initializers: an evaluator refers to itself, so what it holds stays until Python looks for cycles.
    (values,) = ReferenceEvaluator(single).run([result], {part.name: numpy_helper.to_array(part) for part in parts})
    return np.asarray(values)


def _add_group_bias(weight: str, dims: list[int], bias: onnx.TensorProto) -> list[onnx.NodeProto]:
    """Nodes for w + b repeated over its group, because x @ w + group_sums(x) @ b is x times that."""
    rows, columns = dims  # [K, N]
    groups = bias.dims[0]

    def shape(name: str, values: list[int]) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=values)

    return [
        shape("grouped_shape", [groups, rows // groups, columns]),
        shape("flat_shape", [rows, columns]),
        shape("group_axis", [1]),
        helper.make_node("Reshape", [weight, "grouped_shape"], ["grouped"]),
        helper.make_node("Unsqueeze", [bias.name, "group_axis"], ["spread"]),
        helper.make_node("Add", ["grouped", "spread"], ["shifted"]),
        helper.make_node("Reshape", ["shifted", "flat_shape"], ["weight"]),
    ]


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError("model.onnx cannot be read", where=path, got=error, remedy="export again") from error


def _with_data(tensor: onnx.TensorProto, path: Path) -> onnx.TensorProto:
    """A copy of the tensor that holds its bytes, so that one weight is in memory at a time."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if copy.data_location == onnx.TensorProto.EXTERNAL:
        try:
            load_external_data_for_tensor(copy, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise UsageError(
                "external data cannot be read", where=f"{path}: {tensor.name}", got=error, remedy="export again"
            ) from error
        copy.ClearField("external_data")
        copy.data_location = onnx.TensorProto.DEFAULT
    return copy
