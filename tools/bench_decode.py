"""Speed in the runtimes: python -m tools.bench_decode [--model smollm2|llama-1b] [--runtime NAME] [--quick].

Prefill and batch-1 decode tokens/s of our exports, of the best the runtime's own tools make from the same 16-bit model,
and of that 16-bit model. "own" builds have as many bits per weight as ours, the output head's included; "other" rows
are further builds: what the tools make by default, and our exports with other options. Every build has a worker process
of its own; all of a runtime are loaded at once and take turns, medians over the repetitions are reported, and of every
row the least and the greatest. The last line of stdout is one JSON object, per runtime {"decode_vs_own_4bit",
"decode_vs_16bit"}: medians of ours over the fastest of the others. A runtime with several pairs (GPTQ, AWQ) reports the
worst pair.

- llama.cpp: own is Q4_0 by its quantizer, with the same Q8_0 embeddings and head; also its Q4_K_M.
- ONNX Runtime: own is onnxruntime-genai's int4 build, blocks of the same size and the same float32 head, at accuracy
  level 4 like ours, which is the graph of --onnx-runtime-optimized; the 16-bit side is its float32 build, because the
  CPU provider has no 16-bit kernels. All run in onnxruntime-genai.
- vLLM: own is GPTQModel's packing of the same integers; the 16-bit model runs in float16 and in bfloat16.

SmolLM2 is the real one rounded to nearest; the others have random codes, which take the same time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from l4q.cli_common import run
from l4q.errors import VerificationError
from runtime_tests.engines.host import RemoteEngine
from tools import bench_decode_builds as builds
from tools.bench_export_jobs import Worker
from tools.bench_export_models import MODELS, write_random
from tools.bench_export_report import machine, spread, table_head, table_row

GENAI = str(Path(__file__).with_name("bench_decode_genai.py").resolve())
BUILD = Path("build")
COLUMNS = ("runtime", "build", "role", "MB", "prefill tok/s", "decode tok/s", "ours / this, decode", "prefill")
LEVEL_4 = ("block_size=64", "accuracy_level=4")
KEEP_HEAD = "nodes_to_exclude=/lm_head/MatMul"
REAL = "smollm2"

Role = Literal["ours", "own", "16-bit", "other"]


@dataclass(frozen=True, kw_only=True)
class Build:
    """One model in one runtime."""

    name: str
    role: Role
    make: Callable[[Path, Path, Path], None]
    """(checkpoint, 16-bit folder, folder to create)."""
    pair: str = ""
    """ours and own with the same pair are compared."""
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Speeds:
    """Tokens per second of one build, one entry per repetition."""

    build: str
    role: Role
    pair: str
    nbytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def _llama(name: str, role: Role, make: Callable[[Path, Path, Path], None]) -> Build:
    return Build(name=name, role=role, make=make, engine="llamacpp")


def _genai(name: str, role: Role, make: Callable[[Path, Path, Path], None]) -> Build:
    return Build(name=name, role=role, make=make, engine=GENAI)


def _vllm(name: str, role: Role, make: Callable[[Path, Path, Path], None], pair: str, dtype: str = "float16") -> Build:
    return Build(name=name, role=role, make=make, pair=pair, engine="vllm", options={"dtype": dtype})


RUNTIMES: Mapping[str, tuple[Build, ...]] = {
    "llama.cpp": (
        _llama("l4q Q4_0, head q8_0", "ours", builds.ours("gguf", gguf_embeddings="q8_0")),
        _llama("Q4_0, head q8_0", "own", builds.gguf_by_llama_cpp(builds.gguf_q4_0)),
        _llama("F16", "16-bit", builds.gguf_by_llama_cpp(builds.gguf_f16)),
        _llama("l4q Q4_0, head as stored", "other", builds.ours("gguf")),
        _llama("Q4_K_M", "other", builds.gguf_by_llama_cpp(builds.gguf_q4_k_m)),
    ),
    "onnxruntime": (
        _genai("l4q, level 4", "ours", builds.ours("onnx", onnx_accuracy_level=4, onnx_runtime_optimized=True)),
        _genai("int4 build, head float32", "own", builds.by_genai_builder("int4", *LEVEL_4, KEEP_HEAD)),
        _genai("fp32 build", "16-bit", builds.by_genai_builder("fp32")),
        _genai("l4q, level 4, standard graph", "other", builds.ours("onnx", onnx_accuracy_level=4)),
        _genai("l4q, level 0", "other", builds.ours("onnx", onnx_runtime_optimized=True)),
        _genai("int4 build, head int4", "other", builds.by_genai_builder("int4", *LEVEL_4)),
    ),
    "vllm": (
        _vllm("l4q GPTQ", "ours", builds.ours("gptq"), "gptq"),
        _vllm("GPTQModel GPTQ", "own", builds.by_gptqmodel("gptq", BUILD), "gptq"),
        _vllm("l4q AWQ", "ours", builds.ours("awq"), "awq"),
        _vllm("GPTQModel AWQ", "own", builds.by_gptqmodel("awq", BUILD), "awq"),
        _vllm("float16", "16-bit", builds.half_precision, ""),
        _vllm("bfloat16", "16-bit", builds.half_precision, "", "bfloat16"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How it is measured."""

    prompt: list[int]
    new_tokens: int
    repetitions: int
    threads: int


