"""Ways to damage a file: headers rewritten byte by byte, JSON values replaced, tensors changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime_tests.start_files import edit_tensors

Change = Callable[[Path], object]
"""Damages a folder in place."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def join(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file whose prefix says `length`, or the truth."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def raw(content: bytes, name: str = WEIGHTS) -> Change:
    """Replace a whole file."""
    return lambda folder: (folder / name).write_bytes(content)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header's JSON; the data stays."""

    def damage(folder: Path) -> None:
        entries, data = split(folder / WEIGHTS)
        change(entries)
        join(folder / WEIGHTS, json.dumps(entries).encode(), data)

    return damage


def header_text(change: Callable[[str], str | bytes]) -> Change:
    """Change the header's text; the data stays."""

    def damage(folder: Path) -> None:
        entries, data = split(folder / WEIGHTS)
        text = change(json.dumps(entries))
        join(folder / WEIGHTS, text if isinstance(text, bytes) else text.encode(), data)

    return damage


def first(entries: dict[str, Any], **changes: Any) -> None:
    """Change fields of the first tensor of a header."""
    name = next(name for name in entries if name != "__metadata__")
    entries[name].update(changes)


def one(**changes: Any) -> Change:
    """A header whose first tensor has other fields."""
    return header(lambda entries: first(entries, **changes))


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return damage


def config(**changes: Any) -> Change:
    """Set keys of config.json."""
    return json_file(CONFIG, lambda content: content.update(changes))


def without(*keys: str) -> Change:
    """Remove keys of config.json."""
    return json_file(CONFIG, lambda content: [content.pop(key) for key in keys])


def section(**changes: Any) -> Change:
    """Set keys of config.json's quantization_config; None removes one."""

    def change(content: dict[str, Any]) -> None:
        found = {**content["quantization_config"], **changes}
        content["quantization_config"] = {key: value for key, value in found.items() if value is not None}

    return json_file(CONFIG, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of model.safetensors, keeping its metadata."""

    def damage(folder: Path) -> None:
        metadata = split(folder / WEIGHTS)[0].get("__metadata__", {})
        edit_tensors(folder, change)
        entries, data = split(folder / WEIGHTS)
        join(folder / WEIGHTS, json.dumps({**entries, "__metadata__": metadata}).encode(), data)

    return damage


def record(module: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change what an L4Q checkpoint's metadata says of a module."""

    def replace(entries: dict[str, Any]) -> None:
        values = json.loads(entries["__metadata__"][module])
        change(values)
        entries["__metadata__"][module] = json.dumps(values)

    return header(replace)


def grown(name: str, size: int) -> Change:
    """Make a file that long, without the disk to hold it."""

    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return damage


def set_item(name: str, index: tuple[int, ...], value: float) -> Change:
    """Set one value of a tensor."""

    def change(found: dict[str, torch.Tensor]) -> None:
        found[name][index] = value

    return tensors(change)


def drop(*names: str) -> Change:
    """Remove tensors."""
    return tensors(lambda found: [found.pop(name) for name in names])


def link(name: str, target: str) -> Change:
    """Replace a file by a link to somewhere else."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage
