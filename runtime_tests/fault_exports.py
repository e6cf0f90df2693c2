"""Exports of a tiny checkpoint by a worker that can be killed, and the same exports undisturbed."""

from __future__ import annotations

import shutil
from pathlib import Path

from l4q.config import QuantConfig
from runtime_tests.fault_checks import tree
from runtime_tests.fault_hooks import Fault
from runtime_tests.fault_worker import FaultWorker, Outcome
from runtime_tests.tiny_llama import tiny_checkpoint

# The formats with shards are written as many small files.
SHARDS = ("--max-shard-size", "60KB")


class Exports:
    """A checkpoint, the export of it that nobody disturbed, and a worker that exports it again."""

    def __init__(self, folder: Path, worker: FaultWorker) -> None:
        self.folder = folder
        self.worker = worker
        self.source = tiny_checkpoint(folder / "integer", QuantConfig(group_size=64, zero_point="integer")).path
        self.other = tiny_checkpoint(folder / "none", QuantConfig(group_size=64, zero_point="none")).path
        self._changes: dict[str, int] = {}

    def run(self, name: str, out: Path, *options: str, fault: Fault | None = None) -> Outcome:
        """Export the checkpoint to OUT/<format>."""
        return self.worker.run(self.argv(name, out, *options), out, fault or Fault())

    def argv(self, name: str, out: Path, *options: str, source: Path | None = None) -> list[str]:
        """The command line."""
        command = ["l4q-export", str(source or self.source), "--to", name, "--out", str(out), *SHARDS]
        return [*command, *options]

    def whole(self, name: str) -> dict[str, str]:
        """The files of an undisturbed export."""
        out = self.folder / "whole"
        if name not in self._changes:
            outcome = self.run(name, out)
            assert outcome.status == 0, outcome.text
            self._changes[name] = outcome.changes
        return tree(out / name)

    def changes(self, name: str) -> int:
        """How many changes to its folder an undisturbed export makes."""
        self.whole(name)
        return self._changes[name]

    def old(self, name: str, out: Path) -> dict[str, str]:
        """Put an older export of another checkpoint at OUT/<format>; returns its files."""
        kept = self.folder / "old" / name
        if not kept.exists():
            outcome = self.worker.run(self.argv(name, kept.parent, source=self.other), kept.parent)
            assert outcome.status == 0, outcome.text
        shutil.copytree(kept, out / name)
        return tree(out / name)
