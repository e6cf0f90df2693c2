"""Pre-quantized models as starting points: one reader per format, found by looking at the folder or file.

| MODEL                                             | reader                          |
|---------------------------------------------------|---------------------------------|
| folder, config.json quant_method "gptq"           | `l4q.starts.gptq`               |
| folder, quant_method "awq"                        | `l4q.starts.awq`                |
| folder, quant_method "compressed-tensors"         | `l4q.starts.compressed_tensors` |
| file ending in .gguf                              | `l4q.starts.gguf`               |
| folder without quantization_config                | none: transformers loads it     |

A hub id is the folder that the hub's cache keeps of it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4q.errors import UnsupportedError, UsageError
from l4q.model_folder import is_pickle, pickle_error, read_config, refuse_code
from l4q.starts.hub import hub_config, hub_folder

if TYPE_CHECKING:
    from l4q.starts.start import PretrainedStart

# quant_method of config.json -> module that decodes its tensors
DECODERS = {
    "gptq": "l4q.starts.gptq",
    "awq": "l4q.starts.awq",
    "compressed-tensors": "l4q.starts.compressed_tensors",
}
GGUF_SUFFIX = ".gguf"


def open_start(model: str) -> PretrainedStart | None:
    """Open a pre-quantized model; None for anything that transformers loads as it is.

    Raises:
        UsageError: The file or folder is damaged or incomplete.
        UnsupportedError: A quantization no reader knows, or a variant that linear layers cannot be read from.
    """
    path = Path(model)
    if path.suffix == GGUF_SUFFIX:
        from l4q.starts.gguf import GgufStart

        return GgufStart.open(path)
    if is_pickle(path):
        raise pickle_error(path, path.name)
    config = None if path.is_dir() else hub_config(model)
    where = config or path / "config.json"
    section = quantization_section(where.parent)
    if section is None:
        return None
    refuse_code(read_config(where.parent), where)
    method = str(section.get("quant_method"))
    if method not in DECODERS:
        raise UnsupportedError(
            "no reader for this kind of pre-quantized model",
            where=where,
            got=f"quant_method {method}",
            expected=f"one of {sorted(DECODERS)}, a .gguf file, or a model in 16 or 32 bits",
            remedy="start from the 16-bit model it was made from",
        )
    from l4q.starts.folder import FolderStart

    folder = path if config is None else hub_folder(model)
    return FolderStart.open(folder, section, importlib.import_module(DECODERS[method]), name=model if config else "")


def quantization_section(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a folder's config.json, or None.

    Raises:
        UsageError: config.json is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    section = read_config(folder).get("quantization_config")
    if section is not None and not isinstance(section, dict):
        raise UsageError(
            "quantization_config is not a JSON object", where=path, got=type(section).__name__, expected="an object"
        )
    return section
