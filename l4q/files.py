"""Folders that appear complete or not at all, and the small files that travel with a model.

A folder NAME is written as .NAME.staged beside it, under the lock of `l4q.locks`, flushed to the disk, and renamed. A
process that is killed leaves the stage behind, and the next one that writes NAME removes it (or, if it was asked to
resume, continues it). An old NAME changes places with the new one in a single step; where the system cannot do that,
it is .NAME.retired for a moment, and comes back if the process is killed in that moment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l4q.durable import exchange, output_errors, sync_folder, sync_tree
from l4q.errors import BusyError, OutputError, UsageError
from l4q.inside import lies_inside
from l4q.locks import exclusive

# What a runtime needs beside the weights; copied unchanged from folder to folder.
SIDE_FILE_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_LEFTOVERS = (".staged", ".retired", ".lock", ".part")


def find_side_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer, chat template, generation and licence files of a model folder, sorted by name."""
    found = {path for pattern in SIDE_FILE_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    outside = sorted(path.name for path in found if path.is_symlink() and not lies_inside(path, folder))
    if outside:
        raise UsageError(
            "a file of the model is a link that leaves its folder",
            where=folder,
            got=outside,
            expected="files of the folder: exports hold copies of them",
            remedy="put the file itself there, or remove the link",
        )
    return tuple(sorted(found))


def portable_tokenizer_config(folder: Path) -> None:
    """Name the tokenizer class that every transformers release knows, where transformers 5 wrote its new name."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        dropped = ("backend", "is_local", "local_files_only")
        kept = {key: value for key, value in config.items() if key not in dropped and value is not None}
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(paths: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder under their own names."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Stop before any work when the output folder is already there.

    Raises:
        UsageError: `target` exists and overwriting was not asked for, or it cannot be replaced by a folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError("the output path is a file", where=target, expected="a folder that does not exist yet")
    if target.is_mount():
        raise UsageError(
            "the output folder is a mount point, which cannot be replaced",
            where=target,
            expected="a folder that appears when it is complete",
            remedy="choose a folder inside it",
        )
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(
            "the output folder already exists", where=target, remedy="choose another --out, or add --overwrite"
        )


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False, resume: bool = False, wait: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that is renamed onto it when the block ends without an error.

    A failing block leaves no trace; an existing target stays as it was until the new one is complete and on the disk.

    Args:
        target: Folder to create.
        overwrite: Replace an existing folder.
        resume: Yield what an earlier block left in the stage; and keep the stage if this one is interrupted or cannot
            write. The block must then check what it finds.
        wait: Wait for another process that writes `target`, instead of refusing.

    Raises:
        UsageError: `target` exists and `overwrite` is false.
        BusyError: Another process is writing `target`.
        OutputError: It cannot be written.
    """
    final = Path(os.path.realpath(target))
    stage = stage_path(final)
    with output_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(final, wait=wait):
            _restore(final)
            refuse_existing(final, overwrite=overwrite)
            if not resume:
                _remove(stage)
            try:
                stage.mkdir(mode=0o755, exist_ok=resume)  # within: a signal may come up as soon as it is there
                yield stage
                _publish(stage, final)
            except BaseException as error:
                _restore(final)
                if not (resume and isinstance(error, (OSError, KeyboardInterrupt, OutputError))):
                    shutil.rmtree(stage, ignore_errors=True)
                raise


def stage_path(target: Path) -> Path:
    """Where a folder stands until it is complete."""
    return target.with_name(f".{target.name}.staged")


def retired_path(target: Path) -> Path:
    """Where an old folder stands for the moment in which it is replaced, on systems that cannot exchange two."""
    return target.with_name(f".{target.name}.retired")


def discard(folder: Path) -> None:
    """Delete a folder so that it is never seen in parts; call it under a lock that covers the folder."""
    stage = stage_path(folder)
    _remove(stage)
    os.rename(folder, stage)
    sync_folder(folder.parent)
    _remove(stage)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder, and bring back what they were replacing; the living are spared."""
    hidden = {path.name.rpartition(".")[0][1:] for path in folder.glob(".?*.*") if path.suffix in _LEFTOVERS}
    for target in sorted(folder / name for name in hidden):
        try:
            with exclusive(target):
                _restore(target)
                _remove(stage_path(target))
                target.with_name(f".{target.name}.part").unlink(missing_ok=True)
        except BusyError:
            continue


def _publish(stage: Path, target: Path) -> None:
    """Give a complete stage its final name; an old folder of that name is replaced and deleted."""
    sync_tree(stage)
    if not target.exists():
        os.rename(stage, target)
    elif not exchange(stage, target):
        os.rename(target, retired_path(target))
        os.rename(stage, target)
    sync_folder(target.parent)
    shutil.rmtree(stage, ignore_errors=True)  # the old one, if they changed places
    shutil.rmtree(retired_path(target), ignore_errors=True)


def _restore(target: Path) -> None:
    """Bring back an old folder whose replacement did not come; delete it if it did."""
    retired = retired_path(target)
    if retired.exists() and not target.exists():
        os.rename(retired, target)
        sync_folder(target.parent)
    _remove(retired)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
