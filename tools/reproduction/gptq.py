"""GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1), re-implemented: GPTQModel 7.7 needs a newer torch.

Errors are spread by `l4q.compensate`. Groups take their min-max grid from the updated weights when the first of their
columns is reached. No column reordering. Decoder blocks are done in order, each on the inputs that the quantized blocks
before it produce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l4q.compensate import Rounding, spread_errors
from l4q.weight import QuantizedWeight
from tools.reproduction.quantizers import Grid, minmax_grid, pack


class _CapturedError(Exception):
    """Raised by the first block's hook: its inputs are known, the rest of the model need not run."""


def gptq_weight(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, name: str) -> QuantizedWeight:
    """Quantize one layer.

    Args:
        weight: [out, in].
        hessian: Sum of x x^T over the calibration inputs, [in, in] float32.
        bits: Bits per code.
        group_size: Columns per scale, dividing in.
        name: For error messages.
    """
    grids: list[Grid] = []
    top = (1 << bits) - 1

    def codes(values: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (values / s + z).round().clamp(0, top)

    def begin(group: torch.Tensor, _: slice) -> Rounding:
        grids.append(minmax_grid(group, bits, group_size))
        s, z = grids[-1].scales[:, 0], grids[-1].zeros[:, 0]
        return lambda column: (codes(column, s, z) - z) * s

    moved = spread_errors(weight, hessian, group_size, begin)
    scales, zeros = torch.cat([grid.scales for grid in grids], 1), torch.cat([grid.zeros for grid in grids], 1)
    wide = (part.repeat_interleave(group_size, 1) for part in (scales, zeros))
    return pack(codes(moved, *wide), Grid(scales, zeros), bits, name)


@torch.no_grad()
def gptq_model(
    model: Any, targets: Mapping[str, nn.Linear], batches: Sequence[torch.Tensor], bits: int, group_size: int
) -> dict[str, QuantizedWeight]:
    """Quantize the targets of a Llama-like model block by block; the model is left holding the dequantized weights.

    Args:
        model: A transformers causal language model whose decoder blocks are `model.model.layers`.
        targets: Linear layers by dotted name.
        batches: Calibration token ids, [batch, length] each.
        bits: Bits per code.
        group_size: Columns per scale.
    """
    done: dict[str, QuantizedWeight] = {}
    inputs = _block_inputs(model, batches)
    for number, block in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        inside = {name: layer for name, layer in targets.items() if name.startswith(prefix)}
        for name, hessian in _hessians(block, inside, inputs).items():
            weight = inside[name].weight
            done[name] = gptq_weight(weight, hessian, bits, group_size, name)
            weight.copy_(torch.from_numpy(done[name].dequantize()))
        inputs = [((_hidden(block(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in inputs]
    return done


def _block_inputs(model: Any, batches: Sequence[torch.Tensor]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _CapturedError

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(input_ids=batch, use_cache=False)
            except _CapturedError:
                continue
    finally:
        hook.remove()
    return captured


def _hessians(
    block: nn.Module, targets: Mapping[str, nn.Linear], inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[str, torch.Tensor]:
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in targets.items()
    }

    def adder(name: str) -> Any:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2).float()  # [tokens, in]
            sums[name].addmm_(flat.T, flat)

        return add

    hooks = [layer.register_forward_pre_hook(adder(name)) for name, layer in targets.items()]
    try:
        for args, kwargs in inputs:
            block(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
