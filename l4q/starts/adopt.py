"""What a linear layer becomes when training starts: its W0 in the asked storage, and s and b of its own if they fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from l4q.base import PackedBase
from l4q.config import BaseStorage, QuantConfig
from l4q.errors import UsageError
from l4q.init import Start
from l4q.linear import L4QLinear
from l4q.starts.grid import LinearGrid
from l4q.starts.match import match_grid
from l4q.starts.start import PretrainedStart


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """How one layer starts."""

    base: nn.Parameter | PackedBase
    """W0."""
    qparams: Start | None
    """s and b of the start; None: initialise as usual."""
    grid: LinearGrid | None
    """The start's integers."""
    note: str
    """Why qparams is None although the model is pre-quantized; empty otherwise."""


def adopt(
    name: str, weight: nn.Parameter, quant: QuantConfig, start: PretrainedStart | None, storage: BaseStorage
) -> Adopted:
    """Decide W0 and the initial grid of one layer.

    Args:
        name: Module name in the model.
        weight: Its dense weight as loaded, in the training dtype.
        quant: The grid to train on.
        start: The pre-quantized source, or None.
        storage: How to keep W0.

    Raises:
        UsageError: Storage "start" without integers to keep, or a weight that cannot be packed.
    """
    grid, note = own_grid(name, weight, start)
    qparams: Start | None = None
    if grid is not None:
        matched = match_grid(grid, quant)
        qparams, note = (None, matched) if isinstance(matched, str) else (matched, "")
    base = _store(name, weight, grid, storage, exact=qparams is not None)
    if qparams is not None:
        qparams = Start(*(part.to(weight.device) for part in qparams))
    return Adopted(base=base, qparams=qparams, grid=grid, note=note)


def own_grid(name: str, weight: torch.Tensor, start: PretrainedStart | None) -> tuple[LinearGrid | None, str]:
    """The start's integers of a layer if they are the weight that was loaded, else None and why."""
    grid = start.grid(name) if start is not None else None
    if grid is None:
        return None, start.obstacle(name) if start is not None else ""
    if not torch.equal(grid.dequantize().to(weight.dtype), weight.detach().cpu()):
        return None, "the model was loaded with other values than the start's integers give"
    return grid, ""


@torch.no_grad()
def reproduces(layer: L4QLinear, grid: LinearGrid | None) -> bool:
    """Whether the layer's forward multiplies with the start's own weights, every one of them equal."""
    return grid is not None and torch.equal(layer.quantized_weight().cpu(), grid.dequantize())


def _store(
    name: str, weight: nn.Parameter, grid: LinearGrid | None, storage: BaseStorage, *, exact: bool
) -> nn.Parameter | PackedBase:
    if storage == "start":
        if grid is None:
            raise UsageError(
                "--base-storage start needs a start that keeps the layer as integers",
                where=name,
                got="a layer in floating point, or in a type with another structure",
                expected="a GPTQ, AWQ or compressed-tensors layer, or GGUF Q4_0, Q4_1 or Q8_0",
                remedy="use --base-storage int8 or int4",
            )
        return PackedBase.from_grid(grid).to(weight.device)
    if storage != "dense":
        values = weight if grid is None else grid.dequantize().to(weight.device)
        return PackedBase.quantize(values, storage, name)
    if grid is not None and exact and weight.dtype != torch.float32:  # 16 bits would round (q - z) * s
        return nn.Parameter(grid.dequantize().to(weight.device), requires_grad=False)
    return weight
