"""Cost of freezing: python -m tools.bench_freeze [--model tiny|smollm2|llama-1b|llama-7b].

A model of the real one's exact shapes with random 16-bit weights is wrapped as for training, then frozen and saved as
an L4Q checkpoint: every weight goes through W0 + scaling * B A, rounding and packing. Reported are the wall time, the
same against `cp -r` and fsync of the written folder on the same disk, millions of weights per second, and how far the
largest resident size rises above the model that is in memory anyway. The 7B shapes need 16 GB of memory. The last line
of stdout is one JSON object {"wall_vs_cp", "peak_mib", "mweights_per_s"}.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from l4q.cli_common import run
from l4q.config import LoraConfig, QuantConfig
from tools.bench_export_jobs import Worker, copy_once, folder_bytes
from tools.bench_export_models import BITS, DENSE_STD, GROUP, MODELS, BenchModel
from tools.bench_export_report import MIB, machine, spread, table_head, table_row

RANK = 16
POOL = 1 << 22
"""Random numbers that fill every weight again and again: rounding takes as long, drawing them does not."""
COLUMNS = ("model", "MB", "freeze and save s", "cp synced s", "freeze / cp synced", "Mweights/s", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class FreezeCost:
    """One freeze."""

    seconds: float
    peak: int
    """Largest resident size above that before the call."""
    nbytes: int
    """Bytes of all files."""


def freeze_repeatedly(name: str, out: Path, repetitions: int) -> tuple[list[FreezeCost], list[float]]:
    """Make the model once, then freeze and copy in turns; the folder of the last freeze stays.

    Returns:
        The freezes, and the seconds of `cp` and fsync after each.
    """
    from l4q.model import save_l4q, wrap_linears
    from tools.measure import peak_resident_bytes, reset_peak

    quant = QuantConfig(bits=BITS, group_size=GROUP, zero_point="integer")
    model = random_model(MODELS[name])
    wrap_linears(model, quant, LoraConfig(rank=RANK), init="symm")
    costs, copies = [], []
    for _ in range(repetitions):
        before = reset_peak("cpu")
        began = time.perf_counter()
        save_l4q(model, out, quant=quant, overwrite=True)
        seconds = time.perf_counter() - began
        costs.append(FreezeCost(seconds=seconds, peak=peak_resident_bytes() - before, nbytes=folder_bytes(out)))
        copies.append(copy_once(out, out.with_name("copy"))[1])
    return costs, copies


def random_model(shape: BenchModel) -> Any:
    """A transformers model in 16 bits, without the initialisation that would take longer than what is measured."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in shape.config.items() if key not in ("architectures", "model_type")}
    config = AutoConfig.for_model("llama", **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.to_empty(device="cpu")
    model.tie_weights()
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(DENSE_STD)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(POOL):
                part.copy_(pool[: part.numel()])
    return model


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", "name", type=click.Choice(list(MODELS)), default="smollm2", help="Whose shapes.")
@click.option("--repetitions", type=click.IntRange(1), default=3, help="Freezes, in turns with cp.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path("build"), help="Disk.")
def command(name: str, repetitions: int, scratch: Path) -> None:
    """Measure freezing and saving a random model against `cp` of what it writes."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-freeze-", dir=scratch))
    try:
        with Worker() as worker:
            worker.ask(freeze_repeatedly, "tiny", folder / "warm", 1)
            costs, copies = worker.ask(freeze_repeatedly, name, folder / "checkpoint", repetitions)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = [cost.seconds for cost in costs]
    ratio = statistics.median(seconds) / statistics.median(copies)
    peak = max(cost.peak for cost in costs) / MIB
    speed = MODELS[name].linear_weights / 1e6 / statistics.median(seconds)
    cells = [name, f"{costs[0].nbytes / 1e6:,.1f}", spread(seconds), spread(copies), f"{ratio:.2f}"]
    click.echo(f"{machine()}, {repetitions} repetitions in turns: median [least, greatest]\n")
    click.echo("\n".join([*table_head(COLUMNS), table_row([*cells, f"{speed:.0f}", f"{peak:.0f}"])]))
    click.echo(
        json.dumps({"wall_vs_cp": round(ratio, 3), "peak_mib": round(peak, 1), "mweights_per_s": round(speed, 1)})
    )


if __name__ == "__main__":
    run(command)
