"""Without any training: the 16-bit model, round-to-nearest, GPTQ."""

from __future__ import annotations

import torch

from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.gptq import gptq_model
from tools.reproduction.quantizers import round_to_nearest

HALF_BITS = 16


def run(bench: Workbench) -> list[Deployed]:
    """Measure the original model and its post-training quantizations at every width."""
    model = bench.load()
    weights = bench.targets(model)
    half_(weights)
    found = [
        bench.deployed("16-bit base", model, HALF_BITS, HALF_BITS * sum(w.weight.numel() for w in weights.values()))
    ]
    for bits in bench.all_bits:
        group = bench.recipe.group_size
        plain = bench.targets(bench.load())
        rounded = {name: round_to_nearest(layer.weight, bits, group, name) for name, layer in plain.items()}
        found.append(bench.deployed_quantized("round-to-nearest", rounded))
        model = bench.load()
        tuned = gptq_model(model, bench.targets(model), bench.calibration, bits, group)
        found.append(bench.deployed_quantized("GPTQ", tuned))
    return found


@torch.no_grad()
def half_(layers: dict[str, torch.nn.Linear]) -> None:
    """Round the weights to fp16, as they are shipped, in place."""
    for layer in layers.values():
        layer.weight.copy_(layer.weight.half().float())