def measure(folders: Sequence[tuple[Build, Path]], plan: Plan, progress: Callable[[str], None]) -> list[Speeds]:
    """Load all builds of one runtime, then let them take turns; one untimed turn first."""
    found = [Speeds(build=build.name, role=build.role, pair=build.pair, nbytes=_bytes(path)) for build, path in folders]
    with ExitStack() as stack:
        engines = []
        for build, path in folders:
            engines.append(stack.enter_context(_load(build, path, plan.threads)))
            progress(f"{build.name}: loaded")
        for repetition in range(plan.repetitions + 1):
            for engine, speeds in zip(engines, found, strict=True):
                prefill, decode = once(engine, plan)
                if repetition:
                    speeds.prefill.append(prefill)
                    speeds.decode.append(decode)
                progress(speeds.build)
    return found


def once(engine: RemoteEngine, plan: Plan) -> tuple[float, float]:
    """Prompt tokens and new tokens per second.

    Raises:
        VerificationError: The model stopped at once, so that there is nothing to time.
    """
    began = time.perf_counter()
    engine.generate(plan.prompt, 1)
    prefill = len(plan.prompt) / (time.perf_counter() - began)
    new, seconds = engine.generate(plan.prompt, plan.new_tokens)
    if len(new) < 2:
        raise VerificationError("the model stopped at once", where=engine.engine, got=new, remedy="take another prompt")
    return prefill, (len(new) - 1) / seconds


def _load(build: Build, path: Path, threads: int) -> RemoteEngine:
    options = dict(build.options)
    if build.engine == GENAI:
        options["intra_op_threads"] = threads
    elif build.engine == "llamacpp":
        options |= {"n_threads": threads, "n_ctx": 1024}
    return RemoteEngine(build.engine, path, threads=threads, timeout_s=1800, **options)


def _bytes(folder: Path) -> int:
    weights = (".safetensors", ".gguf", ".onnx", ".data")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in weights)


def summary(found: Sequence[Speeds]) -> dict[str, float]:
    """One runtime's entry of the last line."""
    halves = max(statistics.median(speeds.decode) for speeds in found if speeds.role == "16-bit")
    own, half = [], []
    for ours in (speeds for speeds in found if speeds.role == "ours"):
        speed = statistics.median(ours.decode)
        rivals = [s for s in found if s.role == "own" and s.pair == ours.pair]
        own.append(speed / max(statistics.median(rival.decode) for rival in rivals))
        half.append(speed / halves)
    return {"decode_vs_own_4bit": round(min(own), 3), "decode_vs_16bit": round(min(half), 3)}


def table(runtime: str, found: Sequence[Speeds]) -> list[str]:
    """One runtime's lines of Markdown; ratios against the first of ours, or ours of the same pair."""
    lines = []
    for speeds in found:
        ours = [other for other in found if other.role == "ours"]
        base = next((other for other in ours if other.pair == speeds.pair), ours[0])
        ratios = [
            f"{statistics.median(getattr(base, what)) / statistics.median(getattr(speeds, what)):.2f}"
            for what in ("decode", "prefill")
        ]
        cells = [runtime, speeds.build, speeds.role, f"{speeds.nbytes / 1e6:,.1f}"]
        lines.append(table_row([*cells, spread(speeds.prefill), spread(speeds.decode), *ratios]))
    return lines


