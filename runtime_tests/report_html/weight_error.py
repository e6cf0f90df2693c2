"""Per layer, how far the trained integers are from the 16-bit weights that training started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError, UsageError
from l4q.shards import ShardReader


def weight_errors(checkpoint: L4QCheckpoint, start: Path | None = None) -> dict[str, Any]:
    """Relative Frobenius distance per module.

    Args:
        checkpoint: The trained checkpoint.
        start: Folder of the 16- or 32-bit model; None takes what the checkpoint's config or its run names, if that is
            still there.

    Returns:
        start, layers (module -> distance) and total; or why there are none.

    Raises:
        UsageError: `start` is given and cannot be used.
    """
    folder = start or find_start(checkpoint)
    if folder is None:
        return {"missing": "the 16-bit start is not known or no longer there; --start FOLDER names it"}
    try:
        return {"start": str(folder), **_measure(checkpoint, _open(folder))}
    except L4QError as error:
        if start is not None:
            raise
        return {"missing": f"the start {folder} cannot be read: {error.what}"}


def find_start(checkpoint: L4QCheckpoint) -> Path | None:
    """The folder that the run's record, or the checkpoint's config, names as the model, if it exists."""
    named = [checkpoint.config.get("_name_or_path")]
    try:
        record = json.loads((checkpoint.path.resolve().parent / "config.json").read_text(encoding="utf-8"))
        named.insert(0, record["options"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not every checkpoint lies in a run's folder
    folders = [Path(name) for name in named if isinstance(name, str) and name]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _open(folder: Path) -> ShardReader:
    if not folder.is_dir():
        raise UsageError(
            "no such folder",
            where="--start",
            got=folder,
            expected="the Hugging Face folder that training started from",
        )
    return ShardReader.open(folder)


def _measure(checkpoint: L4QCheckpoint, shards: ShardReader) -> dict[str, Any]:
    layers: dict[str, float] = {}
    squares = [0.0, 0.0]
    for module in checkpoint.modules:
        name = f"{module}.weight"
        info = checkpoint.info(module)
        if name not in shards.names or shards.shape(name) != (info.out_features, info.in_features):
            raise UsageError(
                "the start has no such weight",
                where=shards.folder,
                got=f"no {name} of shape {[info.out_features, info.in_features]}",
                expected="the 16- or 32-bit model that training started from",
                remedy="give its folder with --start",
            )
        original = shards.tensor(name).float().numpy()
        moved = float(np.square(checkpoint.quantized(module).dequantize() - original, dtype=np.float64).sum())
        size = float(np.square(original, dtype=np.float64).sum())
        layers[module] = (moved / size) ** 0.5 if size else 0.0
        squares = [squares[0] + moved, squares[1] + size]
    return {"layers": layers, "total": (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0}
