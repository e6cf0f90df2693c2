"""How the grid moves while it trains: scale drift, clipped weights and zero-point moves, on a sample of the layers.

Measured on process 0 at every logged step, without communication: of a sharded model it sees its own rows, and as the
rows of A lie elsewhere, no clipped weights. Nothing here touches a gradient, a parameter or a random generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l4q.distributed import is_main, is_sharded, own_rows
from l4q.durable import write_atomic
from l4q.linear import L4QLinear
from l4q.model import l4q_layers
from l4q.quant import GridParams, LoraUpdate, grid_params, merge_lora, position_
from l4q.state_tensors import load_tensors

LAYERS, ROWS = 24, 32
"""At most this many layers and about as many rows of each, both evenly spaced."""
START = "grid-start.safetensors"
"""In the run folder: the sampled scales that quantization started with, for runs that are resumed."""


class GridWatch(TrainerCallback):
    """Compares the trained grid with the one quantization started from.

    Args:
        model: A wrapped model, before any training.
        run: The run folder.
    """

    def __init__(self, model: nn.Module, run: Path) -> None:
        layers = list(l4q_layers(model)) if is_main() else []
        self._layers = layers[:: max(1, -(-len(layers) // LAYERS))]
        self._whole = not is_sharded(model)
        self._path = run / START
        self._start: dict[str, torch.Tensor] = {}
        self._zeros: dict[str, torch.Tensor] = {}
        self._warming = False

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the start's scales, or read them if the run continues; note where the zero-points are now.

        A run that an older version started did not keep them, and gets no figures.
        """
        if state.global_step > 0 and self._quantizing() and self._path.exists():
            self._start = load_tensors(self._path)
            self._zeros = self._positions()
        elif self._quantizing() and state.global_step == 0:
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
        """The figures of this moment; {} during a LoRA warm-up.

        Returns:
            scale_drift: mean |s / s0 - 1| of the sampled groups.
            clipped: share of the sampled weights beyond the ends of their grid; absent for a sharded model.
            zero_point_moves: share of the sampled groups whose zero-point moved to another code since the last call;
                absent if no zero-point trains.
        """
        if not self._start:
            return {}
        figures = {"scale_drift": self._drift()}
        if self._whole:
            figures["clipped"] = self._clipped()
        now = self._positions()
        if now:
            moved = sum((now[name] != self._zeros[name]).sum() for name in now)
            figures["zero_point_moves"] = float(moved) / sum(zeros.numel() for zeros in now.values())
        self._zeros = now
        return figures

    def _quantizing(self) -> bool:
        return bool(self._layers) and all(layer.quantizing for _, layer in self._layers)

    def _remember(self) -> None:
        self._start = {name: _sample(layer.scales).clone().cpu().contiguous() for name, layer in self._layers}
        self._zeros = self._positions()
        write_atomic(self._path, save(self._start))

    def _drift(self) -> float:
        total, count = 0.0, 0
        for name, layer in self._layers:
            start = self._start[name].to(layer.scales.device)
            drift = (_sample(layer.scales) / start - 1).abs_()
            total, count = total + float(drift.sum()), count + drift.numel()
        return total / max(count, 1)

    def _positions(self) -> dict[str, torch.Tensor]:
        """The code each sampled group's zero lies nearest to, [rows, groups]; of layers whose zero-points train."""
        moving = [(name, layer) for name, layer in self._layers if layer.offsets.requires_grad]
        return {name: _params(layer).zeros.round().cpu() for name, layer in moving}

    def _clipped(self) -> float:
        beyond, count = 0, 0
        for _, layer in self._layers:
            params, rows = _params(layer), _rows(layer.scales.shape[0])
            update = LoraUpdate(layer.lora_A, layer.lora_B, layer.lora.scaling)
            merged = merge_lora(layer.weight, update, rows, params.scales.dtype)
            places = position_(merged.clone(), params.scales, params.mins)
            beyond += int(((places < 0) | (places > layer.quant.max_code)).sum())
            count += places.numel()
        return beyond / max(count, 1)


def _rows(count: int) -> slice:
    return slice(0, None, max(1, count // ROWS))


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """The sampled ones of this process's rows."""
    own = own_rows(parameter).tensor
    return own[_rows(own.shape[0])]


def _params(layer: L4QLinear) -> GridParams:
    return grid_params(_sample(layer.scales), _sample(layer.offsets), layer.quant)
