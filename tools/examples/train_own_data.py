"""Fine-tune a model on your own texts with L4Q and export it for llama.cpp, from Python.

python -m tools.examples.train_own_data MODEL my_data.jsonl held_out.txt OUT

MODEL is a Hugging Face id or folder; docs/own_data.md says what data may look like. OUT gets the run and the export.
"""

from __future__ import annotations

from pathlib import Path

import click

from exporters import export
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.train import train
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command(name="train_own_data")
@click.argument("model")
@click.argument("data", type=FILE)
@click.argument("held_out", type=FILE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=40, show_default=True, help="Optimizer steps.")
@click.option("--max-length", default=512, show_default=True, help="Tokens per sequence.")
def command(model: str, data: Path, held_out: Path, out: Path, steps: int, max_length: int) -> None:
    """Fine-tune MODEL on DATA, measure on HELD_OUT, and export to OUT/gguf."""
    result = train(
        TrainOptions(
            model=model,
            data=(data,),
            out=out / "run",
            quant=QuantConfig(bits=4, group_size=64),  # symmetric: what every runtime takes
            lora=LoraConfig(rank=8),
            optim=OptimOptions(lr=1e-3),
            leave_dense=True,  # layers that groups of 64 do not divide
            steps=steps,
            max_length=max_length,
            evaluation=EvalOptions(text=held_out, window=max_length, windows=4),
        )
    )
    for stage, value in result["perplexity"].items():  # base: 16 bits; start: rounded, untrained; trained: L4Q
        click.echo(f"perplexity, {stage:8} {value:.2f}")

    checkpoint = L4QCheckpoint.open(result["checkpoint"])
    done = export(checkpoint, "gguf", out / "gguf")
    exact = done.verified is not None and done.verified.passed
    click.echo(f"{done.folder}: {len(checkpoint.modules)} quantized layers, bit-exact: {exact}")


if __name__ == "__main__":
    command()
