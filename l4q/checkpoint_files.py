"""The manifest of an L4Q checkpoint, `l4q_checkpoint.json`, and the hash by which exports name their source.

Folders that were written before there was a manifest are as good; what cannot be checked then is only whether they
still are as they were written.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from l4q.errors import UsageError
from l4q.file_table import FileTable, check_files, file_facts, list_files, read_table, table_digest
from l4q.files import find_side_files

log = logging.getLogger(__name__)

CHECKPOINT_MANIFEST = "l4q_checkpoint.json"


def write_checkpoint_manifest(folder: Path, known: FileTable) -> None:
    """Record every file of a complete checkpoint folder.

    Args:
        folder: The checkpoint.
        known: Files of it that have been hashed as they were written; the others are read.
    """
    from l4q import __version__

    files = {name: known.get(name) or file_facts(path) for name, path in list_files(folder).items()}
    content = json.dumps({"l4q_version": __version__, "files": files}, indent=2, sort_keys=True)
    (folder / CHECKPOINT_MANIFEST).write_text(content + "\n", encoding="utf-8")


def recorded_files(folder: Path) -> FileTable | None:
    """What the manifest of a checkpoint lists; None if there is none.

    Raises:
        UsageError: It cannot be read.
    """
    path = folder / CHECKPOINT_MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError("the checkpoint's manifest cannot be read", where=path, got=error) from error
    table = read_table(content.get("files")) if isinstance(content, dict) else None
    if table is None:
        raise UsageError("the checkpoint's manifest lists no files", where=path, expected='{"files": {…}}')
    return table


def source_digest(folder: Path, *, check: bool = True) -> str:
    """One hash for a checkpoint's files: config, weights, tokenizer and what else was written with them.

    Args:
        folder: The checkpoint.
        check: Read every file; otherwise a manifest is believed.

    A tokenizer or config that was changed is reported and counts as it is.

    Raises:
        UsageError: Weights are not those of the manifest.
    """
    table = recorded_files(folder)
    if table is None:
        return table_digest({name: file_facts(path) for name, path in _own_files(folder).items()})
    if not check:
        return table_digest(table)
    found = check_files(folder, table, skip=(CHECKPOINT_MANIFEST,))
    differing = [*found.missing, *found.truncated, *found.changed]
    weights = [name for name in differing if name.endswith(".safetensors")]
    if weights:
        raise UsageError(
            "the checkpoint's weights are not as they were written",
            where=folder,
            got="; ".join(line for line in found.lines() if line.endswith(".safetensors")),
            expected=f"the files that {CHECKPOINT_MANIFEST} lists",
            remedy="copy or write the checkpoint again; if the change was on purpose, delete the manifest",
        )
    if differing:
        log.warning("%s: changed since the checkpoint was written: %s", folder, ", ".join(differing))
        table = {name: facts for name, facts in table.items() if name not in differing}
        table |= {name: file_facts(folder / name) for name in differing if name not in found.missing}
    return table_digest(table)


def _own_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint without manifest: what `save_checkpoint` would have written."""
    paths = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    return {path.name: path for path in sorted({*paths, *find_side_files(folder)}) if path.is_file()}
