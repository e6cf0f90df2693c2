"""The model card (README.md) beside every export: what it is, how to load it, what was measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import l4q
from exporters.manifest import renew_entry
from exporters.plan import ExportPlan
from exporters.verify import VerifyReport
from l4q.checkpoint import L4QCheckpoint
from l4q.durable import write_atomic

CARD_NAME = "README.md"
PARITY_BEGIN = "<!-- l4q-parity begin -->"
PARITY_END = "<!-- l4q-parity end -->"
_UNMEASURED = "Not measured yet: `l4q-parity CHECKPOINT THIS_FOLDER --text FILE` fills this section."


def write_card(
    folder: Path, checkpoint: L4QCheckpoint, plan: ExportPlan, usage: str, report: VerifyReport | None
) -> None:
    """Write README.md into an exported folder."""
    quant = checkpoint.quant
    base = checkpoint.config.get("_name_or_path") or checkpoint.architecture
    runtimes = [f"| {r.runtime} | {'yes' if r.loads else 'no'} | {r.reason} |" for r in plan.runtimes]
    notes = [f"- {note}" for note in plan.notes]
    lines = [
        "---",
        "library_name: l4q",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {plan.format}",
        "- l4q",
        f"- {quant.bits}-bit",
        "---",
        "",
        f"# {Path(str(base)).name}, L4Q {quant.bits}-bit, {plan.format}",
        "",
        f"Fine-tuned inside the quantizer with l4q {l4q.__version__}: {quant.bits} bits, "
        f"group size {quant.group_size}, zero-point {quant.zero_point}, scale grid {quant.scale_grid}. "
        "The integers in this folder are the trained ones; nothing was quantized again on the way.",
        "",
        *_mixed(checkpoint),
        f"- Quantized tensors: {len(plan.quantized)}, {plan.bits_per_weight:.2f} bits per weight with scales",
        f"- Size of the tensors: {plan.nbytes:,} bytes",
        f"- {_verified(report)}",
        *notes,
        "",
        "## Where it runs",
        "",
        "| runtime | loads | remarks |",
        "|---|---|---|",
        *runtimes,
        "",
        "## How to load it",
        "",
        usage.strip(),
        "",
        "## Measured parity",
        "",
        PARITY_BEGIN,
        _UNMEASURED,
        PARITY_END,
        "",
    ]
    (folder / CARD_NAME).write_text("\n".join(lines), encoding="utf-8")


def _verified(report: VerifyReport | None) -> str:
    if report is None:
        return "Not verified: the export was allowed to round, or verification was switched off."
    judged = "quantized tensors decode bit for bit to the trained weights, judged by a decoder that is not l4q's."
    if report.checked == report.total:
        return f"{report.exact} of {report.total} {judged}"
    return (
        f"{report.exact} of {report.checked} sampled {judged} The other {report.total - report.checked} were not read."
    )


def _mixed(checkpoint: L4QCheckpoint) -> list[str]:
    """One line per other grid, with its number of modules; nothing if all are on the common one."""
    base = (checkpoint.quant.bits, checkpoint.quant.group_size, checkpoint.quant.zero_point)
    counted = Counter(checkpoint.info(module).grid for module in checkpoint.modules)
    others = [
        f"- {count} modules on another grid: {bits} bits, group size {group_size}, zero-point {zero_point}"
        for (bits, group_size, zero_point), count in counted.items()
        if (bits, group_size, zero_point) != base
    ]
    return [*others, ""] if others else []


def update_parity(folder: Path, markdown: str) -> bool:
    """Replace the measured-parity section of a card; False if the folder has no card with such a section."""
    path = folder / CARD_NAME
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    head, begin, rest = text.partition(PARITY_BEGIN)
    _, end, tail = rest.partition(PARITY_END)
    if not begin or not end:
        return False
    write_atomic(path, f"{head}{PARITY_BEGIN}\n{markdown.strip()}\n{PARITY_END}{tail}")
    renew_entry(folder, CARD_NAME)
    return True
