"""LoRA adapters by peft, on whatever linear layers a model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from tools.reproduction.bench import Workbench

ADAPTER = "default"


def add_lora(bench: Workbench, model: Any, names: Iterable[str]) -> Any:
    """Wrap a model with peft; only A and B train."""
    config = LoraConfig(
        r=bench.recipe.rank,
        lora_alpha=bench.recipe.alpha,  # type: ignore[arg-type] # peft computes with any number
        lora_dropout=0.0,
        target_modules=list(names),
        bias="none",
    )
    return get_peft_model(model, config)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted_layers(model: Any) -> dict[str, Any]:
    """peft's layers by their name in the original model."""
    base = model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """scaling * B A of every adapted layer, [out, in]."""
    return {name: layer.get_delta_weight(ADAPTER).detach() for name, layer in adapted_layers(model).items()}


@torch.no_grad()
def half_adapters_(model: Any) -> int:
    """Round A and B to fp16, as they are shipped beside the integers; returns the bits they take."""
    stored = 0
    for layer in adapted_layers(model).values():
        for part in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
            part.copy_(part.half().float())
            stored += 16 * part.numel()
    return stored


@torch.no_grad()
def add_deltas_(bench: Workbench, model: Any, changes: dict[str, torch.Tensor]) -> Any:
    """Add updates to the target layers of a plain model in place."""
    for name, layer in bench.targets(model).items():
        layer.weight.add_(changes[name])
    return model
