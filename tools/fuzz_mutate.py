"""Damage bytes the way fuzzers do: flips, absurd numbers, cuts, repeats, splices, and JSON values that cannot be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

# Numbers at the edges of what files count with
EDGES = (0, 1, 7, 8, 127, 128, 255, 256, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 60, 1 << 63, (1 << 64) - 1)
ABSURD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 31, 64, 1 << 31, 1 << 62, 10**30, -(1 << 63), 0.5, 1e308, float("nan"),
    float("inf"), "", "0", "a" * 300, "\x1b[31m", "../x", "/etc/passwd", "\ud800", [], [0], [1, 2, 3], {}, {"a": {}},
)  # fmt: skip
MOST_EDITS = 6


def mutate(seed: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A damaged copy of `seed`, of at most some kilobytes more.

    Args:
        seed: A valid input.
        others: Further inputs, whose pieces may be spliced in.
        rng: Decides everything.
    """
    data = bytearray(seed)
    if rng.random() < 0.5:
        changed = _json_inside(bytes(data), rng)
        if changed is not None:
            data = bytearray(changed)
            if rng.random() < 0.8:
                return bytes(data)
    for _ in range(rng.randint(1, rng.choice((1, 1, 2, MOST_EDITS)))):
        rng.choice(EDITS)(data, others, rng)
    return bytes(data)


def _at(data: bytearray, rng: random.Random) -> int:
    """A position; headers, which lie at the beginning, more often."""
    if not data:
        return 0
    return rng.randrange(min(len(data), 64)) if rng.random() < 0.3 else rng.randrange(len(data))


def _flip(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[_at(data, rng)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[_at(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    width, at = rng.choice((1, 2, 4, 8)), _at(data, rng)
    value = rng.choice(EDGES) & ((1 << 8 * width) - 1)
    data[at : at + width] = value.to_bytes(width, "little")


def _cut(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    at = _at(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 8, 32, len(data)))]


def _insert(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    at = _at(data, rng)
    data[at:at] = rng.choice((bytes(8), b"\xff" * 8, b"[" * 200, b'{"a":' * 40, b"9" * 400, rng.randbytes(9)))


def _repeat(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    at = _at(data, rng)
    piece = data[at : at + rng.choice((4, 16, 64))]
    data[at:at] = piece * rng.choice((1, 2, 20))


def _splice(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    if others:
        other = rng.choice(others)
        at, begin = _at(data, rng), rng.randrange(len(other) + 1)
        data[at : at + 16] = other[begin : begin + rng.choice((4, 16, 128))]


EDITS: tuple[Callable[[bytearray, Sequence[bytes], random.Random], None], ...] = (
    _flip,
    _byte,
    _number,
    _number,
    _cut,
    _insert,
    _repeat,
    _splice,
)


def _json_inside(data: bytes, rng: random.Random) -> bytes | None:
    """The data with a value of its JSON replaced: a JSON text, or a safetensors file, whose prefix is set right."""
    length = int.from_bytes(data[:8], "little")
    prefixed = len(data) > 8 and length <= len(data) - 8 and data[8:9] == b"{"
    try:
        content = json.loads(data[8 : 8 + length] if prefixed else data)
    except (ValueError, RecursionError):
        return None
    content = _changed(content, rng)
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :] if prefixed else text


def _changed(content: Any, rng: random.Random) -> Any:
    """One value, key or entry replaced, somewhere inside; JSON in texts counts as inside."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        way = rng.random()
        if way < 0.1:
            del content[key]
        elif way < 0.2:
            content[rng.choice(("x", "", "a.b.codes", "__metadata__", "\x00"))] = content[key]
        else:
            content[key] = _changed(content[key], rng)
        return content
    if isinstance(content, list) and content and rng.random() < 0.8:
        at = rng.randrange(len(content))
        content[at] = _changed(content[at], rng)
        return content
    if isinstance(content, str) and content.startswith("{") and rng.random() < 0.8:
        try:
            return json.dumps(_changed(json.loads(content), rng))
        except ValueError:
            return rng.choice(ABSURD)
    if isinstance(content, int) and not isinstance(content, bool) and rng.random() < 0.5:
        return content + rng.choice((-1, 1, 8, 32, 1 << 31, -(1 << 33)))
    return rng.choice(ABSURD)
