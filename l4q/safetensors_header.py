"""The header of a safetensors file, checked before the file is mapped.

8 bytes little-endian length n | n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data.
The format (https://github.com/huggingface/safetensors, "Format"): every byte of data belongs to exactly one tensor, in
order and without holes; a header has at most 100 MB (here 32 MiB); its keys are unique. The library checks most of this
again. What it lets pass, a name that comes twice, two readers of one file could see differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from l4q.errors import UsageError

PREFIX = 8
MOST_HEADER_BYTES = 1 << 25
"""32 MiB, some 250 000 tensors; the format allows 100 MB, and parsed JSON takes 20 times its text."""
MOST_DIMENSIONS = 8
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
METADATA = "__metadata__"
_REMEDY = "it is truncated, damaged or made to mislead: copy or write it again"


class _Wrong(Exception):
    def __init__(self, got: object, expected: str) -> None:
        super().__init__(got, expected)
        self.got, self.expected = got, expected


def check_header(path: Path) -> int:
    """Check a safetensors file's header against the file.

    Returns:
        Bytes of all tensors.

    Raises:
        UsageError: The file is missing or no plain file, or the header breaks the format; the message names the tensor.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError("a weight file is not a file", where=path, expected="a safetensors file", remedy=_REMEDY)
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(PREFIX), "little")
            if size < PREFIX or length > min(MOST_HEADER_BYTES, size - PREFIX):
                raise _Wrong(f"{size:,} bytes, header of {length:,}", "a header that lies inside the file")
            text = file.read(length)
        entries = _parse(text)
        _check_metadata(entries.pop(METADATA, {}))
        _check_layout({name: _span(name, entry) for name, entry in entries.items()}, size - PREFIX - length)
        return size - PREFIX - length
    except FileNotFoundError as error:
        raise UsageError("a weight file is missing", where=path, remedy="copy the whole folder again") from error
    except OSError as error:
        raise UsageError("a weight file cannot be read", where=path, got=error, remedy=_REMEDY) from error
    except _Wrong as wrong:
        raise UsageError(
            "a weight file is not valid safetensors",
            where=path,
            got=wrong.got,
            expected=wrong.expected,
            remedy=_REMEDY,
        ) from None


def _parse(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Wrong(error, "a header in JSON and UTF-8") from None
    if not isinstance(content, dict):
        raise _Wrong(type(content).__name__, "a JSON object as header")
    return content


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Wrong(f"{key!r} twice", "every name once")
        found[key] = value
    return found


def _no_constant(word: str) -> Any:
    raise _Wrong(word, "a header in JSON, which has no such number")


def _check_metadata(metadata: Any) -> None:
    good = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not good:
        raise _Wrong(f"{METADATA}: {type(metadata).__name__}", f"{METADATA} with text values")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, after checking that its dtype and shape need exactly so many."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _Wrong(f"{name!r}: {entry}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Wrong(f"{name!r}: dtype {dtype}", f"one of {sorted(DTYPE_BITS)}")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise _Wrong(f"{name!r}: shape {shape}", f"at most {MOST_DIMENSIONS} whole numbers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _Wrong(f"{name!r}: data_offsets {offsets}", "[begin, end], whole numbers >= 0")
    begin, end = offsets
    if begin > end or (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _Wrong(f"{name!r}: {dtype} {shape} in bytes {begin} to {end}", "as many bytes as dtype and shape need")
    return begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(spans: dict[str, tuple[int, int]], size: int) -> None:
    """Tensors must follow one another without overlap or hole and fill the file."""
    at = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != at:
            kind = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise _Wrong(f"{name!r} begins at {begin}, {kind}", f"data_offsets that begin at {at}")
        at = end
    if at != size:
        raise _Wrong(f"tensors end at {at:,}, the data at {size:,}", "a file that ends with its last tensor")
