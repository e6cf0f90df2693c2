"""L4Q: what is trained is what is measured, integer for integer."""

from __future__ import annotations

from typing import Any, cast

from l4q.calibrate import Moments, input_moments
from l4q.config import QuantConfig, ZeroPoint
from l4q.model import freeze_model, wrap_linears
from l4q.trainer import parameter_groups
from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.methods import METHODS


def run(bench: Workbench) -> list[Deployed]:
    """Wrap, train, freeze."""
    quant = QuantConfig(bits=bench.bits, group_size=bench.recipe.group_size, zero_point=cast(ZeroPoint, bench.variant))
    model = bench.load()
    init = bench.recipe.init
    moments = calibration_moments(bench, model) if init == "calibrated" else None
    wrap_linears(model, quant, bench.lora, init=init, moments=moments, skip_indivisible=True)
    bench.train(model, parameter_groups(model, bench.optim), distill=bench.recipe.distill)
    return [bench.deployed_quantized(METHODS[bench.cell.method].rows[0], dict(freeze_model(model)))]


def calibration_moments(bench: Workbench, model: Any) -> Moments:
    """E[x^2] of the target layers' inputs on the sequences that GPTQ sees."""
    sequences = [ids for batch in bench.calibration for ids in batch.tolist()]
    return input_moments(model, bench.targets(model), sequences)
