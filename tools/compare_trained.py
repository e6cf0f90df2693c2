"""Quality per bit after fine-tuning: python -m tools.compare_trained [--steps 20].

One 16-bit model is fine-tuned with LoRA, merged, and quantized by llama.cpp's own quantizer to every block type: the
usual way to a GGUF file. Beside it, L4Q trains on each of its grids with the same data, order, steps, rank
and learning rate. Every row is what a GGUF file holds, decoded by gguf-py, with its perplexity in torch, so that no
runtime's rounding of activations is in it. Training follows tools.reproduce's recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from exporters.gguf.encode import Subject, choose_encoding, encode
from l4q.calibrate import input_moments
from l4q.cli_common import run
from l4q.config import QuantConfig
from l4q.evaluate import windows_perplexity
from l4q.model import freeze_model, wrap_linears
from l4q.trainer import parameter_groups
from tools.compare_grids import Stored, decode, grid_config, llama_cpp
from tools.reproduction.adapters import add_deltas_, add_lora, deltas, trainable
from tools.reproduction.bench import Workbench
from tools.reproduction.data import load_tokens
from tools.reproduction.recipe import MODELS, Cell
from tools.rotate import rotate_residual

ASSETS = Path("build/assets")
CACHE = Path("build/reproduce")
TEXT = "wiki_demo"
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q3_K")
GRIDS: Mapping[str, QuantConfig] = {
    "fp16 none": grid_config(4, "none", "fp16"),
    "q4_k float": grid_config(4, "float", "q4_k"),
    "q3_k none": grid_config(3, "none", "q3_k"),
    "fp16_s7 integer": grid_config(4, "integer", "fp16_s7"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file."""

    model: str
    blocks: str
    """Block types of the file and how many linears have each."""
    bits: float | None
    """Bits per quantized weight, as stored."""
    perplexity: float


class Study:
    """The shared model, data and settings.

    Args:
        name: A model of tools.reproduce.
        steps: Optimizer steps of every training.
        windows: Held-out windows of 512 tokens.
        rotate: Take the weights off the grid they were published on, see `tools.rotate`.
    """

    def __init__(self, name: str, steps: int, windows: int, *, rotate: bool) -> None:
        recipe = replace(MODELS[name], steps=steps)
        if recipe.reconstruct_settle:  # its rates and calibration are a settled start's, and L4Q starts calibrated here
            recipe = replace(recipe, calibration=16, scale_lr=None, offset_lr=None)
        (CACHE / name).mkdir(parents=True, exist_ok=True)
        tokens = load_tokens(recipe, ASSETS, CACHE / name)
        cell = Cell(method="lora", bits=None, seed=0)
        self.bench = Workbench(cell, recipe, tokens, (4,), ASSETS, "")
        self._windows = tokens.held_out[TEXT][:windows].tolist()
        self._rotate = rotate

    def load(self) -> Any:
        """The 16-bit model, as every training starts."""
        model = self.bench.load()
        if self._rotate:
            rotate_residual(model)
        return model

    def perplexity(self, model: Any) -> float:
        """On the held-out windows."""
        return windows_perplexity(model.eval(), self._windows).value

    def llama_cpp_rows(self) -> Iterable[Row]:
        """Fine-tune in 16 bits, then let llama.cpp quantize."""
        yield Row(model="16-bit, not tuned", blocks="", bits=None, perplexity=self.perplexity(self.load()))
        model = self.load()
        tuned = add_lora(self.bench, model, self.bench.targets(model))
        self.bench.train(tuned, trainable(tuned))
        changes = deltas(tuned)
        merged = add_deltas_(self.bench, self.load(), changes)
        yield Row(model="16-bit LoRA, merged", blocks="", bits=None, perplexity=self.perplexity(merged))
        weights = {name: layer.weight.detach().clone() for name, layer in self.bench.targets(merged).items()}
        for block in BLOCKS:
            quantize = llama_cpp(block)
            yield self._stored(
                "16-bit LoRA, merged, llama.cpp's quantizer", {n: quantize(w) for n, w in weights.items()}
            )

    def l4q_row(self, name: str, quant: QuantConfig) -> Row:
        """Train L4Q on one grid; its file holds the trained integers."""
        model = self.load()
        sequences = [ids for batch in self.bench.calibration for ids in batch.tolist()]
        moments = input_moments(model, self.bench.targets(model), sequences)
        # Layers that a K grid does not fill take its fallback, as llama.cpp's do, and are not left dense.
        dense = quant.k_grid is None
        wrap_linears(model, quant, self.bench.lora, init="calibrated", moments=moments, skip_indivisible=dense)
        self.bench.train(model, parameter_groups(model, self.bench.optim))
        stored: dict[str, Stored] = {}
        for module, weight in freeze_model(model):
            kind = choose_encoding(Subject.of(weight), "auto").name
            stored[module] = (kind, encode(weight, kind))
        return self._stored(f"L4Q {name}", stored)

    @torch.no_grad()
    def _stored(self, label: str, stored: Mapping[str, Stored]) -> Row:
        model = self.load()
        for name, blocks in stored.items():
            model.get_submodule(name).weight.copy_(torch.from_numpy(decode(blocks)))
        kinds = [kind for kind, _ in stored.values()]
        size = sum(data.nbytes for _, data in stored.values())
        weights = sum(model.get_submodule(name).weight.numel() for name in stored)
        used = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return Row(model=label, blocks=used, bits=8 * size / weights, perplexity=self.perplexity(model))


def format_row(row: Row) -> str:
    """One line of the Markdown table."""
    return f"| {row.model} | {row.blocks} | {'' if row.bits is None else f'{row.bits:.3f}'} | {row.perplexity:.3f} |"


@click.command(name="compare_trained", context_settings={"show_default": True})
@click.option("--model", type=click.Choice(list(MODELS)), default="smollm2", help="Model under build/assets.")
@click.option("--steps", default=20, type=click.IntRange(min=1), help="Optimizer steps of 1,024 tokens per training.")
@click.option("--windows", default=6, type=click.IntRange(1, 12), help="Held-out windows of 512 tokens.")
@click.option("--rotate/--no-rotate", default=True, help="Take the weights off the grid they were published on.")
@click.option("--grids", default=",".join(GRIDS), help="Comma-separated L4Q grids.")
@click.option("--baseline/--no-baseline", default=True, help="Whether to fine-tune in 16 bits and quantize that.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, steps: int, windows: int, rotate: bool, grids: str, baseline: bool, as_json: bool) -> None:
    """Fine-tune both ways and print a table."""
    chosen = grids.split(",")
    if unknown := set(chosen) - set(GRIDS):
        raise click.BadParameter(f"{sorted(unknown)}; choose from {list(GRIDS)}", param_hint="--grids")
    study, rows = Study(model, steps, windows, rotate=rotate), []
    click.echo("| model | blocks | bits/weight | perplexity |\n|---|---|---|---|", err=as_json)
    for row in study.llama_cpp_rows() if baseline else ():
        rows.append(row)
        click.echo(format_row(row), err=as_json)
    for name in chosen:
        rows.append(study.l4q_row(name, GRIDS[name]))
        click.echo(format_row(rows[-1]), err=as_json)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    run(command)
