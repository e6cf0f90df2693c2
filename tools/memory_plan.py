"""The plan of `tools.memory_formula` as tables: llama models of 7B to 70B on 1 to 8 GPUs.

`python -m tools.memory_plan` prints it; `--config config.json` takes any llama-like model; `--write docs/scaling.md`
renews the tables of that document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from l4q.errors import UsageError
from tools.memory_formula import (
    A100_FLOPS,
    LINKS,
    MODELS,
    SAVED_PER_GROUP,
    STATE_BYTES,
    ModelShape,
    Setting,
    flops,
    host_memory,
    memory,
    traffic,
)

START, END = "<!-- tables: python -m tools.memory_plan --write docs/scaling.md -->", "<!-- end of tables -->"
CARDS = (24, 40, 80, 141)


def tables(models: dict[str, ModelShape], setting: Setting, counts: tuple[int, ...]) -> Iterator[str]:
    """Markdown lines of the whole plan."""
    for name, model in models.items():
        yield f"### {name}: {(model.layers * model.block_weights + model.outside) / 1e9:.1f}e9 weights\n"
        yield f"| GB per GPU | {' | '.join(f'{count} GPU' for count in counts)} |"
        yield "|---|" + "---:|" * len(counts)
        for label, change in VARIANTS.items():
            cells = [_cell(model, replace(setting, gpus=count, **change)) for count in counts]  # type: ignore[arg-type]
            yield f"| {label} | {' | '.join(cells)} |"
        yield ""
    yield from _parts(models, replace(setting, mode="fsdp", gpus=max(counts), checkpointing=True))
    yield from _costs(models, replace(setting, mode="fsdp", gpus=max(counts), checkpointing=True))


VARIANTS: dict[str, dict[str, object]] = {
    "DDP": {},
    "DDP, checkpointing": {"checkpointing": True},
    "DDP, checkpointing, int4 base": {"checkpointing": True, "base": "int4"},
    "FSDP2": {"mode": "fsdp"},
    "FSDP2, checkpointing": {"mode": "fsdp", "checkpointing": True},
    "FSDP2, checkpointing, int4 base": {"mode": "fsdp", "checkpointing": True, "base": "int4"},
}


def _cell(model: ModelShape, setting: Setting) -> str:
    if setting.mode == "fsdp" and setting.gpus == 1:
        return ""
    size = memory(model, setting).total / 1e9
    card = next((card for card in CARDS if size <= card), None)
    return f"{size:.1f} ({card})" if card else f"{size:.1f} (–)"


def _parts(models: dict[str, ModelShape], setting: Setting) -> Iterator[str]:
    yield f"### What it is made of: FSDP2 on {setting.gpus} GPUs with checkpointing, GB\n"
    yield "| model | frozen | trainable | activations | gathered | transient | context | sum |"
    yield "|---|" + "---:|" * 7
    for name, model in models.items():
        m = memory(model, setting)
        parts = (m.frozen, m.trainable, m.activations, m.gathered, m.transient, m.context, m.total)
        yield f"| {name} | {' | '.join(f'{part / 1e9:.2f}' for part in parts)} |"
    yield ""


def _costs(models: dict[str, ModelShape], setting: Setting) -> Iterator[str]:
    yield f"### What a pass over {setting.tokens} tokens per GPU costs, FSDP2 on {setting.gpus} GPUs, checkpointing\n"
    yield f"| model | TFLOP | s at A100 peak | GB received | {' | '.join(f's, {name}' for name in LINKS)} | host GB |"
    yield "|---|" + "---:|" * (4 + len(LINKS))
    for name, model in models.items():
        work, received = flops(model, setting) * setting.tokens, traffic(model, setting)
        seconds = " | ".join(f"{received / speed:.2f}" for speed in LINKS.values())
        host = f"{host_memory(model, setting) / 1e9:.0f}"
        yield f"| {name} | {work / 1e12:.0f} | {work / A100_FLOPS:.2f} | {received / 1e9:.1f} | {seconds} | {host} |"


@click.command(name="memory-plan", context_settings={"show_default": True})
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="config.json instead of 7B to 70B.")
@click.option("--gpus", type=int, multiple=True, default=(1, 2, 4, 8), help="Numbers of GPUs; repeatable.")
@click.option("--tokens", type=int, default=2048, help="Tokens per GPU and forward pass.")
@click.option("--group-size", type=int, default=64, help="Columns that share a scale.")
@click.option("--rank", type=int, default=8, help="LoRA rank.")
@click.option("--zero-point", type=click.Choice(list(SAVED_PER_GROUP)), default="none", help="Kind of zero-point.")
@click.option(
    "--optim-state", "state", type=click.Choice(list(STATE_BYTES)), default="float32", help="AdamW's moments."
)
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), help="Document whose tables are renewed.")
def command(config: Path | None, gpus: tuple[int, ...], write: Path | None, **values: object) -> None:
    """Print the plan as Markdown."""
    models = {config.parent.name or "model": ModelShape.from_config(config)} if config else MODELS
    setting = Setting(**values)  # type: ignore[arg-type]
    text = "\n".join(tables(models, setting, gpus))
    if write is None:
        click.echo(text)
        return
    before, start, rest = write.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UsageError("the document has no place for the tables", where=write, expected=f"{START} and {END}")
    write.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    from l4q.cli_common import run

    run(command)
