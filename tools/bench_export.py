"""Cost of an export: python -m tools.bench_export [--model smollm2|llama-1b|llama-7b] [--quick].

An L4Q checkpoint of the model's exact shapes with random codes is exported to every format. Per format: MB/s of output,
wall time against `cp -r` and fsync of the same folder on the same disk, peak memory above interpreter and imports, and
how much longer other people's code takes for the same linears. Everything takes turns within one run, and medians over
the repetitions are reported. The last line of stdout is one JSON object, per format {"wall_vs_cp", "peak_mib",
"speedup_vs": {peer: ratio}}.

How it is measured. Each format and each peer has a process that first exports a tiny model, so that imports and
compiled code are there. Equals are compared: an export ends when every file and folder is on the disk, so wall_vs_cp
divides its wall time by that of `cp -r` and the fsync of every copied file; `cp` alone, whose bytes may still be in the
page cache when it ends, has a column of its own. What an export and what `cp` are going to read is read once before the
clock starts, so that both find it in the page cache: exports write large files past it. peak_mib is the rise of the
largest resident size (VmHWM), pages of mapped files included; "private" leaves those out. Both are of exports without
the final verification, which is reported beside them. Peers start from float weights in memory and write the linears of
the first --peer-layers layers only; their time is scaled by the number of weights, and the time of ours, which reads,
packs and writes the whole folder with its embeddings, is not reduced.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from exporters.driver import EXPORTERS
from l4q.cli_common import run
from tools.bench_export_jobs import Worker, copy_once, export_once, peer_once
from tools.bench_export_models import MODELS, BenchModel, write_random
from tools.bench_export_peers import PEERS, Peer
from tools.bench_export_report import FormatCosts, export_table, machine, peer_table, summary

FORMATS = tuple(EXPORTERS)
WARM_UP = "tiny"
PEER_LAYERS = {"tiny": 2, "smollm2": 30, "llama-1b": 4, "llama-7b": 2}
QUICK_PEER_LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: BenchModel
    checkpoint: Path
    warm_up: Path
    scratch: Path
    formats: tuple[str, ...]
    peers: tuple[Peer, ...]
    build: Path
    peer_layers: int
    repetitions: int
    verify: bool


def measure(settings: Settings, progress: Callable[[str], None]) -> dict[str, FormatCosts]:
    """Every format, its copy and its peers, `repetitions` times in turns."""
    costs = {name: FormatCosts() for name in settings.formats}
    with ExitStack() as stack:
        exporters = {name: stack.enter_context(Worker()) for name in settings.formats}
        places = {(peer.folder, peer.environment) for peer in settings.peers}
        workers = {place: stack.enter_context(_peer_worker(*place, settings.build)) for place in places}
        peers = [(peer, workers[peer.folder, peer.environment]) for peer in settings.peers]
        for name, worker in exporters.items():
            worker.ask(export_once, settings.warm_up, name, settings.scratch / "warm", check=settings.verify)
            progress(f"{name}: imports")
        for peer, worker in peers:
            if peer.warm:
                worker.ask(peer_once, peer, settings.warm_up, 1, settings.scratch / "peer")
            progress(f"{peer.name}: imports")
        for _ in range(settings.repetitions):
            for name, worker in exporters.items():
                _one_round(settings, name, worker, costs[name])
                progress(name)
            for peer, worker in peers:
                _one_peer(settings, peer, worker, costs[peer.format])
                progress(f"{peer.format}, {peer.name}")
    return costs


def steps(settings: Settings) -> int:
    """How often `measure` reports progress."""
    return (settings.repetitions + 1) * (len(settings.formats) + len(settings.peers))


def _one_round(settings: Settings, name: str, worker: Worker, costs: FormatCosts) -> None:
    out = settings.scratch / name
    costs.exports.append(worker.ask(export_once, settings.checkpoint, name, out, check=False))
    costs.copies.append(worker.ask(copy_once, out, settings.scratch / "copy"))
    if settings.verify:
        costs.verified.append(worker.ask(export_once, settings.checkpoint, name, out, check=True))
    shutil.rmtree(out)


def _one_peer(settings: Settings, peer: Peer, worker: Worker, costs: FormatCosts) -> None:
    if peer.name in costs.failed:
        return
    try:
        cost = worker.ask(peer_once, peer, settings.checkpoint, settings.peer_layers, settings.scratch / "peer")
    except Exception as error:  # other people's code cannot do everything; the benchmark says so and goes on
        costs.failed[peer.name] = f"{type(error).__name__}: {error}"
    else:
        costs.peers.setdefault(peer.name, []).append(cost)


def _peer_worker(folder: str | None, environment: tuple[tuple[str, str], ...], build: Path) -> Worker:
    return Worker(None if folder is None else build / folder, environment)


def available_peers(formats: tuple[str, ...], build: Path, *, quick: bool) -> tuple[list[Peer], list[Peer]]:
    """Peers of these formats whose packages are there, and those whose packages are not."""
    wanted = [peer for peer in PEERS if peer.format in formats and (peer.quick or not quick)]
    missing = [peer for peer in wanted if peer.folder is not None and not (build / peer.folder).is_dir()]
    return [peer for peer in wanted if peer not in missing], missing


@contextmanager
def _checkpoints(name: str, scratch: Path, assets: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A temporary folder on the disk that is measured, with the model's checkpoint and a tiny one."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-export-", dir=scratch))
    try:
        for wanted in {name, WARM_UP}:
            write_random(MODELS[wanted], folder / f"checkpoint-{wanted}", assets / "smollm2")
        yield folder, folder / f"checkpoint-{name}", folder / f"checkpoint-{WARM_UP}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", "name", type=click.Choice(list(MODELS)), default="smollm2", help="Whose shapes.")
@click.option("--quick", is_flag=True, help="Fewer layers for the peers and no verification: under a minute.")
@click.option("--to", "formats", multiple=True, type=click.Choice(FORMATS), help="Only this format; repeatable.")
@click.option("--repetitions", type=click.IntRange(1), default=3, help="Of everything, in turns.")
@click.option("--peers/--no-peers", "with_peers", default=True, help="Whether to time other people's code.")
@click.option("--peer-layers", type=click.IntRange(1), help="Layers the peers write.  [default: the model's]")
@click.option("--verify/--no-verify", default=None, help="Also time verified exports.  [default: unless --quick]")
@click.option(
    "--assets", type=click.Path(path_type=Path), default=Path("build/assets"), help="Has smollm2's tokenizer."
)
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path("build"), help="On the disk to measure."
)
@click.option("--report", "target", type=click.Path(path_type=Path), help="Write all figures to this JSON file.")
def command(name: str, quick: bool, formats: tuple[str, ...], with_peers: bool, **options: Any) -> None:
    """Measure exports of a random model against `cp` and against other people's code."""
    chosen = tuple(dict.fromkeys(formats)) or FORMATS
    build, model = Path("build"), MODELS[name]
    peers, missing = available_peers(chosen, build, quick=quick) if with_peers else ([], [])
    for peer in missing:
        click.echo(f"{peer.name} ({peer.format}) is not installed: make judges; python -m tools.fetch_peers", err=True)
    layers = options["peer_layers"] or (QUICK_PEER_LAYERS if quick else PEER_LAYERS[name])
    with _checkpoints(name, options["scratch"], options["assets"]) as (folder, checkpoint, warm_up):
        settings = Settings(
            model=model,
            checkpoint=checkpoint,
            warm_up=warm_up,
            scratch=folder,
            formats=chosen,
            peers=tuple(peers),
            build=build,
            peer_layers=min(layers, model.layers),
            repetitions=options["repetitions"],
            verify=not quick if options["verify"] is None else options["verify"],
        )
        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            row = bars.add_task("starting", total=steps(settings))
            costs = measure(settings, lambda text: bars.update(row, advance=1, description=text))
    click.echo(f"{name}, {machine()}, {settings.repetitions} repetitions in turns\n")
    click.echo("\n".join(export_table(costs)))
    if peers:
        click.echo(f"\nThe same linears, measured on {settings.peer_layers} of {model.layers} layers:\n")
        click.echo("\n".join(peer_table(costs, model)))
    for label, found in costs.items():
        for peer_name, reason in found.failed.items():
            click.echo(f"{peer_name} ({label}) failed: {reason}")
    summaries = {label: summary(found, model) for label, found in costs.items()}
    if options["target"]:
        details = {label: {**asdict(found), **summaries[label]} for label, found in costs.items()}
        values = {"model": name, "machine": machine(), "peer_layers": settings.peer_layers, "formats": details}
        options["target"].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(summaries))


if __name__ == "__main__":
    run(command)
