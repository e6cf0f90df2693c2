"""What the processes of tools.bench_export do: one for each format, one for each peer, asked in turns."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError
from tools.bench_export_peers import Peer, run_peer
from tools.bench_float import first_modules

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ExportCost:
    """One export."""

    seconds: float
    """Until the call returned: every file is on the disk then."""
    nbytes: int
    """Bytes of all files."""
    peak: int
    """Largest resident size (VmHWM) above that before the call."""
    private: int
    """The same of memory that no file backs (RssAnon, sampled): what cannot be dropped when others need it."""


@dataclass(frozen=True, kw_only=True)
class PeerCost:
    """What a peer did with some modules."""

    seconds: float
    weights: int


class Worker:
    """A process of its own that answers one call after another, with imports done before the first.

    Args:
        packages: Folder with packages that come before the environment's.
        environment: Variables set before anything is imported.
    """

    def __init__(self, packages: Path | None = None, environment: tuple[tuple[str, str], ...] = ()) -> None:
        start = (None if packages is None else str(packages), environment)
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=start)

    def ask(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run there, wait for the answer.

        Raises:
            L4QError: The process died.
        """
        try:
            return self._pool.submit(work, *args, **kwargs).result()
        except BrokenProcessPool as error:
            name = getattr(work, "__name__", "work")
            raise L4QError(
                f"the process that did {name} died", got=error, remedy="look at its messages above"
            ) from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _begin(packages: str | None, environment: tuple[tuple[str, str], ...]) -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    os.environ.update(environment)
    if packages is not None:
        sys.path.insert(0, packages)
    logging.disable(logging.INFO)
    os.dup2(2, 1)  # whatever packages print is not the result


def export_once(checkpoint: Path, name: str, out: Path, *, check: bool) -> ExportCost:
    """Export into `out`, which is replaced, and measure."""
    from exporters.driver import export
    from tools.bench_onnx import private_peak
    from tools.measure import peak_resident_bytes, private_bytes, reset_peak

    shutil.rmtree(out, ignore_errors=True)
    read_through(checkpoint)
    gc.collect()
    before, before_private = reset_peak("cpu"), private_bytes()
    with private_peak(interval=0.02) as private:
        began = time.perf_counter()
        export(L4QCheckpoint.open(checkpoint), name, out, check="full" if check else "none")
        seconds = time.perf_counter() - began
    peak = peak_resident_bytes()
    return ExportCost(
        seconds=seconds,
        nbytes=folder_bytes(out),
        peak=peak - before,
        private=private[0] - before_private,
    )


def copy_once(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp -r`, and the same with the fsync of every file; what is copied lies in the page cache."""
    shutil.rmtree(target, ignore_errors=True)
    read_through(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - began
    synced = seconds + sync(target)
    shutil.rmtree(target)
    return seconds, synced


def peer_once(peer: Peer, checkpoint: Path, layers: int, out: Path) -> PeerCost:
    """Let a peer write the linears of the first layers into `out`, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    opened = L4QCheckpoint.open(checkpoint)
    try:
        seconds, weights = run_peer(peer, opened, first_modules(opened, layers), out)
    finally:
        shutil.rmtree(out)
    return PeerCost(seconds=seconds, weights=weights)


def sync(folder: Path) -> float:
    """Seconds until every file of a folder is on the disk."""
    began = time.perf_counter()
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return time.perf_counter() - began


def read_through(folder: Path) -> None:
    """Read every file, so that who reads next finds it in the page cache: an export may have written past it."""
    block = bytearray(1 << 20)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]
