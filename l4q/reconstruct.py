"""A start for L4Q at few bits: weights and grids trained block by block until each block gives its original outputs.

Not in the paper. A decoder block is small enough to train all of its weights through the quantizer, and its own outputs
say far more about them than the text's next token does, so a few dozen steps on a few dozen sequences undo most of what
rounding costs (BRECQ, Li et al., arXiv 2102.05426; with all weights, EfficientQAT, Chen et al., arXiv 2407.11062). Each
block reads what the quantized blocks before it give, and is taught what the original model has at that place.

The result is a W0, s and b for `l4q.train` to go on from with A and B as from any other. What was trained through the
quantizer lies anywhere between the borders of its codes, and the first steps of s and B A would take many weights over
one at random, although the codes of a block were found together. So W0 is drawn towards the quantized weight: all the
way, and s can learn without changing a code, but B A must grow to half a step before it changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from l4q.blocks import Call, decoder_blocks, record_calls
from l4q.calibrate import search_grid
from l4q.compensate import Compensated, compensate
from l4q.config import QuantConfig
from l4q.full_linear import FullLinear
from l4q.init import Start
from l4q.output_error import output_error
from l4q.train_options import MOST_COUNT, require

MAX_GRAD_NORM = 1.0
GRAM_TOKENS = 1 << 16
"""Enough to see how a block's inputs correlate; more of them are not read for it."""
REPORTED = 32
"""Batches that the error before a block's training is measured on."""
FUSED = ("cpu", "cuda")
"""Devices whose AdamW torch has as one kernel."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """How blocks are trained. Learning rates are shares of a layer's mean s, so that they fit any width and model.

    Raises:
        UsageError: A value is out of range.
    """

    epochs: int = 2
    """Passes over the sequences per block."""
    batch_size: int = 2
    """Sequences per step."""
    lr: float = 2e-2
    """Peak learning rate of the weights."""
    scale_lr: float = 1e-3
    """Peak learning rate of the scales s."""
    offset_lr: float = 3e-3
    """Peak learning rate of the offsets b."""
    settle: float = 0.5
    """How far W0 and integer zero-points are drawn towards the middles of their codes: 0 not at all, 1 onto them."""
    amp: bool = False
    """Products in bfloat16 (autocast); weights and grids stay in float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(1 <= getattr(self, name) <= MOST_COUNT, name, getattr(self, name), f"from 1 to {MOST_COUNT}")
        for name in ("lr", "scale_lr", "offset_lr"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share of a step, from 0 to below 1")
        require(0 <= self.settle <= 1, "settle", self.settle, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """How far one block's outputs are from the original model's, by `l4q.output_error`."""

    name: str
    before: float
    """With the searched grid and compensated rounding, on the first `REPORTED` batches."""
    after: float
    """After its training, on all batches."""


def reconstruct(
    model: Any,
    grids: Mapping[str, QuantConfig],
    sequences: Sequence[Sequence[int]],
    options: ReconstructOptions,
    progress: Callable[[BlockReport], None] = lambda report: None,
) -> dict[str, Start]:
    """Give the target layers new weights, in place, and find their grids.

    Args:
        model: A causal language model, not wrapped.
        grids: Target layer -> its grid; layers outside the decoder's blocks are left alone.
        sequences: Token ids; those of equal length share batches.
        options: How to train.
        progress: Called after each block.

    Returns:
        s and b of every layer of `grids` that lies in a block, float32.

    Raises:
        UnsupportedError: The model has no list of blocks.
    """
    blocks = decoder_blocks(model, grids)
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with _products(model.device, amp=options.amp):
            recording = record_calls(model, list(blocks.values()), _batches(sequences, options.batch_size))
        original = quantized = recording.hidden
        found: dict[str, Start] = {}
        for (name, block), calls in zip(blocks.items(), recording.calls, strict=True):
            inside = {target: grid for target, grid in grids.items() if target.startswith(f"{name}.")}
            run = _Run(block, calls, amp=options.amp)
            original = run.outputs(original)
            grams = _grams(model, inside, run, quantized)
            with _trainable(model, inside, grams, options.settle) as layers:
                with _quantized_once(layers):
                    before = _error(run.outputs(quantized[:REPORTED]), original[:REPORTED])
                _train(run, quantized, original, layers, options)
                with _quantized_once(layers):
                    quantized = run.outputs(quantized)
                progress(BlockReport(name=name, before=before, after=_error(quantized, original)))
            found |= {target: layer.start(options.settle) for target, layer in layers.items()}
    finally:
        model.train(training)
        for parameter, keeps in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(keeps)
    return found


@contextmanager
def _trainable(
    model: nn.Module, grids: Mapping[str, QuantConfig], grams: Mapping[str, torch.Tensor], settle: float
) -> Iterator[dict[str, FullLinear]]:
    """Put trainable layers into a block; when it is left, the linear layers are back, with the settled weights."""
    linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in grids}
    layers: dict[str, FullLinear] = {}
    try:
        for name, linear in linears.items():
            began = _begin(linear.weight, grams[name], grids[name])
            layers[name] = FullLinear(began, cast("nn.Parameter | None", linear.bias), grids[name])
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield layers
        for name, layer in layers.items():
            linears[name].weight.copy_(layer.settled_weight(settle))
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


@contextmanager
def _quantized_once(layers: Mapping[str, FullLinear]) -> Iterator[None]:
    """Quantize every layer once for all batches that are run without training."""
    for layer in layers.values():
        layer.kept = layer.quantized().detach()
    try:
        yield
    finally:
        for layer in layers.values():
            layer.kept = None


def _begin(weight: torch.Tensor, gram: torch.Tensor, quant: QuantConfig) -> Compensated:
    if quant.k_grid is None:
        return compensate(weight, gram, quant)
    # A group's neighbours decide its grid there, and error compensation needs the grid column by column.
    return Compensated(weight.detach().float().clone(), search_grid(weight, quant, gram.diagonal()))


class _Run:
    """A block and how the model calls it on every batch."""

    def __init__(self, block: nn.Module, calls: Sequence[Call], *, amp: bool) -> None:
        self._block, self._calls, self._amp = block, calls, amp

    def output(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [batch, length, hidden] for one batch."""
        with _products(hidden.device, amp=self._amp):
            return self._calls[number](self._block, hidden)

    @torch.no_grad()
    def outputs(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same for all of them."""
        return [self.output(number, each) for number, each in enumerate(hidden)]


def _products(device: torch.device, *, amp: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


@torch.no_grad()
def _error(given: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The mean loss."""
    return sum(float(output_error(one, other)) for one, other in zip(given, wanted, strict=True)) / len(given)


def _train(
    run: _Run,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    layers: Mapping[str, FullLinear],
    options: ReconstructOptions,
) -> None:
    """AdamW with cosine decay, the batches in another order in every epoch."""
    groups: list[dict[str, Any]] = []
    for layer in layers.values():
        step = float(layer.scales.detach().mean())
        rates = ((layer.weight, options.lr), (layer.scales, options.scale_lr), (layer.offsets, options.offset_lr))
        groups += [{"params": [p], "lr": rate * step} for p, rate in rates if p.requires_grad]
    if not groups:
        return
    # One pass over the weights and their moments each, where torch's default makes a dozen.
    fused = next(iter(layers.values())).weight.device.type in FUSED
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(inputs))
    parameters = [parameter for group in groups for parameter in group["params"]]
    order = torch.Generator().manual_seed(0)
    for _ in range(options.epochs):
        for number in torch.randperm(len(inputs), generator=order).tolist():
            output_error(run.output(number, inputs[number]), wanted[number]).backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _grams(
    model: nn.Module, names: Mapping[str, QuantConfig], run: _Run, inputs: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sums of x x^T over what a block's layers read, float32 [in, in]."""
    linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
    sums = {n: torch.zeros(lin.in_features, lin.in_features, device=lin.weight.device) for n, lin in linears.items()}

    def adder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2).float()  # [tokens, in]
            with torch.autocast(flat.device.type, enabled=False):
                sums[name].addmm_(flat.T, flat)

        return add

    hooks = [linear.register_forward_pre_hook(adder(name)) for name, linear in linears.items()]
    enough = next((n for n, seen in enumerate(_tokens_so_far(inputs), 1) if seen >= GRAM_TOKENS), len(inputs))
    try:
        run.outputs(inputs[:enough])
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _tokens_so_far(batches: Sequence[torch.Tensor]) -> Iterator[int]:
    return accumulate(batch.shape[0] * batch.shape[1] for batch in batches)


def _batches(sequences: Sequence[Sequence[int]], size: int) -> list[torch.Tensor]:
    """Token ids [up to `size`, length], of sequences of one length each."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for ids in sequences:
        lengths.setdefault(len(ids), []).append(ids)
    return [
        torch.tensor(alike[first : first + size]) for alike in lengths.values() for first in range(0, len(alike), size)
    ]
