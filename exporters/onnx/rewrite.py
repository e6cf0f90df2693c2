"""Put a checkpoint's integers into a traced graph: its products become DequantizeLinear + MatMul.

torch.onnx writes a linear layer as MatMul(x, Transpose(W)) + bias, or as Gemm(x, W, bias; transB=1) on two-dimensional
x, with W [out_features, in_features] under the parameter's name. Weights are found by that name alone, so no
architecture needs a rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.linear import LinearEmitter
from exporters.onnx.trace import TracedDecoder
from l4q.checkpoint import L4QCheckpoint

WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of activations with the transpose of a weight."""

    node: ir.Node
    x: ir.Value
    bias: ir.Value | None


def read_graph(traced: TracedDecoder) -> ir.Model:
    """The traced graph, fresh for every caller to change."""
    return ir.from_proto(onnx.load_model_from_string(traced.model))


def linear_names(traced: TracedDecoder) -> frozenset[str]:
    """Modules whose weight is used by exactly one product and nothing else: those that may hold integers."""
    values = {str(value.name): value for value in read_graph(traced).graph.inputs}
    modules = (name.removesuffix(WEIGHT) for name in traced.weights if name.endswith(WEIGHT))
    return frozenset(module for module in modules if find_product(values[module + WEIGHT]) is not None)


def find_product(weight: ir.Value) -> Product | None:
    """The one product that reads a weight [out, in], or None if it is read in any other way."""
    reader = _only_reader(weight)
    if reader is None or len(weight.shape or ()) != 2:
        return None
    node, slot = reader
    if node.op_type == "Gemm" and slot == 1:
        return _gemm_product(node)
    if node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", [1, 0])) != (1, 0):
        return None
    reader = _only_reader(node.outputs[0])
    if reader is None or reader[0].op_type != "MatMul" or reader[1] != 1:
        return None
    x = reader[0].inputs[0]
    return None if x is None else Product(node=reader[0], x=x, bias=None)


def _only_reader(value: ir.Value) -> tuple[ir.Node, int] | None:
    """(node, slot) of the one use of a value, or None if there are none or several."""
    uses = list(value.uses())
    return (uses[0].node, uses[0].idx) if len(uses) == 1 else None


def _gemm_product(node: ir.Node) -> Product | None:
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 == node.attributes.get_float("beta", 1.0)
    turned = (node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)) == (0, 1)
    x = node.inputs[0]
    if not plain or not turned or x is None:
        return None
    return Product(node=node, x=x, bias=node.inputs[2] if len(node.inputs) > 2 else None)


def build_traced(
    checkpoint: L4QCheckpoint,
    traced: TracedDecoder,
    *,
    block_size: int | None,
    half_scales: bool = False,
    metadata: Mapping[str, str],
) -> ir.Model:
    """The traced model with lazily read weights, quantized ones as integers.

    Raises:
        UsageError: `block_size` does not fit a layer's groups.
    """
    model = read_graph(traced)
    graph = model.graph
    builder = GraphBuilder()
    emitter = LinearEmitter(builder, checkpoint, block_size, half_scales=half_scales)
    weights = {name: value for value in graph.inputs if (name := str(value.name)) in traced.weights}
    own_names = stored_names(checkpoint, traced)
    quantized = frozenset(f"{module}{WEIGHT}" for module in checkpoint.modules)
    products: list[tuple[Product, str]] = []
    for name, value in weights.items():
        stored, product = own_names[name], find_product(value)
        if stored in quantized and product is not None:  # the plan has seen to it that all quantized ones are products
            products.append((product, stored.removesuffix(WEIGHT)))
        else:
            value.name = f"{name} (traced)"
            value.replace_all_uses_with(emitter.dense(stored))
    position = {node: index for index, node in enumerate(graph)}
    for product, module in sorted(products, key=lambda found: position[found[0].node]):  # shared nodes come first
        _place(graph, builder, emitter, product, module)
    for value in weights.values():
        graph.inputs.remove(value)
    RemoveUnusedNodesPass()(model)
    for value in builder.initializers.values():
        graph.register_initializer(value)
    _forget_shapes(graph)
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    return model


def stored_names(checkpoint: L4QCheckpoint, traced: TracedDecoder) -> dict[str, str]:
    """Traced weight name -> the checkpoint's name of it, which for tied weights may be another."""
    present = {*checkpoint.dense_names, *(f"{module}{WEIGHT}" for module in checkpoint.modules)}
    groups = {name: group for group in traced.tied.values() for name in group}
    return {name: next((n for n in groups.get(name, ()) if n in present), name) for name in traced.weights}


def _place(graph: ir.Graph, builder: GraphBuilder, emitter: LinearEmitter, product: Product, module: str) -> None:
    old = product.node.outputs[0]
    start = len(builder.nodes)
    if product.bias is None:
        y = emitter.product(product.x, module)
    else:
        y = _biased_rows(builder, emitter, product.x, product.bias, module)
    graph.insert_before(product.node, builder.nodes[start:])
    name = old.name
    is_output = any(value is old for value in graph.outputs)
    y.shape, y.type = old.shape, old.type
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(product.node, safe=True)
    if is_output:
        y.name = name


def _biased_rows(builder: GraphBuilder, emitter: LinearEmitter, x: ir.Value, bias: ir.Value, module: str) -> ir.Value:
    """Multiply x [rows, in_features] with a leading axis of 1 and add the bias: [rows, out_features].

    On two axes ONNX Runtime 1.31 joins product, bias and a following Relu into a FusedGemm before it looks for blocked
    weights, and the layer would run on weights dequantized in every call.
    """
    axis = builder.integers(0)
    raised = builder.op("Unsqueeze", x, axis, scope=module)
    raised.shape = ir.Shape([1, *(x.shape or (None, None))])
    y = builder.op("Add", emitter.product(raised, module), bias, scope=module)
    return builder.op("Squeeze", y, axis, scope=module)


def _forget_shapes(graph: ir.Graph) -> None:
    """Drop the inner values' shapes, whose dimensions are torch's symbols; runtimes infer their own."""
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in _inner_values(graph):
        if id(value) not in kept:
            value.shape = None


def _inner_values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph.all_nodes():
        yield from node.outputs
