"""Which weight files a folder has: model.safetensors or the shards its index names, every header checked."""

from __future__ import annotations

from pathlib import Path

from l4q.errors import UsageError
from l4q.inside import lies_inside
from l4q.json_files import read_object
from l4q.model_folder import refuse_pickles
from l4q.safetensors_header import check_header

LONGEST_NAME = 255
"""Bytes of a file name on common file systems."""


def read_index(folder: Path, index: str, single: str) -> dict[str, str]:
    """File by tensor name as the index says, or nothing where there is no index; the files' headers are good then.

    Args:
        folder: A model folder.
        index: Name of the shard index.
        single: Name of the file that stands alone.

    Raises:
        UsageError: The index is damaged or points outside the folder, a file is missing or breaks the format, or the
            weights are a pickle.
    """
    refuse_pickles(folder)
    weight_map = read_weight_map(folder / index) if (folder / index).exists() else {}
    for name in sorted(set(weight_map.values())) or [single]:
        _refuse_outside(folder, folder / name, "a weight file is a link that leaves its folder")
        check_header(folder / name)
    return weight_map


def read_weight_map(path: Path) -> dict[str, str]:
    """File by tensor name as a shard index says.

    Raises:
        UsageError: The index is damaged or points outside its folder.
    """
    _refuse_outside(path.parent, path, "the shard index is a link that leaves its folder")
    pairs = read_object(path, "the shard index").get("weight_map")
    if not isinstance(pairs, dict) or not pairs or not all(isinstance(name, str) for name in pairs.values()):
        raise UsageError("the shard index cannot be read", where=path, expected='{"weight_map": {"tensor": "file"}}')
    outside = sorted(name for name in set(pairs.values()) if not _is_plain(name))
    if outside:
        raise UsageError(
            "the shard index points outside its folder", where=path, got=outside[:5], expected="plain file names"
        )
    return pairs


def _is_plain(name: str) -> bool:
    good = Path(name).name == name and not name.startswith(".") and name.isprintable() and "\\" not in name
    return good and len(name) <= LONGEST_NAME


def _refuse_outside(folder: Path, path: Path, what: str) -> None:
    if path.is_symlink() and not lies_inside(path, folder):
        raise UsageError(
            what, where=path, got=path.resolve(), expected="a file of the folder", remedy="put the file itself there"
        )
