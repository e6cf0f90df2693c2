"""Folders that appear complete or not at all, and the small files that travel with a model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l4q.errors import UsageError
from l4q.inside import lies_inside

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
        UsageError: `target` exists and overwriting was not asked for, or it is not a folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError("the output path is a file", where=target, expected="a folder that does not exist yet")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UsageError(
            "the output folder already exists", where=target, remedy="choose another --out, or add --overwrite"
        )


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that is renamed onto it when the block ends without an error.

    A failing block leaves no trace; an existing target stays as it was until the new one is complete.

    Raises:
        UsageError: `target` exists and `overwrite` is false.
    """
    refuse_existing(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.staged-", dir=target.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _replace(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.retired-", dir=target.parent))
    os.rename(target, retired / "old")
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(retired / "old", target)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
