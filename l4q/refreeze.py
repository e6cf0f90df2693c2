"""Freeze a run again: from any saved step, and onto another kind of zero-point or scale grid.

A model trained with zero_point "float" is exact only where a runtime stores float offsets. To take it to integer
zero-points, z is snapped to the nearest whole step and every code is taken anew from W0 + scaling * B A: rounding b
alone would shift all weights of a group by up to half a step in the same direction, recoding leaves ordinary rounding
errors. What that costs is measured, in weights and, with a text, in perplexity.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from l4q.config import QuantConfig, ScaleGrid, ZeroPoint
from l4q.errors import UsageError
from l4q.files import refuse_existing
from l4q.found_start import load_found
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, load_trainable_state, trained_grid
from l4q.quant import merge_lora
from l4q.run_folder import RunFolder
from l4q.state_tensors import saved_tensors
from l4q.targets import require_k_layers
from l4q.train import Evaluator, evaluation_windows, save_frozen
from l4q.train_model import load_model, wrap_model
from l4q.train_options import EvalOptions, TrainOptions
from l4q.train_state import TRAINABLE, is_intact, list_states, read_json
from l4q.warmup import in_warmup, start_quantization

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FreezeOptions:
    """What to freeze, and onto which grid."""

    run: Path
    """Run folder of l4q-train."""
    out: Path
    """Checkpoint folder to create."""
    step: int | None = None
    """Saved step; None = the newest."""
    zero_point: ZeroPoint | None = None
    """Kind of zero-point; None = the run's own."""
    scale_grid: ScaleGrid | None = None
    """Values of the scales; None = the run's own, or the default of another zero_point."""
    model: str | None = None
    """Where the base model lies now; None = where the run found it."""
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    """Held-out text to measure perplexity on, as trained and as frozen."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(frozen=True, kw_only=True)
class WeightLoss:
    """How far quantized weights are from W = W0 + scaling * B A, as root mean squares relative to W's."""

    name: str
    """Module name, or "overall"."""
    trained: float
    """||W_q - W|| / ||W|| on the grid the run trained with."""
    frozen: float
    """The same on the grid that is written."""
    change: float
    """||W_q,frozen - W_q,trained|| / ||W_q,trained||; 0 if nothing changes."""


@dataclass
class _Sums:
    """Sums of squares, from which relative errors follow for a layer or for all of them."""

    merged: float = 0.0
    trained: float = 0.0
    trained_error: float = 0.0
    frozen_error: float = 0.0
    change: float = 0.0

    def add(self, other: _Sums) -> None:
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)

    def loss(self, name: str) -> WeightLoss:
        return WeightLoss(
            name=name,
            trained=_relative(self.trained_error, self.merged),
            frozen=_relative(self.frozen_error, self.merged),
            change=_relative(self.change, self.trained),
        )


def refreeze(options: FreezeOptions) -> dict[str, Any]:
    """Freeze a saved step of a run into a new checkpoint folder.

    Returns:
        checkpoint, run, step, grid; weight_loss (one entry per layer and "overall", see `WeightLoss`), empty if the
        grid is the run's own; perplexity "trained" and "frozen", if a text was given.

    Raises:
        UsageError: Not a run folder, no such step, a damaged state, or the output folder exists.
        UnsupportedError: The base model can no longer be loaded.
    """
    refuse_existing(options.out, overwrite=options.overwrite)
    recorded = recorded_options(options)
    step, folder = find_state(options.run, options.step)
    model, tokenizer = load_model(recorded)
    evaluator = Evaluator(windows=evaluation_windows(options.evaluation, model, tokenizer))
    warming = in_warmup(step, recorded.lora_warmup_steps)
    # Past the warm-up the saved s and b replace the initial ones, which then need not be searched.
    found = load_found(RunFolder(options.run).found_start, model).grids if recorded.init == "reconstructed" else {}
    wrap_model(model, recorded if warming or found else replace(recorded, init="l4q"), found=found)
    trained = trained_grid(model)
    target = target_grid(trained, options)
    load_trainable_state(model, saved_tensors(folder / TRAINABLE))
    if warming:
        log.info("step %d lies in the LoRA warm-up: scales and offsets start from its merged weights", step)
        start_quantization(model)
    model.to(torch.accelerator.current_accelerator() or "cpu")
    perplexities = evaluator.measure("trained", model)
    same = all(target_grid(layer.quant, options) == layer.quant for _, layer in l4q_layers(model))
    losses = [] if same else regrid_model(model, lambda grid: target_grid(grid, options))
    perplexities |= evaluator.measure("frozen", model)
    save_frozen(model, tokenizer, recorded, options.out, overwrite=options.overwrite)
    return {
        "checkpoint": str(options.out),
        "run": str(options.run),
        "step": step,
        "grid": {"trained": trained.to_dict(), "frozen": target.to_dict()},
        "weight_loss": [asdict(loss) for loss in losses],
        "perplexity": perplexities,
    }


