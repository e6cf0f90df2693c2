"""A model folder from a stranger, checked before transformers or an exporter builds anything from what it says.

config.json decides how much is built: 10**9 layers fit into one line of it. So what it counts is held against the
tensors that are there, and what is built against their bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l4q.errors import UnsupportedError, UsageError
from l4q.json_files import read_object

CONFIG_NAME = "config.json"
# keys of config.json, at any depth -> least and most; layers are held against the number of tensors too
LIMITS: tuple[tuple[re.Pattern[str], int, int], ...] = (
    (re.compile(r"(num|n)_(\w+_)?layers?"), 0, 1 << 16),
    (re.compile(r"(num|n)_(\w+_)?(heads?|experts?|groups|blocks|labels)"), 0, 1 << 16),
    (re.compile(r"(hidden|intermediate|moe_intermediate|vocab)_size|head_dim|n_embd|n_inner|d_model"), 0, 1 << 30),
    (re.compile(r"max_position_embeddings|n_positions|n_ctx"), 0, 1 << 40),
)
LAYERS = LIMITS[0][0]
POSITIVE = re.compile(r"\w+_eps|\w+_epsilon|rope_theta|rotary_emb_base")
"""Keys whose numbers must be finite and positive: anything else turns every output into NaN."""
ALWAYS_LAYERS = 64
"""Layers that any folder may have, however few tensors it holds."""
WEIGHTS_PER_BYTE = 4
"""Codes of 2 bits: the densest a file holds weights."""
SPARE_WEIGHTS = 1 << 24
"""Weights and buffers that a model may have beyond its files: RoPE tables, masks, tied heads."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
PICKLE_REMEDY = (
    "take the model's safetensors; if there are none, convert it on a machine that may be lost (load it with "
    "transformers, then save_pretrained)"
)


def read_config(folder: Path, *, remedy: str | None = None) -> dict[str, Any]:
    """config.json of a model folder, checked by `check_config`.

    Raises:
        UsageError: It is missing, damaged, or says what no model can be.
    """
    path = folder / CONFIG_NAME
    config = read_object(path, CONFIG_NAME, remedy=remedy)
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], where: object, *, tensors: int | None = None) -> None:
    """Refuse a config with counts or sizes of the wrong type or beyond any model.

    Args:
        config: Content of config.json.
        where: For messages.
        tensors: How many tensors the weight files hold; a model has no more layers than that.

    Raises:
        UsageError: The message names the key.
    """
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong(where, "architectures", names, "a list of class names")
    for key, value in _numbers(config):
        if isinstance(value, float) and math.isnan(value):
            raise _wrong(where, key, value, "a number")
        if POSITIVE.fullmatch(key) and not (_is_number(value) and 0 < value < math.inf):
            raise _wrong(where, key, value, "a finite number above 0")
        for pattern, least, most in LIMITS:
            if pattern.fullmatch(key) and not (type(value) is int and least <= value <= most):
                raise _wrong(where, key, value, f"a whole number from {least} to {most:,}")
        if tensors is not None and LAYERS.fullmatch(key) and value > max(tensors, ALWAYS_LAYERS):
            raise _wrong(where, key, value, f"at most as many layers as there are tensors, {tensors:,}")


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check a folder of safetensors before transformers loads it: config.json, index, headers, no code.

    Raises:
        UsageError: Something is missing, damaged or beyond what the files can hold, or the weights are a pickle.
        UnsupportedError: The model brings code of its own, and `trust_remote_code` is false.
    """
    from l4q.shards import ShardReader

    config = read_config(folder, remedy="give a Hugging Face model folder")
    if not trust_remote_code:
        refuse_code(config, folder / CONFIG_NAME)
    refuse_pickles(folder)
    reader = ShardReader.open(folder)
    check_config(config, folder / CONFIG_NAME, tensors=len(reader.names))


def refuse_code(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config that names Python code beside it.

    Raises:
        UnsupportedError: It has an auto_map.
    """
    if config.get("auto_map"):
        raise UnsupportedError(
            "the model brings Python code of its own, which is not run",
            where=where,
            got=f"auto_map {config['auto_map']}",
            expected="an architecture that transformers has",
            remedy="read that code; if you trust it, add --trust-remote-code to l4q-train",
        )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles: loading a pickle can run any code.

    Raises:
        UsageError: See above.
    """
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if found:
        raise pickle_error(folder, found[:5])


def pickle_error(where: object, got: object) -> UsageError:
    """The error of weights in a pickle."""
    return UsageError(
        "the weights are a pickle, and loading one can run any code",
        where=where,
        got=got,
        expected="safetensors",
        remedy=PICKLE_REMEDY,
    )


def is_pickle(path: Path) -> bool:
    """Whether a file's name is that of a pickle."""
    return any(path.match(pattern) for pattern in PICKLES)


def data_bytes(path: Path) -> int:
    """Bytes of a model file, or of all safetensors and GGUF files of a folder."""
    files = [*path.glob("*.safetensors"), *path.glob("*.gguf")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def check_size(model: Any, path: Path) -> None:
    """Refuse an architecture far larger than the files its weights shall come from.

    Args:
        model: Built on the meta device.
        path: Folder or file of the weights.

    Raises:
        UsageError: Loading it would fill the memory with weights that no file holds.
    """
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = data_bytes(path) * WEIGHTS_PER_BYTE + SPARE_WEIGHTS
    if wanted > held:
        raise UsageError(
            "the config describes a model far larger than its weight files",
            where=path,
            got=f"{wanted:,} weights",
            expected=f"at most {held:,} for {data_bytes(path):,} bytes",
            remedy="config.json and weights do not belong together: copy the whole folder again",
        )


def _numbers(content: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of all values at any depth, lists unfolded under their key; null is left out.

    What quantization_config counts is its readers' to check: -1 is a group size there.
    """
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(name, child) for name, child in value.items() if name != "quantization_config"]
        elif isinstance(value, list):
            stack += [(key, child) for child in value]
            yield from ((key, child) for child in value if isinstance(child, Mapping))
        elif value is not None:
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(where: object, key: str, value: object, expected: str) -> UsageError:
    return UsageError(
        "config.json says what no model can be",
        where=f"{where}: {key}",
        got=repr(value),
        expected=expected,
        remedy="it is damaged or was made to mislead: get the model again from its source",
    )
