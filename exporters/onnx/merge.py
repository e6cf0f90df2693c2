"""One MatMulNBits for the linears that read the same input, in a saved graph: fewer, larger kernels per step.

MatMulNBits stores codes [N, blocks, bytes], scales [N * blocks] and zero-points [N * bytes], row after row of the
output, so the rows of several linears stand behind one another unchanged: nothing is decoded
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.onnx.external import with_data

KERNEL = "MatMulNBits"
INLINE_BYTES = 256
"""Smaller tensors stay in the model's file."""
ALIGNMENT = 64
PAGE_BYTES = 4096
LARGE_BYTES = 1 << 20
"""Tensors from here on start on a page, as memory mapping wants them."""
DAMAGED = "the data of ONNX Runtime's saved graph cannot be read"
AGAIN = "export again"

Sources = dict[str, list[onnx.TensorProto]]
"""By initializer: the tensors whose bytes it holds, in order."""


def merge_linears(model: onnx.ModelProto, path: Path, data_name: str) -> None:
    """Merge the linears of a graph and write all its weights to a new data file, one tensor in memory at a time.

    Args:
        model: A saved graph, its external data not loaded; changed in place, and afterwards refers to `data_name`.
        path: Its file, beside which its present data lies.
        data_name: File to create beside it.

    Raises:
        UsageError: The present data cannot be read.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    groups: dict[tuple[object, ...], list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == KERNEL:
            groups.setdefault(_shared(node), []).append(node)
    sources: Sources = {name: [tensor] for name, tensor in tensors.items()}
    first, gone = {}, set()
    for nodes in (nodes for nodes in groups.values() if len(nodes) > 1):
        first[nodes[0].output[0]] = _merged(nodes, sources)
        gone |= {node.output[0] for node in nodes[1:]}
    found: list[onnx.NodeProto] = []
    for node in model.graph.node:
        found += first.get(node.output[0], () if node.output[0] in gone else (node,))
    _replace(model.graph, found)
    used = {name for node in found for name in node.input}
    kept = {name: parts for name, parts in sources.items() if name in used}
    del model.graph.initializer[:]
    with (path.parent / data_name).open("wb") as file:
        model.graph.initializer.extend(_write(file, name, parts, path, data_name) for name, parts in kept.items())


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _shared(node: onnx.NodeProto) -> tuple[object, ...]:
    """What linears must have in common to be one: the input, everything but their rows, and which tensors they have."""
    same = sorted(item for item in _attributes(node).items() if item[0] != "N")
    return (node.input[0], *same, *(bool(name) for name in node.input))


def _merged(nodes: list[onnx.NodeProto], sources: Sources) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """One kernel for several and the Split that gives back their outputs; `sources` learns of its tensors."""
    inputs = [nodes[0].input[0]]
    for names in zip(*(node.input[1:] for node in nodes), strict=True):
        inputs.append(f"{names[0]}/merged" if names[0] else "")
        if names[0]:
            sources[inputs[-1]] = [sources[name][0] for name in names]
    rows = [_attributes(node)["N"] for node in nodes]
    name = f"{nodes[0].output[0]}/merged"
    attributes: dict[str, Any] = {**_attributes(nodes[0]), "N": sum(rows)}
    sizes = f"{name}/rows"
    sources[sizes] = [numpy_helper.from_array(np.array(rows, np.int64), sizes)]
    return (
        helper.make_node(KERNEL, inputs, [name], name=name, domain=nodes[0].domain, **attributes),
        helper.make_node("Split", [name, sizes], [node.output[0] for node in nodes], name=f"{name}/Split", axis=-1),
    )


def _write(file: BinaryIO, name: str, parts: list[onnx.TensorProto], path: Path, data_name: str) -> onnx.TensorProto:
    """An initializer of the given parts along the first axis: small ones hold their bytes, others lie in `file`."""
    whole = [with_data(part, path, DAMAGED, remedy=AGAIN) for part in parts]
    tensor = onnx.TensorProto(name=name, data_type=parts[0].data_type)
    tensor.dims.extend([sum(part.dims[0] for part in parts), *parts[0].dims[1:]] if parts[0].dims else [])
    pieces = [part.raw_data or numpy_helper.to_array(part).tobytes() for part in whole]
    nbytes = sum(map(len, pieces))
    if nbytes < INLINE_BYTES:
        tensor.raw_data = b"".join(pieces)
        return tensor
    file.write(bytes(-file.tell() % (PAGE_BYTES if nbytes >= LARGE_BYTES else ALIGNMENT)))
    place = {"location": data_name, "offset": str(file.tell()), "length": str(nbytes)}
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    for piece in pieces:
        file.write(piece)
    return tensor
