"""What torchtune, torchao and Unsloth do: fake-quantize the frozen W, train LoRA beside it, merge, quantize the sum.

With torchao installed its own fake-quantized layers train (their grid is computed anew in every forward pass).
Otherwise the layers hold its formula's values as constants: W is frozen, so torchao computes the same grid every time.
Step times then differ, and so does the code of a weight half-way between two (seen in torchao 0.18).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l4q.weight import QuantizedWeight
from tools.reproduction.adapters import add_deltas_, add_lora, deltas, half_adapters_, trainable
from tools.reproduction.bench import Deployed, Workbench, place
from tools.reproduction.quantizers import codes_on, pack, stored_bits, torchao_grid


def run(bench: Workbench) -> list[Deployed]:
    """Train, deploy as trained (mixed) and as these libraries save it."""
    model = bench.load()
    layers = bench.targets(model)
    frozen = _quantized(bench, layers)
    bench.notes["implementation"] = _prepare(bench, model, layers, frozen)
    tuned = add_lora(bench, model, layers)
    bench.train(tuned, trainable(tuned))
    changes = deltas(tuned)
    stored = sum(stored_bits(weight) for weight in frozen.values()) + half_adapters_(tuned)
    merged = add_deltas_(bench, bench.load(), changes)
    return [
        bench.deployed("torchao QAT + LoRA (as trained)", tuned, bench.bits, stored),
        bench.deployed_quantized("torchao QAT + LoRA, merged", _quantized(bench, bench.targets(merged))),
    ]


def _quantized(bench: Workbench, layers: Mapping[str, nn.Linear]) -> dict[str, QuantizedWeight]:
    found = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        grid = torchao_grid(weight, bench.bits, bench.recipe.group_size)
        found[name] = pack(codes_on(weight, grid, bench.bits), grid, bench.bits, name)
    return found


def _prepare(
    bench: Workbench, model: Any, layers: Mapping[str, nn.Linear], frozen: Mapping[str, QuantizedWeight]
) -> str:
    """Install the fake quantization; returns whose it is."""
    try:
        import torchao
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError:
        logging.getLogger(__name__).info("torchao is not installed; using its formula")
        place(model, frozen)
        return "formula"
    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{bench.bits}"), group_size=bench.recipe.group_size, is_symmetric=True
    )
    quantize_(model, QATConfig(weight_config=config, step="prepare"), filter_fn=lambda _, name: name in layers)
    model.requires_grad_(False)
    return f"torchao {torchao.__version__}"
