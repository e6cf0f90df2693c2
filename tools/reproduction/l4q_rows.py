"""L4Q: what is trained is what is measured, integer for integer."""

from __future__ import annotations

from typing import cast

from l4q.calibrate import input_moments
from l4q.config import QuantConfig, ZeroPoint
from l4q.model import freeze_model, wrap_linears
from l4q.trainer import parameter_groups
from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.methods import METHODS


def run(bench: Workbench) -> list[Deployed]:
    """Wrap, train, freeze."""
    quant = QuantConfig(bits=bench.bits, group_size=bench.recipe.group_size, zero_point=cast(ZeroPoint, bench.variant))
    model = bench.load()
    init, moments = bench.recipe.init, None
    if init == "calibrated":
        sequences = [ids for batch in bench.calibration for ids in batch.tolist()]
        moments = input_moments(model, bench.targets(model), sequences)
    wrap_linears(model, quant, bench.lora, init=init, moments=moments, skip_indivisible=True)
    bench.train(model, parameter_groups(model, bench.optim))
    return [bench.deployed_quantized(METHODS[bench.cell.method].rows[0], dict(freeze_model(model)))]
