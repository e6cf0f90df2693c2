"""The `calibrated` initialisation: the grid that loses least of each layer's output, not of its weights.

The paper's initialisations look at a group's extremes. At 3 bits that costs most of the model (docs/results.md). With
x_j the input of column j, and inputs taken as uncorrelated, a change of weight w_j changes the output's mean square by
E[x_j^2] times the change's square; so each group takes the grid with the least

    sum_j E[x_j^2] * (W_q[j] - W[j])^2

among the zero-points and clipping ratios tried. llama.cpp's importance matrices weigh by the same E[x_j^2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from l4q.config import QuantConfig
from l4q.init import Start, asymm_init, l4q_init
from l4q.quant import SCALE_MIN, row_blocks, snap_scales

CLIP_RATIOS = tuple(1 - step / 20 for step in range(12))
"""Shares of the unclipped range that are tried: 1 down to 0.45."""
ZERO_REACH = 2
"""Integer zero-points tried on both sides of the one that the group's extremes suggest."""

Moments = dict[str, torch.Tensor]
"""Module name -> E[x_j^2] of its input columns, [in] float32."""


@torch.no_grad()
def input_moments(model: Any, names: Iterable[str], sequences: Sequence[Sequence[int]]) -> Moments:
    """Mean squares of the inputs of linear layers.

    Args:
        model: A causal language model, not wrapped.
        names: The layers.
        sequences: Token ids; each is run alone.

    Returns:
        E[x_j^2] per layer. A layer that no sequence reaches, such as an expert nobody was routed to, is left out.
    """
    sums: Moments = {}
    tokens: dict[str, int] = {}

    def adder(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2).float()  # [tokens, in]
            if flat.shape[0]:
                sums[name] = sums.get(name, torch.zeros_like(flat[0])) + flat.square().sum(0)
                tokens[name] = tokens.get(name, 0) + flat.shape[0]

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(adder(name)) for name in names]
    training = model.training
    model.eval()
    try:
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


@torch.no_grad()
def search_grid(weight: torch.Tensor, quant: QuantConfig, moments: torch.Tensor | None = None) -> Start:
    """The s and b with the least weighted squared error among those tried.

    Args:
        weight: [out, in], any float dtype.
        quant: The grid.
        moments: E[x_j^2], [in]; None weighs all columns alike.

    Returns:
        scales, offsets: float32, each [out, groups]; s lies on the scale grid, unless that is a K grid.
    """
    group_size = quant.resolve_group_size(weight.shape[1])
    importance = torch.ones(weight.shape[1], device=weight.device) if moments is None else moments.to(weight.device)
    # A column that was always zero still must not be lost altogether: other data may use it.
    importance = importance.clamp(min=1e-6 * float(importance.mean())).view(1, -1, group_size)
    scales, offsets = [], []
    for rows in row_blocks(weight):
        grouped = weight[rows].detach().float().view(-1, importance.shape[1], group_size)
        best = _search(grouped, importance, quant)
        scales.append(best.scales)
        offsets.append(best.offsets)
    return Start(torch.cat(scales), torch.cat(offsets))


def _search(grouped: torch.Tensor, importance: torch.Tensor, quant: QuantConfig) -> Start:
    """The best grid of each group of [rows, groups, group_size]; importance is [1, groups, group_size]."""
    least, best_s, best_m = None, torch.empty(0), torch.empty(0)
    for s, m in _candidates(grouped, quant):
        wide = s.unsqueeze(-1)
        codes = grouped.sub(m.unsqueeze(-1)).div_(wide).round_().clamp_(0, quant.max_code)
        error = codes.mul_(wide).add_(m.unsqueeze(-1)).sub_(grouped).square_().mul_(importance).sum(-1)
        if least is None:
            least, best_s, best_m = error, s, m
        else:
            better = error < least
            least = torch.where(better, error, least)
            best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
    offsets = best_m + quant.midpoint * best_s
    return Start(best_s, torch.zeros_like(offsets) if quant.zero_point == "none" else offsets)


def _candidates(grouped: torch.Tensor, quant: QuantConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of s on the scale grid and m, [rows, groups] each, as the forward will use them."""
    low, high = grouped.amin(-1), grouped.amax(-1)

    def snap(scales: torch.Tensor) -> torch.Tensor:
        positive = scales.clamp(min=SCALE_MIN)
        # On a K grid a scale's neighbours decide what it becomes, and they are not chosen yet: search free numbers.
        return positive if quant.k_grid is not None else snap_scales(positive, quant.scale_grid)

    if quant.zero_point == "none":
        widest = l4q_init(grouped, quant).scales
        for ratio in CLIP_RATIOS:
            s = snap(widest * ratio)
            yield s, -quant.midpoint * s
    elif quant.zero_point == "integer":
        start = asymm_init(grouped, quant)
        suggested = quant.midpoint - start.offsets / start.scales
        for step in sorted(range(-ZERO_REACH, ZERO_REACH + 1), key=abs):
            zeros = (suggested + step).round().clamp(1, quant.max_code)
            above = high / (quant.max_code - zeros).clamp(min=0.5)
            widest = torch.maximum(low / -zeros, above)
            for ratio in CLIP_RATIOS:
                s = snap(widest * ratio)
                yield s, -zeros * s
    else:
        limit = torch.finfo(torch.float16).max
        for lower in CLIP_RATIOS[::2]:
            m = (low * lower).clamp(-limit, limit).half().float()
            for upper in CLIP_RATIOS[::2]:
                yield snap((high * upper - m) / quant.max_code), m
