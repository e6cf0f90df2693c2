"""What the `l4q-export` command does once its options are parsed."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from exporters.driver import ExportResult, export, make_plan
from exporters.hub import push, repositories
from exporters.manifest import verified_counts
from exporters.plan import ExportOptions, ExportPlan
from exporters.verify import VerifyReport
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_command import progress_console
from l4q.errors import UsageError
from l4q.files import refuse_existing

_OPTIONS = (
    "gptq_format",
    "gguf_type",
    "gguf_embeddings",
    "onnx_graph",
    "onnx_scales",
    "onnx_block_size",
    "onnx_accuracy_level",
    "onnx_runtime_optimized",
    "dtype",
    "max_shard_bytes",
    "container_bits",
    "tensor_parallel",
    "allow_rounding",
)


def run_export(arguments: dict[str, Any], *, table: bool = False) -> dict[str, Any]:
    """Plan every format first, so that a refusal comes before anything is written; then export one after another.

    Returns:
        Per format: folder, bytes, bits per weight, tensors, fidelity and verification, ready for JSON.
    """
    checkpoint = L4QCheckpoint.open(arguments["checkpoint"])
    options = ExportOptions(**{name: arguments[name] for name in _OPTIONS})
    out: Path = arguments["out"]
    formats = list(dict.fromkeys(arguments["formats"]))
    repos = hub_repositories(arguments, formats)
    if not arguments["dry_run"]:
        for name in formats:
            refuse_existing(out / name, overwrite=arguments["overwrite"])
    plans = {name: make_plan(checkpoint, name, options) for name in formats}
    warn(plans)
    if arguments["dry_run"]:
        if table:
            for plan in plans.values():
                print_plan(plan)
        return {name: plan_summary(plan) for name, plan in plans.items()}
    results = {}
    for name in formats:
        results[name] = _export_with_bar(checkpoint, name, plans[name], options, arguments)
    if table:
        _print_results(results)
    summaries = {name: _result_summary(result) for name, result in results.items()}
    for name, repo in repos.items():
        summaries[name]["pushed"] = push(
            results[name].folder, repo, private=arguments["private"], revision=arguments["revision"]
        )
        if table:
            Console().print(f"{name}: pushed to {summaries[name]['pushed']}", markup=False)
    return summaries


def hub_repositories(arguments: dict[str, Any], formats: list[str]) -> dict[str, str]:
    """Format -> repository to push to; empty if nothing is to be pushed.

    Raises:
        UsageError: A name the hub does not allow, or options of a push without one.
    """
    if arguments["push_to_hub"]:
        return repositories(arguments["push_to_hub"], formats)
    if arguments["private"] or arguments["revision"]:
        raise UsageError("--private and --revision say how to push", remedy="add --push-to-hub USER/NAME")
    return {}


def warn(plans: dict[str, ExportPlan]) -> None:
    """Say on stderr, before anything is written, what runtimes are known to refuse or misread."""
    for name, plan in plans.items():
        for caution in plan.cautions:
            click.echo(f"warning: {name}: {caution}", err=True)


def plan_summary(plan: ExportPlan) -> dict[str, Any]:
    """A plan as plain JSON values."""
    return {
        "format": plan.format,
        "bytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "quantized_tensors": len(plan.quantized),
        "rounded_tensors": len(plan.rounded),
        "runtimes": {r.runtime: {"loads": r.loads, "reason": r.reason} for r in plan.runtimes},
        "notes": list(plan.notes),
        "warnings": list(plan.cautions),
        "tensors": [
            {
                "name": t.name,
                "target": t.target,
                "encoding": t.encoding,
                "bytes": t.nbytes,
                "fidelity": t.fidelity.value,
                "reason": t.reason,
            }
            for t in plan.tensors
        ],
    }


def print_plan(plan: ExportPlan) -> None:
    """Print a plan as a table, layers of equal treatment folded into one row, then runtimes and notes."""
    console = Console()
    table = Table(title=f"{plan.format}: {plan.nbytes:,} bytes, {plan.bits_per_weight:.2f} bits per quantized weight")
    for column in ("tensors", "encoding", "count", "bytes", "fidelity"):
        table.add_column(column, justify="right" if column in {"count", "bytes"} else "left", overflow="fold")
    rows: dict[tuple[str, str, str], list[int]] = {}
    reasons: dict[tuple[str, str], None] = {}
    for tensor in plan.tensors:
        pattern = ".".join("*" if part.isdigit() else part for part in tensor.name.split("."))
        rows.setdefault((pattern, tensor.encoding, tensor.fidelity.value), []).append(tensor.nbytes)
        reasons[tensor.fidelity.value, tensor.reason] = None
    for (pattern, encoding, fidelity), sizes in rows.items():
        table.add_row(pattern, encoding, str(len(sizes)), f"{sum(sizes):,}", fidelity)
    console.print(table)
    for fidelity, reason in filter(itemgetter(1), reasons):
        console.print(f"  {fidelity}: {reason}", markup=False)
    for runtime in plan.runtimes:
        said = f"{'loads in' if runtime.loads else 'not for'} {runtime.runtime}"
        console.print(f"  {said}: {runtime.reason}" if runtime.reason else f"  {said}", markup=False)
    for note in plan.notes:
        console.print(f"  note: {note}", markup=False)


def _export_with_bar(
    checkpoint: L4QCheckpoint, name: str, plan: ExportPlan, options: ExportOptions, arguments: dict[str, Any]
) -> ExportResult:
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console()) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, total: int, _tensor: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{name} {stage}", total=total)
            bars.advance(tasks[stage])

        return export(
            checkpoint,
            name,
            arguments["out"] / name,
            options,
            overwrite=arguments["overwrite"],
            resume=arguments["resume"],
            wait=arguments["wait"],
            check=arguments["verify"],
            progress=advance,
            plan=plan,
        )


def _result_summary(result: ExportResult) -> dict[str, Any]:
    summary = plan_summary(result.plan)
    del summary["tensors"]
    summary["folder"] = str(result.folder)
    summary["verified"] = verified_counts(result.verified)
    return summary


def _verified(report: VerifyReport | None) -> str:
    if report is None:
        return "not verified"
    sampled = "" if report.checked == report.total else f" sampled, of {report.total}"
    return f"{report.exact} of {report.checked}{sampled}"


def _print_results(results: dict[str, ExportResult]) -> None:
    table = Table(title="exports")
    for column in ("format", "folder", "bytes", "bits/weight", "bit-exact"):
        table.add_column(column, overflow="fold")
    for name, result in results.items():
        exact = _verified(result.verified)
        size = f"{result.plan.nbytes:,}"
        table.add_row(name, str(result.folder), size, f"{result.plan.bits_per_weight:.2f}", exact)
    console = Console()
    console.print(table)
    for name, result in results.items():
        for note in result.plan.notes:
            console.print(f"{name}: {note}", markup=False)
