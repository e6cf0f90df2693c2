"""The paper's QAT-LoRA: s and b of Q(W0) are trained, LoRA stays outside the quantizer."""

from __future__ import annotations

from typing import cast

from torch.nn import functional as F

from l4q.config import QuantConfig
from l4q.trainer import parameter_groups
from tools.bench_models import QATLoRALinear, replace_linears
from tools.reproduction.bench import Deployed, Workbench, place
from tools.reproduction.quantizers import stored_bits


def run(bench: Workbench) -> list[Deployed]:
    """Train; deploy integers with 16-bit A and B beside them, and the sum W0 + BA coded on the trained grid."""
    quant = QuantConfig(bits=bench.bits, group_size=bench.recipe.group_size, zero_point="integer")
    model = bench.load()
    names = list(bench.targets(model))
    replace_linears(model, names, lambda layer: QATLoRALinear(layer, quant, bench.lora))
    bench.train(model, parameter_groups(model, bench.optim))
    layers = {name: cast(QATLoRALinear, model.get_submodule(name)) for name in names}
    alone = {name: layer.freeze(name, merged=False) for name, layer in layers.items()}
    stored = sum(stored_bits(weight) for weight in alone.values())
    mixed = bench.load()
    place(mixed, alone)
    for name, layer in layers.items():
        stored += 16 * (layer.lora_A.numel() + layer.lora_B.numel())
        a, b = layer.lora_A.detach().half().float(), layer.lora_B.detach().half().float()
        mixed.get_submodule(name).register_forward_hook(
            lambda _, args, y, a=a, b=b, scaling=layer.scaling: y + scaling * F.linear(F.linear(args[0], a), b)
        )
    return [
        bench.deployed("QAT-LoRA (mixed)", mixed, bench.bits, stored),
        bench.deployed_quantized(
            "QAT-LoRA, merged", {name: layer.freeze(name, merged=True) for name, layer in layers.items()}
        ),
    ]
