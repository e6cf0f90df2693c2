"""The run folder: who may write into it, what it records, and whether a run may be continued.

RUN/config.json    options, versions, data hash           RUN/state-<step>/   see train_state
RUN/metrics.jsonl  one line per logged step               RUN/checkpoint/     the frozen L4Q checkpoint
RUN/result.json    the run's figures; written last, so its presence means the run is complete
"""

from __future__ import annotations

import json
import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l4q.durable import output_errors, write_atomic
from l4q.errors import UsageError
from l4q.files import clean_leftovers, discard
from l4q.locks import FolderLock
from l4q.train_options import TrainOptions
from l4q.train_state import newest_state, read_json, write_json

log = logging.getLogger(__name__)

RUN_FORMAT = 1
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Paths and records of one run: `claim` it, `check` it against its own record, then `start` writing."""

    def __init__(self, path: Path) -> None:
        """Name the paths; nothing is read or written yet."""
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.found_start = path / "start.safetensors"
        self.checkpoint = path / "checkpoint"
        self._lock: FolderLock | None = None

    def claim(self, options: TrainOptions) -> None:
        """Check that the run may be written: the folder is new, or holds a run to continue or to replace.

        The run is this process's from here on, until `release`.

        Raises:
            UsageError: The folder is not empty and neither resume nor overwrite is set; or it is not a run's folder.
            BusyError: Another process is training this run.
        """
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock.acquire(Path(os.path.realpath(self.path)))
        occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if occupied and not (options.resume or options.overwrite):
            raise UsageError(
                "the run folder is not empty",
                where=self.path,
                expected="a new folder",
                remedy="add --resume to continue it, --overwrite to start it anew, or choose another --out",
            )
        if occupied:
            self._require_run()

    def release(self) -> None:
        """Let other processes write the run."""
        if self._lock is not None:
            self._lock.release()

    def check(self, options: TrainOptions, data_facts: dict[str, Any]) -> None:
        """Compare the options and data with those that a run being continued was started with.

        Raises:
            UsageError: They differ in something that decides the trained weights.
        """
        if options.resume and self.config.exists():
            self._check_same(_record(options, data_facts))

    def start(self, options: TrainOptions, data_facts: dict[str, Any]) -> None:
        """Create the folder, or clean up what a killed run left behind, and record options, versions and data."""
        with output_errors(self.path):
            if options.overwrite and self.path.exists():
                discard(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.path)
            if not self.config.exists():
                write_json(self.config, _record(options, data_facts))

    def resume_point(self) -> tuple[int, Path] | None:
        """The newest intact state; metrics of later steps are dropped, as those steps are trained again."""
        point = newest_state(self.path)
        step = point[0] if point else 0
        self._cut_metrics(step)
        return point

    def finished(self, options: TrainOptions) -> dict[str, Any] | None:
        """The recorded result of a complete run that is being continued, or None."""
        if not (options.resume and self.result.exists() and self.checkpoint.is_dir()):
            return None
        result: dict[str, Any] = read_json(self.result)
        return result

    def _require_run(self) -> None:
        try:
            marked = self.path.is_dir() and "l4q_run" in read_json(self.config)
        except (OSError, ValueError, TypeError):
            marked = False
        if not marked:
            raise UsageError(
                "the folder was not written by l4q-train",
                where=self.path,
                got="no config.json of a run",
                remedy="choose another --out; nothing was changed",
            )

    def _check_same(self, record: dict[str, Any]) -> None:
        recorded = read_json(self.config)
        # Read as options, so that those the run's version did not have yet count as their defaults.
        started = TrainOptions.from_dict(recorded["options"], where=self.config).identity()
        old = {**started, "data sha256": recorded["data"]["sha256"], "processes": recorded.get("processes", 1)}
        new = {**record["identity"], "data sha256": record["data"]["sha256"], "processes": record["processes"]}
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            raise UsageError(
                "a run can only be resumed with the options and data it was started with",
                where=self.config,
                got={key: new.get(key) for key in changed},
                expected={key: old.get(key) for key in changed},
                remedy="repeat the original options, or start another run",
            )
        if recorded["versions"] != record["versions"]:
            log.warning("software versions differ from the run's start; the resumed run may differ in the last bits")

    def _cut_metrics(self, step: int) -> None:
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line a killed process was writing
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
        write_atomic(self.metrics, "".join(kept))


def _record(options: TrainOptions, data_facts: dict[str, Any]) -> dict[str, Any]:
    from l4q.distributed import process_count

    return {
        "l4q_run": RUN_FORMAT,
        "options": options.to_dict(),
        "identity": options.identity(),
        "processes": process_count(),
        "data": data_facts,
        "versions": current_versions(),
    }


def current_versions() -> dict[str, str]:
    """Versions of l4q, Python and the packages that influence the numbers."""
    from l4q import __version__

    return {"l4q": __version__, "python": platform.python_version()} | {
        name: version(name) for name in RECORDED_PACKAGES
    }
