"""`l4q_export.json`: what an exported folder is, of what it was made, and which files belong to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import l4q
from exporters.files import write_json
from exporters.plan import ExportOptions, ExportPlan
from exporters.verify import VerifyReport
from l4q.checkpoint import L4QCheckpoint
from l4q.durable import write_atomic
from l4q.file_table import FileTable, file_facts, json_digest
from l4q.module_grids import MODULES_KEY

MANIFEST_NAME = "l4q_export.json"


def write_manifest(
    folder: Path,
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    options: ExportOptions,
    report: VerifyReport | None = None,
    *,
    source: str,
    files: FileTable,
) -> None:
    """Record what was written, for whom, and what was read back; nothing in it depends on the machine or the time.

    Args:
        folder: The exported folder.
        checkpoint: What was exported.
        plan: What was planned, and is now written.
        options: Choices of the format.
        report: What foreign decoders found, if they were asked.
        source: The checkpoint's hash, `l4q.checkpoint_files.source_digest`.
        files: Every other file of the folder.
    """
    encodings = sorted({tensor.encoding for tensor in plan.quantized})
    write_json(
        folder / MANIFEST_NAME,
        {
            "l4q_version": l4q.__version__,
            "packages": package_versions(plan),
            "source": {"sha256": source},
            "plan": {"sha256": plan_digest(plan, options)},
            "format": plan.format,
            "encodings": encodings,
            "quantization": {**checkpoint.quant.to_dict(), **mixed_grids(checkpoint)},
            "quantized_tensors": len(plan.quantized),
            "tensor_bytes": plan.nbytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "rounded_tensors": len(plan.rounded),
            "options": asdict(options),
            "runtimes": {r.runtime: {"loads": r.loads, "reason": r.reason} for r in plan.runtimes},
            "verified": verified_counts(report),
            "files": files,
        },
    )


def package_versions(plan: ExportPlan) -> dict[str, str]:
    """Releases of the packages that decide the files' bytes beside l4q."""
    return {name: version(name) for name in sorted(plan.packages)}


def plan_digest(plan: ExportPlan, options: ExportOptions) -> str:
    """Hash of everything that was decided before the first byte."""
    tensors = [[t.name, t.target, t.encoding, t.shape, t.nbytes] for t in plan.tensors]
    return json_digest({"format": plan.format, "tensors": tensors, "options": asdict(options)})


def work_identity(plan: ExportPlan, options: ExportOptions, source: str) -> dict[str, str]:
    """What must be the same for an interrupted export to go on: it decides every byte."""
    own = {"l4q": l4q.__version__, "plan": plan_digest(plan, options), "source": source}
    return {**own, **package_versions(plan)}


def renew_entry(folder: Path, name: str) -> None:
    """Record a file anew that was changed on purpose, such as the card when parity was measured."""
    manifest = read_manifest(folder)
    if manifest is None or name not in manifest.get("files", {}):
        return
    manifest["files"][name] = file_facts(folder / name)
    write_atomic(folder / MANIFEST_NAME, json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def verified_counts(report: VerifyReport | None) -> dict[str, int] | None:
    """How many modules foreign decoders read, and how many of them were exact; None if nothing was read back."""
    return {"exact": report.exact, "checked": report.checked, "total": report.total} if report else None


def mixed_grids(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """The grids of modules that are not on the common one, as config.json lists them; empty if there are none."""
    section = checkpoint.config["quantization_config"]
    return {MODULES_KEY: section[MODULES_KEY]} if section.get(MODULES_KEY) else {}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none that can be read."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
