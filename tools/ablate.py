"""The choices behind l4q-train's defaults, one changed at a time: python -m tools.ablate [--model smollm2].

Every variant is L4Q on the model, data, steps and seeds of the comparison (tools/reproduction) with one choice changed:
zero-point, scale grid, initialisation, distillation, learning rate of s or of b. Each is measured as deployed, before
training (what its start is worth; --untrained stops there) and after it. One JSON file per variant and seed goes into
--out and is not measured again. The last line of stdout is one JSON object: {axis: {choice: mean perplexity}}.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import transformers
from rich.console import Console
from rich.progress import track

from l4q.cli_common import run
from l4q.config import Init, QuantConfig
from l4q.errors import UsageError
from l4q.model import freeze_model
from l4q.trainer import parameter_groups
from tools.reproduction.bench import Workbench
from tools.reproduction.data import HELD_OUT, load_tokens
from tools.reproduction.l4q_rows import wrap
from tools.reproduction.recipe import MODELS, Cell, Recipe

AXES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "zero-point": ("zero_point", ("none", "integer", "float")),
    "scale grid": ("scale_grid", ("fp16_s7", "fp16")),
    "initialisation": ("init", ("l4q", "lsq+", "symm", "asymm", "calibrated", "reconstructed")),
    "share of distillation in the loss": ("distill", (0.0, 0.5, 1.0)),
    "learning rate of s / that of A, B": ("scale_share", (0.0, 0.01, 0.05, 0.25, 1.0)),
    "learning rate of b / that of A, B": ("offset_share", (0.0, 0.01, 0.05, 0.25, 1.0)),
}
"""Table heading -> field of `Variant` and the values tried."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One L4Q run; the defaults are the point that every axis leaves from."""

    bits: int
    zero_point: str = "integer"
    scale_grid: str = "fp16_s7"
    init: Init = "calibrated"
    distill: float = 0.0
    scale_share: float = 0.05
    """Learning rate of s over that of A and B."""
    offset_share: float = 0.05
    """Learning rate of b over that of A and B."""

    def changed(self, field: str, value: Any) -> Variant:
        """This point with one choice changed; each zero-point comes with its own default grid of scales."""
        moved = replace(self, **{field: value})
        if field == "zero_point":
            moved = replace(moved, scale_grid="fp16_s7" if value == "integer" else "fp16")
        return moved

    def name(self, seed: int) -> str:
        """File name without suffix."""
        shares = f"s{self.scale_share:g}-b{self.offset_share:g}"
        return f"{self.bits}bit-{self.zero_point}-{self.scale_grid}-{self.init}-d{self.distill:g}-{shares}-seed{seed}"


def variants(point: Variant) -> Iterator[Variant]:
    """Every run that the tables need, each once."""
    seen = set()
    for field, values in AXES.values():
        for value in values:
            variant = point.changed(field, value)
            if variant not in seen:
                seen.add(variant)
                yield variant


def measure(variant: Variant, recipe: Recipe, seed: int, assets: Path, out: Path, *, train: bool) -> dict[str, Any]:
    """Start, train and freeze one variant.

    Returns:
        {"variant", "seed", "recipe", "untrained", "trained"}: the last two are {text: perplexity}, "trained" null
        unless `train`.
    """
    scale_lr, offset_lr = recipe.lr * variant.scale_share, recipe.lr * variant.offset_share
    recipe = replace(recipe, scale_lr=scale_lr, offset_lr=offset_lr)
    cell = Cell(method="l4q-integer", bits=variant.bits, seed=seed)
    bench = Workbench(cell, recipe, load_tokens(recipe, assets, out), (variant.bits,), assets, variant.zero_point)
    grid = {"bits": variant.bits, "group_size": recipe.group_size, "zero_point": variant.zero_point}
    quant = QuantConfig.from_dict({**grid, "scale_grid": variant.scale_grid})
    model = bench.load()
    wrap(bench, model, quant, variant.init)
    untrained = bench.deployed_quantized("start", dict(freeze_model(model))).perplexity
    trained = None
    if train:
        bench.train(model, parameter_groups(model, bench.optim), distill=variant.distill)
        trained = bench.deployed_quantized("end", dict(freeze_model(model))).perplexity
    return {
        "variant": asdict(variant),
        "seed": seed,
        "recipe": recipe.to_dict(),
        "untrained": untrained,
        "trained": trained,
    }


