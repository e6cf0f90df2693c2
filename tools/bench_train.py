"""Cost of a training step: python -m tools.bench_train [--quick].

L4Q, plain LoRA (peft), QAT-LoRA as a naive autograd graph, and full QAT, on the same model, batch and length. Every
measurement is a fresh process (forked from one that has only imported torch); methods take turns, and medians over the
repetitions are reported. The last line of stdout is one JSON object {"peak_memory_vs_lora", "step_time_vs_lora",
"naive_peak_vs_l4q"}.

Peak memory is torch.cuda.max_memory_allocated on a GPU. On a CPU it is the process's largest resident size during the
steps, less what the process held before the model was built (Python, torch, and the compiler of the kernels).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from l4q.cli_common import run
from l4q.config import KernelChoice
from l4q.errors import L4QError
from tools.bench_cases import CASES, METHODS, Case

ASSETS = Path("build/assets")


class BenchError(L4QError):
    """A method that could not be measured although the comparison needs it."""

    exit_code = 4


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians over the repetitions of one method in one case; None if it ran out of memory."""

    step_seconds: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    """Bytes autograd keeps between forward and backward, parameters not counted."""
    error: str = ""


def measure_case(case: Case, repetitions: int, assets: Path, progress: Any) -> dict[str, Cost]:
    """Every method `repetitions` times, in turns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.bench_steps"])
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(repetitions):
        for method in METHODS:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(send, method, case, assets))
            process.start()
            send.close()
            try:
                found[method].append(receive.recv())
            except EOFError:
                process.join()
                found[method].append({"error": f"the process ended with exit code {process.exitcode}"})
            process.join()
            progress(f"{case.name}, {method}")
    return {method: _median(answers) for method, answers in found.items()}


def _child(send: Connection, method: str, case: Case, assets: Path) -> None:
    from tools.bench_steps import measure_into

    measure_into(send, method, case, assets)


def ratios(costs: dict[str, Cost]) -> dict[str, float | None]:
    """The three figures of the last line; None where a side is missing.

    Raises:
        BenchError: L4Q or LoRA itself has no measurement.
    """
    l4q, lora, naive = costs["l4q"], costs["lora"], costs["qat-lora-naive"]
    if l4q.peak_bytes is None or lora.peak_bytes is None or l4q.step_seconds is None or lora.step_seconds is None:
        raise BenchError(
            "L4Q or LoRA could not be measured", got=l4q.error or lora.error, remedy="use a smaller --case"
        )
    return {
        "peak_memory_vs_lora": round(l4q.peak_bytes / lora.peak_bytes, 4),
        "step_time_vs_lora": round(l4q.step_seconds / lora.step_seconds, 4),
        "naive_peak_vs_l4q": round(naive.peak_bytes / l4q.peak_bytes, 4) if naive.peak_bytes else None,
    }


def _median(answers: Sequence[dict[str, Any]]) -> Cost:
    failed = [answer["error"] for answer in answers if answer.get("error")]
    if failed:
        return Cost(error=failed[0])
    return Cost(
        step_seconds=statistics.median(value for answer in answers for value in answer["step_seconds"]),
        peak_bytes=round(statistics.median(answer["peak_bytes"] for answer in answers)),
        saved_bytes=round(statistics.median(answer["saved_bytes"] for answer in answers)),
    )


def _show(case: Case, costs: dict[str, Cost], console: Console) -> None:
    title = f"{case.name}: {case.batch} x {case.length} tokens, {case.dtype}, {case.device}"
    table = Table("method", "step s", "peak MB", "saved for backward MB", "", title=title)
    for method, cost in costs.items():
        seconds = "" if cost.step_seconds is None else f"{cost.step_seconds:.4f}"
        sizes = ["" if value is None else f"{value / 1e6:.1f}" for value in (cost.peak_bytes, cost.saved_bytes)]
        table.add_row(method, seconds, *sizes, cost.error)
    console.print(table)


def _cases(quick: bool, device: str, chosen: tuple[str, ...], changes: dict[str, Any]) -> list[Case]:
    given = {name: value for name, value in changes.items() if value is not None}
    cases = CASES["quick" if quick else "cuda" if device == "cuda" else "cpu"]
    if quick and device == "cuda":
        given |= {"device": "cuda", "dtype": "bfloat16"}
    names = [case.name for case in cases]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise click.BadParameter(f"unknown {unknown}; this device has {names}", param_hint="--case")
    return [replace(case, **given) for case in cases if not chosen or case.name in chosen]


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="Four small layers with random weights; under a minute.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: cuda if there is one."
)
@click.option("--case", "chosen", multiple=True, help="Only this case; repeatable.  [default: all of the device]")
@click.option("--repetitions", type=click.IntRange(1), help="Processes per method.  [default: 3, with --quick 2]")
@click.option("--batch", type=click.IntRange(1), help="Sequences per step.  [default: the case's]")
@click.option("--length", type=click.IntRange(2), help="Tokens per sequence.  [default: the case's]")
@click.option("--steps", type=click.IntRange(1), help="Timed steps per process, after one untimed.")
@click.option("--kernels", type=click.Choice(get_args(KernelChoice)), help="Of L4Q's layers.  [default: auto]")
@click.option("--assets", type=click.Path(path_type=Path), default=ASSETS, help="Folder with smollm2.")
@click.option("--report", type=click.Path(path_type=Path), help="Write all figures to this JSON file.")
def command(quick: bool, device: str, chosen: tuple[str, ...], repetitions: int | None, **options: Any) -> None:
    """Compare the step time and memory of L4Q, LoRA, naive QAT-LoRA and full QAT."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = _cases(quick, device, chosen, {name: options[name] for name in ("batch", "length", "steps", "kernels")})
    rounds = repetitions or (2 if quick else 3)
    console = Console()
    report: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        row = bars.add_task("starting", total=len(cases) * rounds * len(METHODS))
        for case in cases:
            costs = measure_case(
                case, rounds, options["assets"], lambda text: bars.update(row, advance=1, description=text)
            )
            _show(case, costs, console)
            entry = {"case": asdict(case), "costs": {method: asdict(cost) for method, cost in costs.items()}}
            report.append({**entry, "ratios": ratios(costs)})
    if options["report"]:
        options["report"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    # The last case speaks for the run: the largest model, without checkpointing.
    click.echo(json.dumps(report[-1]["ratios"]))


def main() -> None:
    """Entry point."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    run(command)


if __name__ == "__main__":
    main()
