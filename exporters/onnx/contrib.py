"""The built graph in ONNX Runtime's own operators, for its saved graph: what a generation loop needs to be fast there.

    Attention(q, k, v, mask, past)        -> GroupQueryAttention(q, k, v, past, seqlens_k, total, bias)
    Add(residual, change) -> RMSNormalization  -> SkipSimplifiedLayerNormalization

The first writes new keys and values into the past where a caller binds past and present to one buffer, so that no step
copies the cache; https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md describes both. The
boolean mask becomes an additive bias and every row counts `total - 1` columns before its last one, so a column of the
cache is a column of the attention mask as in the standard graph: padding may stand left or right, sliding windows are
in the bias, and rotations stay outside, computed from the mask.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

GRAPH_KEY = "l4q.graph"
"""Key of model.onnx's metadata that records where the graph came from: "built" or "exported"."""
DOMAIN = "com.microsoft"
ATTENTION = "GroupQueryAttention"
SKIP_NORM = "SkipSimplifiedLayerNormalization"
HEAD_MULTIPLE = 8
"""GroupQueryAttention's head_dim must be a multiple of it."""
ATTRIBUTES = {"q_num_heads": "num_heads", "kv_num_heads": "kv_num_heads", "scale": "scale", "softcap": "softcap"}
"""Of Attention, and what GroupQueryAttention calls them."""
SCOPE = "contrib"
PRESENT_LENGTH = "present_sequence_length"
"""Length of the returned cache: past + new, or the whole shared buffer."""


def use_contrib(model: onnx.ModelProto) -> bool:
    """Replace operators in place; weights and names of inputs and outputs stay.

    Args:
        model: model.onnx, its external data not loaded.

    Returns:
        Whether it was done: only the built graph is known well enough, and GroupQueryAttention takes no head_dim that
        is no multiple of 8.
    """
    graph, metadata = model.graph, {entry.key: entry.value for entry in model.metadata_props}
    if metadata.get(GRAPH_KEY) != "built":
        return False
    presents = [value for value in graph.output if value.name.startswith("present.")]
    if any(value.type.tensor_type.shape.dim[3].dim_value % HEAD_MULTIPLE for value in presents):
        return False
    for value in presents:
        value.type.tensor_type.shape.dim[2].dim_param = PRESENT_LENGTH
    nodes = _grouped(list(graph.node), graph.initializer)
    nodes = _skipped(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return True


def _grouped(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Attention as GroupQueryAttention, behind the sizes and the biases they share."""
    constants = {"one": np.array([1], np.int32), "axis": np.array([0], np.int64), "taken": np.float32(0)}
    constants["left_out"] = np.finfo(np.float32).min
    initializers.extend(
        numpy_helper.from_array(np.asarray(value), f"{SCOPE}/{name}") for name, value in constants.items()
    )
    found: list[onnx.NodeProto] = []
    biases: set[str] = set()
    for node in nodes:
        if node.op_type != "Attention":
            found.append(node)
            continue
        query, key, value, mask, *past = node.input
        if not biases:
            found += _sizes()
        bias = f"{SCOPE}/{mask}"
        if bias not in biases:
            found.append(helper.make_node("Where", [mask, f"{SCOPE}/taken", f"{SCOPE}/left_out"], [bias], name=bias))
            biases.add(bias)
        inputs = [query, key, value, *past, f"{SCOPE}/seqlens_k", f"{SCOPE}/total", "", "", "", bias]
        kept = {ATTRIBUTES[attribute.name]: helper.get_attribute_value(attribute) for attribute in node.attribute}
        found.append(helper.make_node(ATTENTION, inputs, node.output, name=node.name, domain=DOMAIN, **kept))
    return found


def _sizes() -> list[onnx.NodeProto]:
    """Columns of the mask as a scalar, and one less for every row of the batch; both int32."""

    def node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        named = [name if name == "attention_mask" else f"{SCOPE}/{name}" for name in inputs]
        return helper.make_node(op_type, named, [f"{SCOPE}/{output}"], name=f"{SCOPE}/{output}", **attributes)

    return [
        node("Shape", ["attention_mask"], "rows", start=0, end=1),
        node("Shape", ["attention_mask"], "columns", start=1, end=2),
        node("Cast", ["columns"], "count", to=onnx.TensorProto.INT32),
        node("Squeeze", ["count", "axis"], "total"),
        node("Sub", ["count", "one"], "last"),
        node("Expand", ["last", "rows"], "seqlens_k"),
    ]


def _skipped(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each sum that one RMSNormalization reads, together with it."""
    norms = {node.input[0]: node for node in nodes if node.op_type == "RMSNormalization"}
    readers = Counter(node.input[0] for node in norms.values())
    found: list[onnx.NodeProto] = []
    merged: set[str] = set()
    for node in nodes:
        if node.op_type == "Add" and readers[node.output[0]] == 1:
            norm = norms[node.output[0]]
            merged.add(norm.name)
            (epsilon,) = (attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
            inputs, outputs = [*node.input, norm.input[1]], [norm.output[0], "", "", node.output[0]]
            found.append(helper.make_node(SKIP_NORM, inputs, outputs, name=norm.name, domain=DOMAIN, epsilon=epsilon))
        else:
            found.append(node)
    return [node for node in found if node.op_type != "RMSNormalization" or node.name not in merged]
