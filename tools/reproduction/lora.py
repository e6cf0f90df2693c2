"""16-bit LoRA, and what is left of it after the merged model is quantized."""

from __future__ import annotations

from tools.reproduction.adapters import add_deltas_, add_lora, deltas, trainable
from tools.reproduction.base import HALF_BITS, half_
from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.gptq import gptq_model
from tools.reproduction.quantizers import round_to_nearest


def run(bench: Workbench) -> list[Deployed]:
    """Train once; deploy in 16 bits, and merged then quantized at every width."""
    model = bench.load()
    tuned = add_lora(bench, model, bench.targets(model))
    bench.train(tuned, trainable(tuned))
    changes = deltas(tuned)

    merged = add_deltas_(bench, bench.load(), changes)
    layers = bench.targets(merged)
    half_(layers)
    stored = HALF_BITS * sum(layer.weight.numel() for layer in layers.values())
    found = [bench.deployed("16-bit LoRA", merged, HALF_BITS, stored)]
    for bits in bench.all_bits:
        group = bench.recipe.group_size
        merged = add_deltas_(bench, bench.load(), changes)
        layers = bench.targets(merged)
        rounded = {name: round_to_nearest(layer.weight, bits, group, name) for name, layer in layers.items()}
        found.append(bench.deployed_quantized("16-bit LoRA, merged, round-to-nearest", rounded))
        solved = gptq_model(merged, layers, bench.calibration, bits, group)
        found.append(bench.deployed_quantized("16-bit LoRA, merged, GPTQ", solved))
    return found
