"""Pre-quantized models by hub id: the whole repository as a folder, for readers that open tensors one by one."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# what a folder start and the files beside a checkpoint are read from
NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


def hub_config(model: str) -> Path | None:
    """config.json of a hub id, downloaded into the local cache or found there; None if there is no such model.

    Whoever loads the model next reports why it cannot be had, so that is not done here.
    """
    if HUB_ID.fullmatch(model) is None or Path(model).exists():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, OSError, ValueError):
        return None


def hub_folder(model: str) -> Path:
    """All files of a hub id that a start is read from, downloaded into the local cache or found there."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=list(NEEDED)))
