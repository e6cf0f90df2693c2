"""`export`: plan, pack and write one format into a folder that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from exporters.card import write_card
from exporters.manifest import write_manifest
from exporters.plan import Exporter, ExportOptions, ExportPlan
from exporters.plugins import load_plugin, plugin_formats
from exporters.verify import VerifyReport, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import InexactError, UsageError, VerificationError
from l4q.files import refuse_existing, staged_folder

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
    check: bool = True,
    progress: Progress = lambda stage, total, tensor: None,
) -> ExportResult:
    """Export a checkpoint to one format.

    Args:
        checkpoint: The source, opened or its folder.
        name: A key of `EXPORTERS`, or a format that another package brings.
        out: Folder to create.
        options: Choices of the format; defaults if None.
        overwrite: Replace an existing folder.
        check: Read the result back with foreign decoders before it gets its final name.
        progress: Called after each tensor.

    Raises:
        UsageError: The folder exists, or the checkpoint's values are damaged.
        UnsupportedError: The format cannot hold the checkpoint.
        InexactError: It would have to round without leave.
        VerificationError: The written bytes do not decode to the checkpoint's weights; nothing is left behind.
    """
    options = options or ExportOptions()
    checkpoint = checkpoint if isinstance(checkpoint, L4QCheckpoint) else L4QCheckpoint.open(checkpoint)
    target = Path(out)
    refuse_existing(target, overwrite=overwrite)
    plan = make_plan(checkpoint, name, options)
    exporter = get_exporter(name)
    with staged_folder(target, overwrite=overwrite) as stage:
        exporter.write(checkpoint, plan, stage, options, lambda t: progress("write", len(plan.tensors), t))
        report = None
        if check and not plan.rounded:
            total = len(checkpoint.modules)
            report = verify(checkpoint, exporter, stage, lambda t: progress("verify", total, t))
            if not report.passed:
                raise VerificationError(
                    f"{name}: {report.exact} of {report.total} modules decode to the checkpoint's weights",
                    got="; ".join(report.differing[:3]),
                    expected="bit-for-bit equality",
                    remedy="this is a defect of l4q: please report it with the model's config.json",
                )
        write_manifest(stage, checkpoint, plan, options)
        write_card(stage, checkpoint, plan, exporter.usage(), report)
    return ExportResult(folder=target, plan=plan, verified=report)


def _missing_package(name: str, error: ModuleNotFoundError) -> UsageError:
    return UsageError(
        f"the {name} export needs a package that is not installed",
        got=error.name,
        remedy=f"pip install 'l4q[{name}]'",
    )
