"""What reads files from strangers: the commands as a user runs them, and the readers of the library.

Every entry takes the attacked folder, the good folders and a scratch folder, and returns an exit code; what it prints
to stderr is the user's message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from l4q.cli_common import status

Bases = dict[str, Path]
Entry = Callable[[Path, Bases, Path], int]
STEPS = ("--steps", "1", "--max-length", "16", "--rank", "2", "--group-size", "32")


def _command(command: click.Command, *arguments: object) -> int:
    sys.argv = [str(command.name), *map(str, arguments)]
    return status(command)


def _library(action: Callable[[], Any]) -> int:
    """Call the library as a command would: its errors become a message and an exit code."""

    @click.command
    def call() -> None:
        action()

    return _command(call)


def read_checkpoint(folder: Path, bases: Bases, scratch: Path) -> int:
    """Open an L4Q checkpoint and read every tensor."""
    from l4q.checkpoint import L4QCheckpoint

    def action() -> None:
        checkpoint = L4QCheckpoint.open(folder)
        for module in checkpoint.modules:
            checkpoint.quantized(module).dequantize()
        for name in checkpoint.dense_names:
            checkpoint.dense(name)
        checkpoint.side_files()

    return _library(action)


def inspect(folder: Path, bases: Bases, scratch: Path, *, flags: tuple[str, ...] = ()) -> int:
    """l4q-inspect."""
    from exporters.inspect.cli import command

    return _command(command, folder, *flags)


def export(folder: Path, bases: Bases, scratch: Path, *, name: str) -> int:
    """l4q-export; nothing may be left where it fails."""
    from exporters.cli import command

    code = _command(command, folder, "--to", name, "--out", scratch / "out")
    if code and any(path.is_file() for path in scratch.rglob("*")):
        print("something was left behind", file=sys.stderr)
        return 1
    return code


def import_model(folder: Path, bases: Bases, scratch: Path) -> int:
    """l4q-import."""
    from l4q.cli_import import command

    code = _command(command, _model(folder), "--out", scratch / "out", "--allow-dense")
    if code and any(path.is_file() for path in scratch.rglob("*")):
        print("something was left behind", file=sys.stderr)
        return 1
    return code


def train(folder: Path, bases: Bases, scratch: Path, *, flags: tuple[str, ...] = ()) -> int:
    """l4q-train MODEL."""
    from l4q.cli_train import command

    return _command(command, _model(folder), "--data", bases["text"], "--out", scratch / "run", *STEPS, *flags)


def train_hub_id(folder: Path, bases: Bases, scratch: Path) -> int:
    """l4q-train USER/NAME, of a model that the hub's cache holds; set for this process, which ends then."""
    from huggingface_hub import constants

    from runtime_tests.start_files import hub_cache

    hub_cache(folder, "user/name", scratch / "hub")
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(scratch / "hub"), True
    return train(Path("user/name"), bases, scratch)


def data(folder: Path, bases: Bases, scratch: Path) -> int:
    """l4q-train --data FILE."""
    from l4q.cli_train import command

    (file,) = sorted(folder.iterdir())
    return _command(command, bases["dense"], "--data", file, "--out", scratch / "run", *STEPS)


def records(folder: Path, bases: Bases, scratch: Path) -> int:
    """The reader of training files."""
    from l4q.data_records import read_records

    (file,) = sorted(folder.iterdir())
    return _library(lambda: list(read_records(file)))


def verify(folder: Path, bases: Bases, scratch: Path, *, name: str) -> int:
    """The foreign decoders that compare an export with its checkpoint."""
    from exporters.driver import get_exporter
    from exporters.verify import verify as compare
    from l4q.checkpoint import L4QCheckpoint
    from l4q.errors import VerificationError

    def action() -> None:
        source = L4QCheckpoint.open(bases["none" if name in ("gptq", "gguf") else "l4q"])
        report = compare(source, get_exporter(name), folder)
        if not report.passed:
            raise VerificationError("the export is not the checkpoint's", where=folder, got=report.differing[:2])

    return _library(action)


def _model(folder: Path) -> Path:
    """The folder, or the GGUF file in it."""
    return next(folder.glob("*.gguf"), folder)


FORMATS = ("gptq", "awq", "compressed-tensors", "gguf", "onnx")
ENTRIES: dict[str, Entry] = {
    "read": read_checkpoint,
    "inspect": inspect,
    "inspect --headers": partial(inspect, flags=("--headers", "--json")),
    "import": import_model,
    "train": train,
    "train hub id": train_hub_id,
    "data": data,
    "records": records,
    **{f"export {name}": partial(export, name=name) for name in FORMATS},
    **{f"verify {name}": partial(verify, name=name) for name in FORMATS},
}
EXPORTS = tuple(f"export {name}" for name in FORMATS)
