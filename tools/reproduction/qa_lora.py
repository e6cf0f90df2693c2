"""QA-LoRA (arXiv 2309.14717): LoRA on group sums of the input, so that the update merges into the zero-points.

The paper gives it twice the rank, because A is shorter by the group size; the base is GPTQ, as in its own code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from l4q.weight import QuantizedWeight
from tools.bench_models import replace_linears
from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.gptq import gptq_model

RANK_FACTOR = 2


class QALoRALinear(nn.Module):
    """Y = W_q x + scaling * B A p(x), p(x) the sums of x over the columns of each group."""

    def __init__(self, linear: nn.Linear, groups: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.linear, self.groups, self.scaling = linear, groups, scaling
        weight = linear.weight
        self.lora_A = nn.Parameter(torch.empty(rank, groups, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        pooled = x.unflatten(-1, (self.groups, -1)).sum(-1)  # [..., groups]
        branch = F.linear(F.linear(pooled, self.lora_A), self.lora_B)
        y: torch.Tensor = self.linear(x)
        return y + self.scaling * branch

    @torch.no_grad()
    def shift(self) -> np.ndarray:
        """What the branch adds to every weight of a group: float32 [out, groups]."""
        return (self.scaling * self.lora_B @ self.lora_A).cpu().numpy()


def run(bench: Workbench) -> list[Deployed]:
    """Train, then deploy the merged zero-points as floats and rounded to integers."""
    group, rank = bench.recipe.group_size, RANK_FACTOR * bench.recipe.rank
    model = bench.load()
    layers = bench.targets(model)
    frozen = gptq_model(model, layers, bench.calibration, bench.bits, group)
    scaling = bench.recipe.alpha / rank
    replace_linears(model, list(layers), lambda layer: QALoRALinear(layer, layer.in_features // group, rank, scaling))
    bench.train(model, [p for p in model.parameters() if p.requires_grad])
    floats, integers = {}, {}
    for name, weight in frozen.items():
        floats[name] = shifted(weight, cast(QALoRALinear, model.get_submodule(name)).shift())
        integers[name] = with_integer_zeros(floats[name])
    return [
        bench.deployed_quantized("QA-LoRA (float zero-points)", floats),
        bench.deployed_quantized("QA-LoRA (integer zero-points)", integers),
    ]


def shifted(weight: QuantizedWeight, shift: np.ndarray) -> QuantizedWeight:
    """The same codes with the group's value of code 0 moved by `shift` [out, groups], rounded to fp16."""
    lows = -weight.integer_zeros().astype(np.float32) * weight.scales.astype(np.float32)
    return replace(weight, zeros=None, mins=(lows + shift).astype(np.float16))


def with_integer_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """The nearest zero-points that integer formats store. Codes stay: the grid moves by less than half a step."""
    if weight.mins is None:
        return weight
    free = -weight.mins.astype(np.float32) / weight.scales.astype(np.float32)
    zeros = np.clip(np.rint(free), 1, (1 << weight.bits) - 1).astype(np.uint8)
    return replace(weight, zeros=zeros, mins=None)
