"""How the grid moves while it trains: scale drift, clipped weights and zero-point moves, on a sample of the layers.

Measured at every logged step, by process 0; of a sharded model by every process on its part of the same rows, once it
has gathered A, and the counts are added. Nothing here touches a gradient, a parameter or a random generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l4q.base import BaseWeight, MovingBase, PackedBase
from l4q.distributed import decide, is_main, is_sharded, own_rows, summed, whole
from l4q.durable import write_atomic
from l4q.linear import L4QLinear
from l4q.model import l4q_layers
from l4q.quant import GridParams, LoraUpdate, grid_params, merge_lora, position_
from l4q.state_tensors import load_tensors

LAYERS, ROWS = 24, 32
"""At most this many layers and about as many rows of each, both evenly spaced."""
START = "grid-start.safetensors"
"""In the run folder: the sampled scales that quantization started with, for runs that are resumed."""
FIGURES = ("scale_drift", "clipped", "zero_point_moves")


class GridWatch(TrainerCallback):
    """Compares the trained grid with the one quantization started from.

    Args:
        model: A wrapped model, before any training.
        run: The run folder.
    """

    def __init__(self, model: nn.Module, run: Path) -> None:
        self._sharded = is_sharded(model)
        layers = list(l4q_layers(model)) if is_main() or self._sharded else []
        self._layers = layers[:: max(1, -(-len(layers) // LAYERS))]
        self._path = run / START
        self._start: dict[str, torch.Tensor] = {}
        self._zeros: dict[str, torch.Tensor] = {}
        self._warming = False

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the start's scales, or read them if the run continues; note where the zero-points are now.

        A run that an older version started did not keep them, and gets no drift.
        """
        if not self._layers:
            return
        if self._quantizing() and state.global_step > 0:
            self._start = decide(self._read) if self._sharded else self._read()
            self._zeros = self._positions()
        elif self._quantizing():
            self._remember()
        self._warming = not self._quantizing()

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a LoRA warm-up the grid starts here."""
        if self._warming and self._quantizing():
            self._remember()
            self._warming = False

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The figures of this moment; {} during a LoRA warm-up. Of a sharded model, every process asks for them.

        Returns:
            scale_drift: mean |s / s0 - 1| of the sampled groups; absent if s0 is not known.
            clipped: share of the sampled weights beyond the ends of their grid.
            zero_point_moves: share of the sampled groups whose zero-point moved to another code since the last call;
                absent if no zero-point trains.
        """
        if not self._quantizing():
            return {}
        found = torch.tensor([self._drift(), self._clipped(), self._moved()], dtype=torch.float64)
        if self._sharded:
            found = summed(found.to(self._layers[0][1].scales.device))
        return {name: total / count for name, (total, count) in zip(FIGURES, found.tolist(), strict=True) if count}

    def _quantizing(self) -> bool:
        return bool(self._layers) and all(layer.quantizing for _, layer in self._layers)

    def _remember(self) -> None:
        scales = {name: whole(layer.scales) for name, layer in self._layers}
        self._start = {name: value[:: _step(len(value))].clone().cpu() for name, value in scales.items()}
        self._zeros = self._positions()
        if is_main():
            write_atomic(self._path, save(self._start))

    def _read(self) -> dict[str, torch.Tensor]:
        return load_tensors(self._path) if self._path.exists() else {}

    def _drift(self) -> tuple[float, int]:
        total, count = 0.0, 0
        for name, layer in self._layers if self._start else ():
            drift = (_sample(layer.scales) / _own_part(self._start[name], layer.scales) - 1).abs_()
            total, count = total + float(drift.sum()), count + drift.numel()
        return total, count

    def _moved(self) -> tuple[int, int]:
        then, now = self._zeros, self._positions()
        self._zeros = now
        moved = sum(int((now[name] != then[name]).sum()) for name in now)
        return moved, sum(zeros.numel() for zeros in now.values())

    def _positions(self) -> dict[str, torch.Tensor]:
        """The code each sampled group's zero lies nearest to, [rows, groups]; of layers whose zero-points train."""
        moving = [(name, layer) for name, layer in self._layers if layer.offsets.requires_grad]
        return {name: _params(layer).zeros.round().cpu() for name, layer in moving}

    def _clipped(self) -> tuple[int, int]:
        beyond, count = 0, 0
        for _, layer in self._layers:
            a = whole(layer.lora_A)  # also where this process has no rows, as the others wait for it
            if len(_sample(layer.scales)):
                outside = _outside(layer, a)
                beyond, count = beyond + int(outside.sum()), count + outside.numel()
        return beyond, count


def _outside(layer: L4QLinear, a: torch.Tensor) -> torch.Tensor:
    """Which weights of this process's sampled rows are beyond the ends of their grid: bool [rows, groups, size]."""
    params, update = _params(layer), LoraUpdate(a, own_rows(layer.lora_B).tensor, layer.lora.scaling)
    merged = merge_lora(_own_base(layer.base()), update, _rows(layer.scales), params.scales.dtype)
    places = position_(merged.clone(), params.scales, params.mins)
    return (places < 0) | (places > layer.quant.max_code)


def _step(total: int) -> int:
    return max(1, total // ROWS)


def _rows(parameter: torch.Tensor) -> slice:
    """The sampled ones among this process's rows: multiples of the step, counted from the parameter's first row."""
    own = own_rows(parameter)
    step = _step(own.total)
    return slice(-own.start % step, None, step)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """The sampled ones of this process's rows."""
    return own_rows(parameter).tensor[_rows(parameter)]


def _own_part(sample: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a sample of all rows of `parameter`, on its device."""
    own = own_rows(parameter)
    first = -(-own.start // _step(own.total))
    return sample[first : first + len(_sample(parameter))].to(own.tensor.device)


def _own_base(weight: BaseWeight) -> BaseWeight:
    if isinstance(weight, MovingBase):
        return weight  # FSDP, where a process has some of the rows, has no starts that find one
    if isinstance(weight, PackedBase):
        return weight.part(lambda tensor: own_rows(tensor).tensor)
    return own_rows(weight).tensor


def _params(layer: L4QLinear) -> GridParams:
    return grid_params(_sample(layer.scales), _sample(layer.offsets), layer.quant)
