"""Models by hub id as folders of the hub's cache, so that what is checked is what is loaded."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from l4q.model_folder import check_config, read_config, refuse_code
from l4q.shard_index import read_weight_map
from l4q.shard_layout import INDEX, SINGLE

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# what a model and the files beside a checkpoint are read from, but for its weights
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
NEEDED = (*SMALL, "*.safetensors")


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


def dense_folder(model: str, *, trust_remote_code: bool = False) -> Path | None:
    """The files that transformers loads a hub id from; None if there is no such model, or no safetensors of it.

    config.json is checked before the weights are downloaded. A model that its author published without safetensors is
    left to transformers, which asks the hub for converted ones.

    Raises:
        UsageError: config.json says what no model can be, or the shard index is damaged.
        UnsupportedError: The model brings code of its own, and `trust_remote_code` is false.
    """
    found = hub_config(model)
    if found is None:
        return None
    config, folder = read_config(found.parent), found.parent
    check_config(config, found)
    if not trust_remote_code:
        refuse_code(config, found)
    _download(model, folder, *SMALL, *(("*.py",) if trust_remote_code else ()))
    index = folder / INDEX
    files = set(read_weight_map(index).values()) if index.exists() else {SINGLE}
    _download(model, folder, *map(glob.escape, sorted(files)))
    return folder if all((folder / name).exists() for name in files) else None


def _download(model: str, folder: Path, *patterns: str) -> None:
    """Files of the commit whose folder in the cache this is."""
    from huggingface_hub import snapshot_download

    snapshot_download(model, revision=folder.name, allow_patterns=list(patterns))
