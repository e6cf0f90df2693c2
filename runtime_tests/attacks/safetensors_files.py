"""Weight files whose headers lie, and shard indexes that point elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime_tests.attacks.edit import WEIGHTS, Change, first, grown, header, header_text, join, link, one, raw, split

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
OUTSIDE = "elsewhere.safetensors"


def _length(value: Callable[[Path], int]) -> Change:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(value(folder / WEIGHTS).to_bytes(8, "little") + content[8:])

    return damage


def _spans(change: Callable[[list[list[int]]], object]) -> Change:
    """Change data_offsets, in the order of the file."""

    def edit(entries: dict[str, Any]) -> None:
        found = sorted((e["data_offsets"] for n, e in entries.items() if n != "__metadata__"), key=lambda span: span[0])
        change(found)

    return header(edit)


def _swap(spans: list[list[int]]) -> None:
    spans[1][0], spans[1][1] = spans[0][0], spans[0][0] + spans[1][1] - spans[1][0]


def _move(by: int) -> Callable[[list[list[int]]], None]:
    def move(spans: list[list[int]]) -> None:
        spans[-1][0] += by
        spans[-1][1] += by

    return move


def _duplicate(text: str) -> str:
    name = next(name for name in json.loads(text) if name != "__metadata__")
    return text[:-1] + f", {json.dumps(name)}: {json.dumps(json.loads(text)[name])}}}"


def _trailing(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"hidden" * 100)


def _hole(folder: Path) -> None:
    _trailing(folder)
    _spans(_move(600))(folder)


def _truncated(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def _folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _outside_link(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / OUTSIDE)
    (folder / WEIGHTS).symlink_to(folder.parent / OUTSIDE)


HEADERS: dict[str, Change] = {
    "empty": raw(b""),
    "seven bytes": raw(b"\1\0\0\0\0\0\0"),
    "header length 2**63": _length(lambda path: 1 << 63),
    "header length 2**64-1": _length(lambda path: (1 << 64) - 1),
    "header as long as the file": _length(lambda path: path.stat().st_size),
    "header length 0": _length(lambda path: 0),
    "header of 40 MB": lambda folder: [grown(WEIGHTS, 41 << 20)(folder), _length(lambda path: 40 << 20)(folder)],
    "header not JSON": header_text(lambda text: text[1:]),
    "header a list": header_text(lambda text: f"[{text}]"),
    "header nested 100,000 deep": header_text(lambda text: "[" * 100_000),
    "header objects nested 50,000 deep": header_text(lambda text: '{"a":' * 50_000),
    "header not UTF-8": header_text(lambda text: b'{"\xff\xfe": {}}'),
    "NaN in the header": header_text(lambda text: text.replace('"shape": [', '"shape": [NaN, ', 1)),
    "Infinity in the offsets": one(data_offsets=[0, float("inf")]),
    "an integer of 5,000 digits": header_text(lambda text: text.replace('"shape": [', f'"shape": [{"9" * 5000}, ', 1)),
    "a tensor twice": header_text(_duplicate),
    "overlapping tensors": _spans(_swap),
    "offsets outside the file": _spans(_move(1 << 20)),
    "a hole before the last tensor": _hole,
    "bytes behind the last tensor": _trailing,
    "negative offset": one(data_offsets=[-8, 8]),
    "offset 2**63": one(data_offsets=[0, 1 << 63]),
    "end before begin": one(data_offsets=[64, 0]),
    "three offsets": one(data_offsets=[0, 8, 16]),
    "offsets as text": one(data_offsets="0,8"),
    "unknown dtype": one(dtype="F7"),
    "dtype a list": one(dtype=["F32"]),
    "dtype of another size": one(dtype="F64"),
    "negative size": one(shape=[-1, -8]),
    "sizes that overflow": one(shape=[1 << 62, 8]),
    "size a boolean": header(lambda entries: first(entries, shape=[True])),
    "size a fraction": one(shape=[0.5]),
    "shape as text": one(shape="2x2"),
    "nine dimensions": one(shape=[1] * 9),
    "no data_offsets": header_text(lambda text: text.replace('"data_offsets"', '"data_offset"', 1)),
    "entry a list": header(lambda entries: entries.update({"x": [1, 2]})),
    "metadata a list": header(lambda entries: entries.update(__metadata__=[1])),
    "metadata with numbers": header(lambda entries: entries.update(__metadata__={"a": 1})),
    "truncated by one byte": _truncated,
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
    "a folder": _folder,
    "a pipe": _pipe,
    "a link out of the folder": _outside_link,
    "a link to /dev/zero": link(WEIGHTS, "/dev/zero"),
}


def _indexed(change: Callable[[dict[str, Any]], object], shard: str = SHARD) -> Change:
    """A folder with an index, whose content is changed."""

    def damage(folder: Path) -> None:
        entries, data = split(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        join(folder / SHARD, json.dumps(entries).encode(), data)
        names = [name for name in entries if name != "__metadata__"]
        content: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        change(content)
        (folder / INDEX).write_text(json.dumps(content))
        shutil.copy(folder / SHARD, folder.parent / OUTSIDE)

    return damage


def _text(text: str) -> Change:
    return lambda folder: (folder / INDEX).write_text(text)


def _linked_shard(folder: Path) -> None:
    _indexed(lambda content: None)(folder)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder.parent / OUTSIDE)


def _two_shards(folder: Path) -> None:
    _indexed(lambda content: content["weight_map"].update({next(iter(content["weight_map"])): "b.safetensors"}))(folder)
    shutil.copy(folder / SHARD, folder / "b.safetensors")


def _all(file: str) -> Change:
    return _indexed(lambda content: None, file)


INDEXES: dict[str, Change] = {
    "index into the folder above": _all(f"../{OUTSIDE}"),
    "index with an absolute path": _all("/etc/passwd"),
    "index into a folder and back": _all(f"a/../../{OUTSIDE}"),
    "index to a hidden file": _all(".hidden.safetensors"),
    "index with a zero byte": _all("a\0b"),
    "index with a name of 5,000 letters": _all("a" * 5000),
    "index with an empty name": _all(""),
    "index with a backslash": _all(f"..\\{OUTSIDE}"),
    "index to a missing file": _all("missing.safetensors"),
    "index to a shard that is a link": _linked_shard,
    "index not JSON": _text("{"),
    "index a list": _text("[]"),
    "index nested 100,000 deep": _text('{"weight_map": ' * 100_000),
    "index of empty map": _text('{"weight_map": {}}'),
    "index map a list": _text('{"weight_map": ["a"]}'),
    "index with numbers as files": _indexed(lambda content: content.update(weight_map={"a": 1})),
    "index with another tensor": _indexed(lambda content: content["weight_map"].update(extra=SHARD)),
    "index without a tensor": _indexed(lambda content: content["weight_map"].popitem()),
    "a tensor in two shards": _two_shards,
    "index of 40 MB": lambda folder: [_all(SHARD)(folder), grown(INDEX, 40 << 20)(folder)],
}
