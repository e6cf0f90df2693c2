"""The header of a GGUF file, checked before gguf-py maps the file and believes its counts.

magic "GGUF", version uint32, tensors uint64, pairs uint64 | pairs: key, type uint32, value | tensors: name, dimensions
uint32, sizes uint64 each, type uint32, offset uint64 | padding to the alignment | data. Text is a uint64 length and
UTF-8; an array is a type, a uint64 count and its values (ggml's docs/gguf.md).
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from l4q.errors import UsageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9
# type of a value -> struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LEAST_PAIR = 13
"""Bytes of the shortest pair: an empty key, a type, one byte."""
LEAST_TENSOR = 24
MOST_DIMENSIONS = 4
MOST_KEY_BYTES = 1 << 16
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
LAYERS = re.compile(r"\w+(-\w+)*\.block_count")
ALWAYS_LAYERS = 64
COUNTS = re.compile(r".+\.(head_count|head_count_kv|expert_count|expert_used_count|leading_dense_block_count)")
MOST_COUNT = 1 << 16
POSITIVE = re.compile(r".+\.(layer_norm_epsilon|layer_norm_rms_epsilon|rope\.freq_base)")
_REMEDY = "it is truncated, damaged or made to mislead: copy it again"


class _Wrong(Exception):
    def __init__(self, got: object, expected: str) -> None:
        super().__init__(got, expected)
        self.got, self.expected = got, expected


@dataclass
class _Cursor:
    """A position in a file, which every read moves and none leaves."""

    file: BinaryIO
    size: int
    keys: dict[str, Any] = field(default_factory=dict)

    def take(self, count: int, what: str) -> bytes:
        at = self.file.tell()
        if count > self.size - at:
            raise _Wrong(f"{what} of {count:,} bytes at byte {at:,} of {self.size:,}", "a header inside the file")
        return self.file.read(count)

    def skip(self, count: int, what: str) -> None:
        at = self.file.tell()
        if count > self.size - at:
            raise _Wrong(f"{what} of {count:,} bytes at byte {at:,} of {self.size:,}", "a header inside the file")
        self.file.seek(count, 1)

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        if length > MOST_KEY_BYTES:
            raise _Wrong(f"{what} of {length:,} bytes", f"at most {MOST_KEY_BYTES:,}")
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Wrong(f"{what}: {error}", "UTF-8") from None


def check_gguf(path: Path) -> None:
    """Check a GGUF file's header against the file, in memory bounded by the header.

    Raises:
        UsageError: It cannot be read or breaks the format; the message says what was found and what is possible.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _check(_Cursor(file, size))
    except OSError as error:
        raise UsageError("the GGUF file cannot be read", where=path, got=error) from error
    except _Wrong as wrong:
        raise UsageError(
            "the GGUF file is truncated or damaged",
            where=path,
            got=wrong.got,
            expected=wrong.expected,
            remedy=_REMEDY,
        ) from None


def _check(cursor: _Cursor) -> None:
    magic = cursor.file.read(len(MAGIC))
    if magic != MAGIC:
        raise UsageError("not a GGUF file", where=cursor.file.name, got=magic, expected=MAGIC, remedy="copy it again")
    version = cursor.number("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        raise _Wrong(
            f"version {version}{', in big-endian order' * swapped}", f"version {VERSIONS[0]} or 3, little-endian"
        )
    tensors, pairs = cursor.number("Q", "number of tensors"), cursor.number("Q", "number of pairs")
    if pairs * LEAST_PAIR + tensors * LEAST_TENSOR > cursor.size:
        raise _Wrong(f"{tensors:,} tensors and {pairs:,} pairs in {cursor.size:,} bytes", "counts that fit the file")
    for _ in range(pairs):
        key = cursor.text("a key")
        if key in cursor.keys:
            raise _Wrong(f"key {key} twice", "every key once")
        cursor.keys[key] = _value(cursor, cursor.number("I", key), key, inside=False)
    _check_keys(cursor.keys, tensors)
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    _check_data(infos, cursor)


def _value(cursor: _Cursor, kind: int, key: str, *, inside: bool) -> Any:
    """A scalar value; of text and arrays the length only, after walking over them."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], key)
    if kind == TEXT:
        length = cursor.number("Q", key)
        cursor.skip(length, key)
        return length
    if kind != ARRAY or inside:  # llama.cpp has no arrays of arrays either
        raise _Wrong(f"{key}: type {kind}{' in an array' * inside}", "a type of the format")
    of, count = cursor.number("I", key), cursor.number("Q", key)
    if of in SCALARS:
        cursor.skip(count * struct.calcsize(f"<{SCALARS[of]}"), key)
        return count
    if count * 8 > cursor.size:
        raise _Wrong(f"{key}: {count:,} values", "an array inside the file")
    for _ in range(count):
        _value(cursor, of, key, inside=True)
    return count


def _check_keys(keys: dict[str, Any], tensors: int) -> None:
    alignment = keys.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    power = type(alignment) is int and 8 <= alignment <= 1 << 20 and not alignment & (alignment - 1)
    if not power:
        raise _Wrong(f"{ALIGNMENT} {alignment}", "a power of two from 8 to 1,048,576")
    for key, value in keys.items():
        if POSITIVE.fullmatch(key) and not (isinstance(value, float) and 0 < value < math.inf):
            raise _Wrong(f"{key} {value}", "a finite number above 0")
        most = max(tensors, ALWAYS_LAYERS) if LAYERS.fullmatch(key) else MOST_COUNT if COUNTS.fullmatch(key) else None
        if most is not None and not (type(value) is int and 0 <= value <= most):
            raise _Wrong(f"{key} {value} with {tensors:,} tensors", f"at most {most:,}")


def _tensor_info(cursor: _Cursor) -> tuple[str, int, int]:
    """Name, offset and bytes of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text("a tensor's name")
    dimensions = cursor.number("I", name)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _Wrong(f"{name}: {dimensions} dimensions", f"1 to {MOST_DIMENSIONS}")
    sizes = [cursor.number("Q", name) for _ in range(dimensions)]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in GGMLQuantizationType._value2member_map_:
        raise _Wrong(f"{name}: type {kind}", "a type that gguf-py knows")
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if min(sizes) < 1 or sizes[0] % block:
        raise _Wrong(f"{name}: {sizes}", f"sizes above 0, rows of whole blocks of {block}")
    return name, offset, math.prod(sizes) // block * nbytes


def _check_data(infos: list[tuple[str, int, int]], cursor: _Cursor) -> None:
    """Every tensor lies in the file, aligned, under a name of its own, and shares no byte with another."""
    alignment = cursor.keys.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    start = -(-cursor.file.tell() // alignment) * alignment
    end, seen = 0, set()
    for name, offset, nbytes in sorted(infos, key=lambda info: info[1]):
        if name in seen:
            raise _Wrong(f"tensor {name} twice", "every tensor once")
        if offset % alignment or offset < end:
            raise _Wrong(f"{name}: offset {offset:,}", f"a multiple of {alignment} behind the tensor before, {end:,}")
        if start + offset + nbytes > cursor.size:
            raise _Wrong(f"{name}: {nbytes:,} bytes at {start + offset:,} of {cursor.size:,}", "tensors in the file")
        end = offset + nbytes
        seen.add(name)
