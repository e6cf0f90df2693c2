"""What the fault tests compare: every byte below a folder, and what was left beside it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROUNDS = int(os.environ.get("L4Q_FAULT_ROUNDS", "1"))
"""How many times as many kills as usual."""


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too, and "folder" for empty folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[path.relative_to(folder).as_posix()] = "folder"
    return found


def hidden(folder: Path) -> list[str]:
    """Stages, locks and parts that stand in a folder."""
    return sorted(path.name for path in folder.glob(".*")) if folder.exists() else []


def moments(seed: str, changes: int, count: int, *, first: int = 1) -> Iterator[int]:
    """`count` changes of `first` to `changes` to strike at, spread over the whole and reproducible."""
    generator = random.Random(seed)
    edges = [first + (changes - first + 1) * index // count for index in range(count + 1)]
    for low, high in pairwise(edges):
        yield generator.randint(low, max(low, high - 1))
