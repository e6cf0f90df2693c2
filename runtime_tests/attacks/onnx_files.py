"""ONNX models whose tensors lie elsewhere or are not what they say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx

from runtime_tests.attacks.edit import Change, link, raw

MODEL = "model.onnx"
DATA = "model.onnx.data"


def _model(change: Callable[[onnx.ModelProto], object]) -> Change:
    def damage(folder: Path) -> None:
        model = onnx.load(folder / MODEL, load_external_data=False)
        change(model)
        (folder / MODEL).write_bytes(model.SerializeToString())

    return damage


def _codes(model: onnx.ModelProto) -> onnx.TensorProto:
    """The first quantized weight."""
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    return next(tensor for tensor in model.graph.initializer if tensor.name == node.input[0])


def _tensor(change: Callable[[onnx.TensorProto], object]) -> Change:
    return _model(lambda model: change(_codes(model)))


def _place(**values: str) -> Change:
    """Change where the first quantized weight lies."""

    def change(tensor: onnx.TensorProto) -> None:
        kept = {entry.key: entry.value for entry in tensor.external_data} | values
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)

    return _tensor(change)


def _outside(folder: Path, *, linked: bool) -> None:
    """Put the data beside the folder, and a link to it inside or a path that leads there."""
    shutil.move(folder / DATA, folder.parent / DATA)
    if linked:
        os.symlink(folder.parent / DATA, folder / DATA)


def _above(folder: Path) -> None:
    _place(location=f"../{DATA}")(folder)
    _outside(folder, linked=False)


def _dims(*sizes: int) -> Change:
    def change(tensor: onnx.TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return _tensor(change)


def _node(change: Callable[[onnx.NodeProto], object]) -> Change:
    return _model(
        lambda model: change(next(node for node in model.graph.node if node.op_type == "DequantizeLinear")),
    )


ONNX: dict[str, Change] = {
    "empty": raw(b"", MODEL),
    "random bytes": raw(bytes(range(256)) * 16, MODEL),
    "a length of 2**62": raw(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x3f", MODEL),
    "nested 10,000 deep": raw(b"\x3a\x7f" * 10_000, MODEL),
    "truncated": lambda folder: os.truncate(folder / MODEL, (folder / MODEL).stat().st_size // 2),
    "external data in the folder above": _above,
    "external data at an absolute path": _place(location="/etc/passwd"),
    "external data a link out of the folder": partial(_outside, linked=True),
    "external data /dev/zero": link(DATA, "/dev/zero"),
    "external data on another drive": _place(location="C:\\secret"),
    "external data with a base path": _place(basepath="/etc"),
    "external data nowhere": _place(location=""),
    "external data the folder": _place(location="."),
    "external data missing": lambda folder: (folder / DATA).unlink(),
    "external data truncated": lambda folder: os.truncate(folder / DATA, 100),
    "offset negative": _place(offset="-8"),
    "offset 2**63": _place(offset=str(1 << 63)),
    "offset as text": _place(offset="many"),
    "length 2**60": _place(length=str(1 << 60)),
    "length short": _place(length="8"),
    "sizes 2**31 by 2**31": _dims(1 << 31, 1 << 31),
    "sizes negative": _dims(-128, -128),
    "sizes of another weight": _dims(32, 8),
    "nine dimensions": _dims(*[1] * 9),
    "type 99": _tensor(lambda tensor: setattr(tensor, "data_type", 99)),
    "codes as text": _tensor(lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.STRING)),
    "codes as float64": _tensor(lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.DOUBLE)),
    "no nodes": _model(lambda model: model.graph.ClearField("node")),
}
# Graphs that l4q-inspect lists and a decoder cannot run
ONNX_NODES: dict[str, Change] = {
    "DequantizeLinear without output": _node(lambda node: node.ClearField("output")),
    "DequantizeLinear of its own output": _node(lambda node: node.input.__setitem__(0, node.output[0])),
}
