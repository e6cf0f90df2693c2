"""`l4q_export.json`: what an exported folder is, for tools that meet it later."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import l4q
from exporters.files import write_json
from exporters.plan import ExportOptions, ExportPlan
from exporters.verify import VerifyReport
from l4q.checkpoint import L4QCheckpoint
from l4q.module_grids import MODULES_KEY

MANIFEST_NAME = "l4q_export.json"


def write_manifest(
    folder: Path,
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    options: ExportOptions,
    report: VerifyReport | None = None,
) -> None:
    """Record what was written, for whom, and what was read back; nothing in it depends on the machine or the time."""
    encodings = sorted({tensor.encoding for tensor in plan.quantized})
    write_json(
        folder / MANIFEST_NAME,
        {
            "l4q_version": l4q.__version__,
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
        },
    )


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
