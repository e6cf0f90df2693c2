"""`export`: plan, pack and write one format into a folder that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import cast

from exporters.card import CARD_NAME, write_card
from exporters.manifest import work_identity, write_manifest
from exporters.plan import Exporter, ExportOptions, ExportPlan
from exporters.plugins import load_plugin, plugin_formats
from exporters.verify import VerifyMode, VerifyReport, sample_modules, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.checkpoint_files import source_digest
from l4q.durable import sync_tree
from l4q.errors import InexactError, L4QError, UsageError, VerificationError
from l4q.file_table import file_facts
from l4q.files import refuse_existing, staged_folder
from l4q.journal import JOURNAL_FILES, Journal

# format name -> package with plan, write, read_back and usage; imported only when that format is asked for
EXPORTERS = {
    "gptq": "exporters.gptq",
    "awq": "exporters.awq",
    "compressed-tensors": "exporters.compressed_tensors",
    "gguf": "exporters.gguf",
    "onnx": "exporters.onnx",
}

Progress = Callable[[str, int, str], None]
"""Called as progress(stage, total, tensor_name) after each tensor of the stages "write" and "verify"."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A finished export."""

    folder: Path
    plan: ExportPlan
    verified: VerifyReport | None
    """None when verification was switched off or the plan rounds."""


def get_exporter(name: str) -> Exporter:
    """Import a format's package: one of `EXPORTERS`, or one that another package brings (`exporters.plugins`).

    Raises:
        UsageError: The format is unknown or its package is broken, or a package it needs is not installed.
    """
    if name not in EXPORTERS:
        plugin = load_plugin(name)
        if plugin is None:
            known = sorted({*EXPORTERS, *plugin_formats()})
            raise UsageError("unknown export format", where="--to", got=name, expected=f"one of {known}")
        return plugin
    try:
        return cast(Exporter, import_module(EXPORTERS[name]))
    except ModuleNotFoundError as error:
        raise _missing_package(name, error) from error


def make_plan(checkpoint: L4QCheckpoint, name: str, options: ExportOptions) -> ExportPlan:
    """Plan an export and refuse it if it would round without leave; nothing is written.

    Raises:
        UnsupportedError: The format cannot hold the checkpoint.
        InexactError: It can only by rounding, and `options.allow_rounding` is false.
    """
    try:
        plan = get_exporter(name).plan(checkpoint, options)
    except ModuleNotFoundError as error:
        raise _missing_package(name, error) from error
    if plan.rounded and not options.allow_rounding:
        first = plan.rounded[0]
        raise InexactError(
            f"{name} cannot hold {len(plan.rounded)} of {len(plan.quantized)} quantized tensors exactly",
            where=first.name,
            got=f"{first.encoding}: {first.reason}",
            expected="an encoding that holds the trained values",
            remedy="choose another format or type (see --dry-run), or add --allow-rounding to accept the loss",
        )
    return plan


def export(
    checkpoint: L4QCheckpoint | str | Path,
    name: str,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    wait: bool = False,
    check: VerifyMode = "full",
    progress: Progress = lambda stage, total, tensor: None,
    plan: ExportPlan | None = None,
) -> ExportResult:
    """Export a checkpoint to one format.

    Args:
        checkpoint: The source, opened or its folder.
        name: A key of `EXPORTERS`, or a format that another package brings.
        out: Folder to create.
        options: Choices of the format; defaults if None.
        overwrite: Replace an existing folder.
        resume: Go on with what an interrupted export of the same checkpoint and plan has completed, and keep the
            completed files if this one is interrupted.
        wait: Wait for another process that writes `out`, instead of refusing.
        check: Read the result back with foreign decoders before it gets its final name: "full" every module, "sample"
            those of `sample_modules`, "none" nothing.
        progress: Called after each tensor.
        plan: What `make_plan` has given for this checkpoint, format and options; made here if None.

    Raises:
        UsageError: The folder exists, or the checkpoint's values are damaged, or it was replaced meanwhile.
        BusyError: Another process is writing the folder.
        OutputError: The folder cannot be written.
        UnsupportedError: The format cannot hold the checkpoint.
        InexactError: It would have to round without leave.
        VerificationError: The written bytes do not decode to the checkpoint's weights; nothing is left behind.
    """
    options = options or ExportOptions()
    checkpoint = checkpoint if isinstance(checkpoint, L4QCheckpoint) else L4QCheckpoint.open(checkpoint)
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    plan = plan or make_plan(checkpoint, name, options)
    job = _Job(checkpoint, plan, get_exporter(name), options, check, progress)
    with staged_folder(target, overwrite=overwrite, resume=resume, wait=wait) as stage:
        report = job.run(stage)
    return ExportResult(folder=target, plan=plan, verified=report)


