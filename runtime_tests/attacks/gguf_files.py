"""GGUF files with absurd counts, written byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from runtime_tests.attacks.edit import Change

FILE = "model.gguf"
TEXT, ARRAY, UINT32, FLOAT32, UINT64 = 8, 9, 4, 6, 10
F32, Q4_0 = 0, 2
HUGE = 1 << 60


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A length and the text."""
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key, its type, its value."""
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, sizes: tuple[int, ...], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    """What the header says of a tensor."""
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))


def built(
    pairs: tuple[bytes, ...] = (ARCHITECTURE,),
    infos: tuple[bytes, ...] = (info("token_embd.weight", (32, 4), F32, 0),),
    *,
    data: int = 512,
    counts: tuple[int, int] | None = None,
    version: bytes = struct.pack("<I", 3),
    magic: bytes = b"GGUF",
) -> Change:
    """A change that puts such a file in place of the good one; `counts` are those of tensors and pairs."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = magic + version + struct.pack("<QQ", tensors, keys) + b"".join(pairs) + b"".join(infos)
    content = head + bytes(-len(head) % 32) + bytes(data)
    return lambda folder: _only(folder).write_bytes(content)


def _only(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder / FILE)


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: _only(folder).write_bytes(change(_only(folder).read_bytes()))


def _number(key: str, value: int, letter: str = "I") -> Change:
    """Overwrite the number that follows a key of the good file."""

    def change(content: bytes) -> bytes:
        at = content.index(text(key)) + len(text(key)) + 4
        new = struct.pack(f"<{letter}", value)
        return content[:at] + new + content[at + len(new) :]

    return _bytes(change)


def _float(key: str, value: float) -> Change:
    return _number(key, struct.unpack("<I", struct.pack("<f", value))[0])


def _array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


EMBEDDING = info("token_embd.weight", (32, 4), F32, 0)

GGUF: dict[str, Change] = {
    "empty": _bytes(lambda content: b""),
    "magic alone": _bytes(lambda content: content[:4]),
    "another magic": built(magic=b"GGML"),
    "version 1": built(version=struct.pack("<I", 1)),
    "version 2**31": built(version=struct.pack("<I", 1 << 31)),
    "big-endian": built(version=struct.pack(">I", 3)),
    "2**60 pairs": built(counts=(1, HUGE)),
    "2**60 tensors": built(counts=(HUGE, 1)),
    "2**64-1 tensors and pairs": built(counts=((1 << 64) - 1, (1 << 64) - 1)),
    "fewer pairs than stated": built(counts=(1, 3)),
    "key of 2**60 bytes": built((text(b"", HUGE) + bytes(8),)),
    "key of 2**63 bytes": built((text(b"", 1 << 63) + bytes(8),)),
    "key not UTF-8": built((ARCHITECTURE, pair(b"\xff\xfe\xfd", UINT32, bytes(4)))),
    "text of 2**60 bytes": built((pair("general.architecture", TEXT, text(b"llama", HUGE)),)),
    "value of type 99": built((ARCHITECTURE, pair("a", 99, bytes(8)))),
    "array of 2**60 numbers": built((ARCHITECTURE, pair("a", ARRAY, _array(UINT32, HUGE)))),
    "array of 2**60 texts": built((ARCHITECTURE, pair("a", ARRAY, _array(TEXT, HUGE)))),
    "array of 2**64-1 texts": built((ARCHITECTURE, pair("a", ARRAY, _array(TEXT, (1 << 64) - 1)))),
    "array of type 77": built((ARCHITECTURE, pair("a", ARRAY, _array(77, 1, bytes(8))))),
    "arrays 10,000 deep": built((ARCHITECTURE, pair("a", ARRAY, _array(ARRAY, 1) * 10_000))),
    "a key twice": built((ARCHITECTURE, ARCHITECTURE)),
    "alignment 0": built((ARCHITECTURE, pair("general.alignment", UINT32, struct.pack("<I", 0)))),
    "alignment 7": built((ARCHITECTURE, pair("general.alignment", UINT32, struct.pack("<I", 7)))),
    "alignment 2**31": built((ARCHITECTURE, pair("general.alignment", UINT32, struct.pack("<I", 1 << 31)))),
    "alignment a float": built((ARCHITECTURE, pair("general.alignment", FLOAT32, struct.pack("<f", 32.0)))),
    "alignment as text": built((ARCHITECTURE, pair("general.alignment", TEXT, text("32")))),
    "no dimensions": built(infos=(info("token_embd.weight", (), F32, 0),)),
    "2**31 dimensions": built(infos=(info("token_embd.weight", (32, 4), F32, 0, 1 << 31),)),
    "five dimensions": built(infos=(info("token_embd.weight", (2, 2, 2, 2, 2), F32, 0),)),
    "sizes 2**40 by 2**40": built(infos=(info("token_embd.weight", (1 << 40, 1 << 40), F32, 0),)),
    "sizes that overflow 64 bits": built(infos=(info("token_embd.weight", (1 << 63, 2), F32, 0),)),
    "size 0": built(infos=(info("token_embd.weight", (0, 4), F32, 0),)),
    "row of half a block": built(infos=(info("token_embd.weight", (16, 4), Q4_0, 0),)),
    "tensor of type 200": built(infos=(info("token_embd.weight", (32, 4), 200, 0),)),
    "tensor of a removed type": built(infos=(info("token_embd.weight", (32, 4), 4, 0),)),
    "offset outside the file": built(infos=(info("token_embd.weight", (32, 4), F32, 1 << 20),)),
    "offset 2**63": built(infos=(info("token_embd.weight", (32, 4), F32, 1 << 63),)),
    "offset not aligned": built(infos=(info("token_embd.weight", (32, 2), F32, 4),)),
    "tensors that overlap": built(infos=(EMBEDDING, info("output.weight", (32, 4), F32, 32))),
    "a tensor twice": built(infos=(EMBEDDING, info("token_embd.weight", (32, 4), F32, 512)), data=1024),
    "tensor name of 2**60 bytes": built(infos=(text(b"", HUGE) + bytes(32),)),
    "tensor name not UTF-8": built(infos=(text(b"\xff\xff") + struct.pack("<I2QIQ", 2, 32, 4, F32, 0),)),
    "truncated data": _bytes(lambda content: content[:-64]),
    "truncated header": _bytes(lambda content: content[:400]),
    "4 billion blocks": _number("llama.block_count", (1 << 32) - 1),
    "4 billion heads": _number("llama.attention.head_count", (1 << 32) - 1),
    "epsilon NaN": _float("llama.attention.layer_norm_rms_epsilon", float("nan")),
    "RoPE base 0": _float("llama.rope.freq_base", 0.0),
}
# What only readers that build the model look at
GGUF_MODELS: dict[str, Change] = {
    "no architecture": built((pair("general.name", TEXT, text("x")),)),
    "architecture unknown": built((pair("general.architecture", TEXT, text("x/../y")),)),
    "embedding of 4 billion": _number("llama.embedding_length", (1 << 32) - 1),
    "feed forward of 4 billion": _number("llama.feed_forward_length", (1 << 32) - 1),
    "three blocks of two": _number("llama.block_count", 3),
    "tensors missing": built(),
}
