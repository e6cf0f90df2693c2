"""LoRA on top of integers: GPTQ + LoRA, and QLoRA* (round-to-nearest in the place of NF4, as in the paper)."""

from __future__ import annotations

from tools.reproduction.adapters import add_deltas_, add_lora, deltas, half_adapters_, trainable
from tools.reproduction.bench import Deployed, Workbench, place
from tools.reproduction.gptq import gptq_model
from tools.reproduction.methods import METHODS
from tools.reproduction.quantizers import round_to_nearest, stored_bits


def run(bench: Workbench) -> list[Deployed]:
    """Quantize, train LoRA beside the integers, deploy mixed; then merge and quantize the sum the same way."""
    mixed_row, merged_row = METHODS[bench.cell.method].rows
    bits, group = bench.bits, bench.recipe.group_size
    solve = bench.variant == "gptq"

    model = bench.load()
    layers = bench.targets(model)
    if solve:
        frozen = gptq_model(model, layers, bench.calibration, bits, group)
    else:
        frozen = {name: round_to_nearest(layer.weight, bits, group, name) for name, layer in layers.items()}
        place(model, frozen)
    tuned = add_lora(bench, model, layers)
    bench.train(tuned, trainable(tuned))
    changes = deltas(tuned)
    stored = sum(stored_bits(weight) for weight in frozen.values()) + half_adapters_(tuned)
    found = [bench.deployed(mixed_row, tuned, bits, stored)]

    merged = bench.load()
    place(merged, frozen)
    add_deltas_(bench, merged, changes)
    layers = bench.targets(merged)
    if solve:
        final = gptq_model(merged, layers, bench.calibration, bits, group)
    else:
        final = {name: round_to_nearest(layer.weight, bits, group, name) for name, layer in layers.items()}
    return [*found, bench.deployed_quantized(merged_row, final)]
