"""Small files every exported folder needs beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l4q.checkpoint import L4QCheckpoint
from l4q.files import copy_files


def copy_side_files(checkpoint: L4QCheckpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence unchanged."""
    copy_files(checkpoint.side_files(), folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
