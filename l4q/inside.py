"""Whether a file of a model folder really lies in it."""

from __future__ import annotations

from pathlib import Path


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, is in `folder`; a folder of the hub's cache links to the blobs beside it.

    A link in a folder from a stranger could name any file of this machine, which an export would then hold a copy of.
    """
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