def collect(variant: Variant, recipe: Recipe, seeds: tuple[int, ...], out: Path) -> list[dict[str, Any]]:
    """The results there are of one variant.

    Raises:
        UsageError: A file comes from another recipe.
    """
    found = []
    for seed in seeds:
        path = out / f"{variant.name(seed)}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        shared = {**result["recipe"], "scale_lr": recipe.scale_lr, "offset_lr": recipe.offset_lr}
        if shared != recipe.to_dict():
            raise UsageError(
                "a result comes from another recipe", where=path, got=shared, expected=recipe.to_dict(),
                remedy="choose another --out",
            )  # fmt: skip
        found.append(result)
    return found


def tables(point: Variant, recipe: Recipe, seeds: tuple[int, ...], out: Path) -> str:
    """One Markdown table per axis; blank where nothing was measured."""
    lines = []
    for heading, (field, values) in AXES.items():
        lines += [f"| {heading} | before training | Wikipedia | held-out leads |", "|---|---|---|---|"]
        for value in values:
            variant = point.changed(field, value)
            results = collect(variant, recipe, seeds, out)
            label = f"**{value}**" if variant == point else str(value)
            figures = [_spread([r[stage][text] for r in results if r[stage]]) for stage, text in _COLUMNS]
            lines.append(f"| {label} | " + " | ".join(figures) + " |")
        lines.append("")
    return "\n".join(lines)


_COLUMNS = (("untrained", HELD_OUT[0]), ("trained", HELD_OUT[0]), ("trained", HELD_OUT[1]))


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def summary(point: Variant, recipe: Recipe, seeds: tuple[int, ...], out: Path) -> dict[str, dict[str, float | None]]:
    """{axis: {choice: mean perplexity on the headline text after training, null if not measured}}."""
    found: dict[str, dict[str, float | None]] = {}
    for heading, (field, values) in AXES.items():
        row = found.setdefault(heading, {})
        for value in values:
            results = collect(point.changed(field, value), recipe, seeds, out)
            trained = [result["trained"][HELD_OUT[0]] for result in results if result["trained"]]
            row[str(value)] = round(statistics.fmean(trained), 3) if trained else None
    return found


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in value.split(","))
    except ValueError as error:
        raise click.BadParameter("give whole numbers separated by commas, such as 0,1,2") from error


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(list(MODELS)), default="glassllm", help="Model under build/assets.")
@click.option("--bits", type=int, default=3, help="Bits per code.")
@click.option("--seeds", default="0,1,2", callback=_numbers, help="Comma-separated: data order, LoRA's A.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: the model's]")
@click.option("--untrained", is_flag=True, help="Measure only what each start is worth.")
@click.option("--assets", type=click.Path(path_type=Path), default=Path("build/assets"), help="Models and texts.")
@click.option("--out", type=click.Path(path_type=Path), help="Results.  [default: build/ablate/MODEL]")
@click.option("--table-only", is_flag=True, help="Run nothing: print the tables of the results that are there.")
def command(
    model: str,
    bits: int,
    seeds: tuple[int, ...],
    steps: int | None,
    untrained: bool,
    assets: Path,
    out: Path | None,
    table_only: bool,
) -> None:
    """Measure what each choice of the recipe is worth; results that are there are kept."""
    recipe = MODELS[model] if steps is None else replace(MODELS[model], steps=steps)
    point = Variant(bits=bits)
    out = out or Path("build/ablate") / model
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    todo = [] if table_only else list(_missing(point, recipe, seeds, out, untrained=untrained))
    for variant, seed in track(todo, description="variants", disable=not todo, console=Console(stderr=True)):
        result = measure(variant, recipe, seed, assets, out, train=not untrained)
        target = out / f"{variant.name(seed)}.json"
        stage = target.with_suffix(".json.part")
        stage.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(stage, target)
    click.echo(tables(point, recipe, seeds, out))
    click.echo(json.dumps(summary(point, recipe, seeds, out)))


def _missing(
    point: Variant, recipe: Recipe, seeds: tuple[int, ...], out: Path, *, untrained: bool
) -> Iterator[tuple[Variant, int]]:
    for seed in seeds:
        for variant in variants(point):
            if untrained and variant != replace(
                variant, scale_share=point.scale_share, offset_share=point.offset_share
            ):
                continue  # a learning rate changes nothing before training
            found = collect(variant, recipe, (seed,), out)
            if not found or (found[0]["trained"] is None and not untrained):
                yield variant, seed


def main() -> None:
    """Entry point."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    run(command)


if __name__ == "__main__":
    main()