def recorded_options(options: FreezeOptions) -> TrainOptions:
    """The options a run was started with.

    Raises:
        UsageError: The folder holds no run, or its record is of another version.
    """
    config = RunFolder(options.run).config
    try:
        record = read_json(config)
        values = dict(record["options"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "the folder holds no run of l4q-train",
            where=options.run,
            got=f"{type(error).__name__} reading {config.name}",
            expected="the run folder itself (the --out of l4q-train), not its checkpoint",
        ) from error
    # The device may be another one, and every kind of kernels freezes to the same integers.
    recorded = replace(TrainOptions.from_dict(values, where=config), kernels="auto")
    return recorded if options.model is None else replace(recorded, model=options.model)


def find_state(run: Path, step: int | None) -> tuple[int, Path]:
    """The state saved after `step`, or the newest intact one.

    Raises:
        UsageError: There is none, or it is damaged.
    """
    states = list_states(run)
    intact = [(saved, folder) for saved, folder in states if step in (None, saved) and is_intact(folder)]
    if intact:
        return intact[-1]
    known = [saved for saved, _ in states]
    raise UsageError(
        "the saved state is damaged" if step in known or (known and step is None) else "the run has no such state",
        where=run,
        got=f"step {'of the newest state' if step is None else step}",
        expected=f"one of {known}" if known else "a run that has saved a state",
        remedy="choose another --step; --save-every and --keep-states decide which ones a run keeps",
    )


def target_grid(trained: QuantConfig, options: FreezeOptions) -> QuantConfig:
    """The grid to freeze onto: bits and group size as trained, the rest as asked for."""
    kind = options.zero_point or trained.zero_point
    grid = options.scale_grid or (trained.scale_grid if kind == trained.zero_point else None)
    return replace(trained, zero_point=kind, scale_grid=grid)


@torch.no_grad()
def regrid_model(model: torch.nn.Module, target: Callable[[QuantConfig], QuantConfig]) -> list[WeightLoss]:
    """Put every wrapped layer on another grid (snap and recode) and measure what that costs.

    Args:
        model: A wrapped model.
        target: The new grid of a layer, from its present one.

    Returns:
        One entry per layer, and "overall" last.

    Raises:
        UsageError: Bits or group size differ, or the target is a K grid that fits no layer.
    """
    asked = {name: target(layer.quant) for name, layer in l4q_layers(model)}
    require_k_layers(asked, {name: layer.in_features for name, layer in l4q_layers(model)})
    total, losses = _Sums(), []
    for name, layer in l4q_layers(model):
        sums = _regrid(layer, asked[name])
        total.add(sums)
        losses.append(sums.loss(name))
    return [*losses, total.loss("overall")]


def _regrid(layer: L4QLinear, target: QuantConfig) -> _Sums:
    before = layer.quantized_weight()
    layer.regrid(target.for_layer(layer.in_features))
    after = layer.quantized_weight()
    sums = _Sums()
    for rows in _slices(before):
        merged = merge_lora(layer.weight, layer.update(), rows, before.dtype)
        sums.add(
            _Sums(
                merged=_square(merged),
                trained=_square(before[rows]),
                trained_error=_square(before[rows] - merged),
                frozen_error=_square(after[rows] - merged),
                change=_square(after[rows] - before[rows]),
            )
        )
    return sums


def _slices(weight: torch.Tensor, step: int = 1024) -> Iterator[slice]:
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _relative(error: float, size: float) -> float:
    return math.sqrt(error / size) if size > 0 else 0.0