@contextmanager
def _sources(name: str, scratch: Path, assets: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A temporary folder, the checkpoint and the 16-bit model."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-decode-", dir=scratch))
    checkpoint, half = folder / "checkpoint", folder / "half"
    try:
        with Worker() as worker:
            if name == REAL:
                worker.ask(builds.round_to_nearest, assets / REAL, checkpoint)
            else:
                worker.ask(write_random, MODELS[name], checkpoint, assets / REAL)
            worker.ask(builds.write_half, checkpoint, half)
        yield folder, checkpoint, half
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--model", "name", type=click.Choice(list(MODELS)), default=REAL, help="Whose shapes.")
@click.option("--quick", is_flag=True, help="llama.cpp and ONNX Runtime only, few tokens.")
@click.option("--runtime", "runtimes", multiple=True, type=click.Choice(list(RUNTIMES)), help="Repeatable.")
@click.option("--prompt", type=click.IntRange(1, 512), help="Tokens of the prompt.  [default: 128, with --quick 32]")
@click.option("--new", type=click.IntRange(2, 512), help="Tokens to generate.  [default: 64, with --quick 16]")
@click.option(
    "--repetitions", type=click.IntRange(1), default=3, help="Of every build, in turns, after an untimed one."
)
@click.option("--threads", type=click.IntRange(1), default=2, help="Of every runtime.")
@click.option("--assets", type=click.Path(path_type=Path), default=BUILD / "assets", help="Folder with smollm2.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="For the models.")
@click.option("--report", "target", type=click.Path(path_type=Path), help="Write all figures to this JSON file.")
def command(name: str, quick: bool, runtimes: tuple[str, ...], **options: Any) -> None:
    """Compare the speed of our exports with that of the runtimes' own 4-bit builds and with 16 bits."""
    chosen = tuple(dict.fromkeys(runtimes)) or (("llama.cpp", "onnxruntime") if quick else tuple(RUNTIMES))
    vocab = MODELS[name].vocab
    plan = Plan(
        # Spread over the vocabulary and free of special tokens.
        prompt=[100 + 7 * index % (vocab - 200) for index in range(options["prompt"] or (32 if quick else 128))],
        new_tokens=options["new"] or (16 if quick else 64),
        repetitions=options["repetitions"],
        threads=options["threads"],
    )
    found: dict[str, list[Speeds]] = {}
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        row = bars.add_task("model", total=sum(len(RUNTIMES[r]) * (plan.repetitions + 3) for r in chosen))

        def advance(text: str) -> None:
            bars.update(row, advance=1, description=text)

        with _sources(name, options["scratch"], options["assets"]) as (folder, checkpoint, half):
            for runtime in chosen:
                found[runtime] = _runtime(runtime, (folder / runtime, checkpoint, half), plan, advance)
    settings = (
        f"prompt {len(plan.prompt)}, {plan.new_tokens} new, {plan.threads} threads, {plan.repetitions} repetitions"
    )
    click.echo(f"{name}, {machine()}; {settings} in turns: median [least, greatest]\n")
    click.echo("\n".join([*table_head(COLUMNS), *(line for r, speeds in found.items() for line in table(r, speeds))]))
    if options["target"]:
        details = {runtime: [asdict(entry) for entry in speeds] for runtime, speeds in found.items()}
        values = {"model": name, "machine": machine(), "settings": settings, "runtimes": details}
        options["target"].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({runtime: summary(speeds) for runtime, speeds in found.items()}))


def _runtime(runtime: str, paths: tuple[Path, Path, Path], plan: Plan, progress: Callable[[str], None]) -> list[Speeds]:
    """Make a runtime's builds, measure them and remove them."""
    folder, checkpoint, half = paths
    folder.mkdir()
    folders = []
    for number, build in enumerate(RUNTIMES[runtime]):
        folders.append((build, folder / str(number)))
        build.make(checkpoint, half, folders[-1][1])
        progress(f"{build.name}: made")
    found = measure(folders, plan, progress)
    shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    run(command)