@dataclass(frozen=True)
class _Job:
    """One export into a stage."""

    checkpoint: L4QCheckpoint
    plan: ExportPlan
    exporter: Exporter
    options: ExportOptions
    check: VerifyMode
    progress: Progress

    def run(self, stage: Path) -> VerifyReport | None:
        """Write what the stage does not hold yet, read everything back, and seal it with manifest and card."""
        folder, source = self.checkpoint.path, _FolderIdentity.of(self.checkpoint.path)
        digest = cache(lambda: source_digest(folder, check=self.check != "none"))
        journal = Journal.open(stage, lambda: work_identity(self.plan, self.options, digest()))
        try:
            self._write(stage, journal)
            report = self._verify(stage)
            journal.table()
            write_card(stage, self.checkpoint, self.plan, self.exporter.usage(), report)
            files = {**journal.table(), CARD_NAME: file_facts(stage / CARD_NAME)}
            write_manifest(stage, self.checkpoint, self.plan, self.options, report, source=digest(), files=files)
            source.require_same()
            journal.close()
        except L4QError:
            source.require_same()  # what was read of two checkpoints says nothing of either
            raise
        finally:
            journal.stop()
        return report

    def _write(self, stage: Path, journal: Journal) -> None:
        if journal.written:
            return

        def advance(tensor: str) -> None:
            self.progress("write", len(self.plan.tensors), tensor)

        with _one_torch_thread():
            self.exporter.write(self.checkpoint, self.plan, stage, self.options, advance, journal)
        sync_tree(stage, leave=JOURNAL_FILES)  # another thread replaces these
        journal.add_rest(stage)

    def _verify(self, stage: Path) -> VerifyReport | None:
        if self.check == "none" or self.plan.rounded:
            return None
        sample = sample_modules(self.checkpoint) if self.check == "sample" else None
        total = len(self.checkpoint.modules if sample is None else sample)
        advance = partial(self.progress, "verify", total)
        report = verify(self.checkpoint, self.exporter, stage, advance, sample=sample)
        if not report.passed:
            raise VerificationError(
                f"{self.plan.format}: {report.exact} of {report.checked} modules decode to the checkpoint's weights",
                got="; ".join(report.differing[:3]),
                expected="bit-for-bit equality",
                remedy="this is a defect of l4q: please report it with the model's config.json",
            )
        return report


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Casts of a few MiB gain nothing from threads of torch's own, which wait spinning, while hashing needs a core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _FolderIdentity:
    """Which folder a path led to: a training that ends meanwhile puts another one in its place."""

    path: Path
    facts: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> _FolderIdentity:
        """Of the folder that is there now."""
        status = path.stat()
        return cls(path, (status.st_dev, status.st_ino))

    def require_same(self) -> None:
        """Check that it is still there.

        Raises:
            UsageError: It was removed, or another one has its name.
        """
        if not self.path.is_dir() or _FolderIdentity.of(self.path) != self:
            raise UsageError(
                "the checkpoint was replaced while it was being exported",
                where=self.path,
                expected="one checkpoint from beginning to end",
                remedy="run the command again",
            )


def _missing_package(name: str, error: ModuleNotFoundError) -> UsageError:
    return UsageError(
        f"the {name} export needs a package that is not installed",
        got=error.name,
        remedy=f"pip install 'l4q[{name}]'",
    )
