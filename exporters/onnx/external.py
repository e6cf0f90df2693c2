"""ONNX files nobody vouches for: the model parsed, and a tensor's bytes read only from where they may lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx.external_data_helper import load_external_data_for_tensor

from l4q.errors import UsageError
from l4q.guards import foreign
from l4q.inside import lies_inside

MOST_BYTES = (1 << 31) - 1
"""Of a protobuf message; larger models keep their tensors outside."""
MOST_DIMENSIONS = 8
KEYS = {"location", "offset", "length", "checksum"}
"""Of external data; basepath, which would lead elsewhere, is none of them."""
BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
BITS |= dict.fromkeys(("INT8", "UINT8", "BOOL"), 8) | dict.fromkeys(("INT16", "UINT16", "FLOAT16", "BFLOAT16"), 16)
BITS |= dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32)
BITS |= dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64)
_REMEDY = "it is damaged or was made to mislead: copy the whole folder again"


def load_model(path: Path, what: str, *, remedy: str) -> onnx.ModelProto:
    """An ONNX model without its external data.

    Args:
        path: The file.
        what: First sentence of the error.
        remedy: Its last line.

    Raises:
        UsageError: It is missing, too large, or no ONNX model.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UsageError(what, where=path, got=f"{path.stat().st_size:,} bytes", expected=f"at most {MOST_BYTES:,}")
    with foreign(what, where=path, remedy=remedy):
        model = onnx.load(path, load_external_data=False)
        odd = next(_not_text(model), None)
    if odd is not None:
        raise UsageError(what, where=f"{path}: {odd}", expected="names in UTF-8", remedy=remedy)
    return model


def _not_text(message: Message) -> Iterator[str]:
    """Fields of text that are not UTF-8, which protobuf hands over as bytes."""
    for kind, value in message.ListFields():
        several = value if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)
        if kind.type == kind.TYPE_MESSAGE:
            for inner in several:
                yield from _not_text(inner)
        elif kind.type == kind.TYPE_STRING and any(isinstance(text, bytes) for text in several):
            yield kind.full_name


def tensor_bits(tensor: onnx.TensorProto) -> int:
    """Bits of a tensor's data by its type and sizes.

    Raises:
        UsageError: The type is unknown or a size is negative.
    """
    known = tensor.data_type in onnx.TensorProto.DataType.values()
    kind = onnx.TensorProto.DataType.Name(tensor.data_type) if known else str(tensor.data_type)
    if kind not in BITS and not kind.startswith("FLOAT8"):
        raise UsageError(
            "a tensor of unknown type", where=tensor.name, got=kind, expected=f"one of {sorted(BITS)}", remedy=_REMEDY
        )
    if len(tensor.dims) > MOST_DIMENSIONS or any(size < 0 for size in tensor.dims):
        raise UsageError("a tensor has impossible sizes", where=tensor.name, got=list(tensor.dims), remedy=_REMEDY)
    return int(math.prod(tensor.dims)) * BITS.get(kind, 8)


def with_data(tensor: onnx.TensorProto, path: Path, what: str, *, remedy: str) -> onnx.TensorProto:
    """A copy of the tensor that holds its bytes, so that one weight is in memory at a time.

    Args:
        tensor: An initializer.
        path: The model's file.
        what: First sentence of the error.
        remedy: Its last line.

    Raises:
        UsageError: Its data lies outside the model's folder, is not there, or is not as long as its sizes say.
    """
    check_data(tensor, path, what)
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if copy.data_location != onnx.TensorProto.EXTERNAL:
        return copy
    where = f"{path}: {tensor.name}"
    with foreign(what, where=where, remedy=remedy):
        load_external_data_for_tensor(copy, str(path.parent))
    copy.ClearField("external_data")
    copy.data_location = onnx.TensorProto.DEFAULT
    return copy


def check_data(tensor: onnx.TensorProto, path: Path, what: str, *, absent: bool = False) -> None:
    """Check that a tensor's data is where it may be, and as long as its type and sizes say; nothing is read.

    Args:
        tensor: An initializer.
        path: The model's file.
        what: First sentence of the error.
        absent: Whether the file beside the model may be missing.

    Raises:
        UsageError: See above.
    """
    nbytes, where = -(-tensor_bits(tensor) // 8), f"{path}: {tensor.name}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_place({entry.key: entry.value for entry in tensor.external_data}, path, nbytes, what, where, absent)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != nbytes:
        raise UsageError(what, where=where, got=f"{len(tensor.raw_data):,} bytes", expected=nbytes, remedy=_REMEDY)


def _check_place(place: dict[str, str], path: Path, nbytes: int, what: str, where: str, absent: bool) -> None:
    """External data must be a file of the folder and lie in it with exactly the tensor's bytes."""
    location = place.get("location", "")
    parts = PurePosixPath(location).parts
    plain = bool(parts) and ".." not in parts and location.isprintable() and not PurePosixPath(location).is_absolute()
    if not plain or PureWindowsPath(location).drive or "\\" in location or not place.keys() <= KEYS:
        raise UsageError(
            "external data points outside its folder", where=where, got=location, expected="a file of the folder"
        )
    target = path.parent / location
    if not lies_inside(target, path.parent):
        raise UsageError(
            "external data is a link that leaves its folder", where=where, got=target.resolve(), expected="a file of it"
        )
    if absent and not target.exists():
        return
    try:
        size = target.stat().st_size if target.is_file() else -1
        offset, length = int(place.get("offset", "0")), int(place.get("length", str(nbytes)))
    except (OSError, ValueError) as error:
        raise UsageError(what, where=where, got=error, remedy=_REMEDY) from error
    if size < 0 or offset < 0 or length != nbytes or offset + length > size:
        raise UsageError(
            what,
            where=where,
            got=f"{length:,} bytes at {offset:,} of {size:,}" if size >= 0 else f"no file {location}",
            expected=f"{nbytes:,} bytes inside the file",
            remedy=_REMEDY,
        )
