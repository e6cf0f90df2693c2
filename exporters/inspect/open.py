"""Find out what a path is and open it with the reader for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from exporters.inspect.facts import Source
from l4q.errors import UsageError

# what a path looks like -> module whose `open_source` reads it; looked at in this order
READERS: tuple[tuple[Callable[[Path], bool], str], ...] = (
    (lambda path: path.is_file() and path.suffix == ".gguf", "exporters.inspect.gguf_file"),
    (lambda path: path.is_file() and path.suffix == ".onnx", "exporters.inspect.onnx_file"),
    (lambda path: (path / "config.json").is_file() and _has_tensors(path), "exporters.inspect.folder"),
)
EXPECTED = (
    "an L4Q checkpoint, a folder with config.json and safetensors (GPTQ, AWQ, compressed-tensors or not quantized), "
    "a .gguf file, a .onnx file, or a folder with exactly one of these files"
)


def open_source(path: Path) -> Source:
    """Open a folder or file.

    Raises:
        UsageError: It does not exist, is damaged, or is nothing l4q-inspect knows.
    """
    if not path.exists():
        raise UsageError("no such file or folder", where=path, expected=EXPECTED)
    for fits, module in READERS:
        if fits(path):
            source: Source = importlib.import_module(module).open_source(path)
            return source
    inside = (
        [found for suffix in ("gguf", "onnx") for found in sorted(path.glob(f"*.{suffix}"))] if path.is_dir() else []
    )
    if len(inside) == 1:
        return open_source(inside[0])
    raise UsageError(
        "nothing that l4q-inspect knows",
        where=path,
        got=_looks(path) if not inside else [found.name for found in inside],
        expected=EXPECTED,
        remedy="name one of the files" if inside else "give the model's folder or file itself",
    )


def _has_tensors(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))


def _looks(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size:,} bytes ending in {path.suffix or 'nothing'}"
    names = sorted(child.name for child in path.iterdir())
    return f"a folder with {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "an empty folder"
