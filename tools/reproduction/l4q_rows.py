"""L4Q: what is trained is what is measured, integer for integer."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

from l4q.calibrate import Moments, input_moments
from l4q.config import GridLearning, Init, QuantConfig, ZeroPoint
from l4q.model import freeze_model, wrap_linears
from l4q.reconstruct import BlockReport, ReconstructOptions, reconstruct
from l4q.trainer import parameter_groups
from tools.reproduction.bench import Deployed, Workbench
from tools.reproduction.methods import METHODS


def run(bench: Workbench) -> list[Deployed]:
    """Wrap, train, freeze."""
    quant = QuantConfig(bits=bench.bits, group_size=bench.recipe.group_size, zero_point=cast(ZeroPoint, bench.variant))
    model = bench.load()
    wrap(bench, model, quant, bench.recipe.init)
    row = METHODS[bench.cell.method].rows[0]
    bench.notes["start_perplexity"] = bench.deployed_quantized(row, dict(freeze_model(model))).perplexity
    optim, moving = bench.optim, bench.recipe.moving(bench.cell.method)
    if moving is not None:
        optim = replace(optim, scale_lr=moving[0], offset_lr=moving[1])
    bench.train(model, parameter_groups(model, optim), distill=bench.recipe.distill)
    return [bench.deployed_quantized(row, dict(freeze_model(model)))]


def wrap(bench: Workbench, model: Any, quant: QuantConfig, init: Init) -> None:
    """Wrap the target layers; what starts from data sees the sequences that GPTQ sees."""
    given: dict[str, Any] = {}
    if init == "calibrated":
        given["moments"] = calibration_moments(bench, model)
    if init == "reconstructed":
        given["found"] = reconstruction(bench, model, quant)
    learning = GridLearning(move_base=bench.recipe.moving(bench.cell.method) is not None)
    wrap_linears(model, quant, bench.lora, init=init, learning=learning, skip_indivisible=True, **given)


def calibration_moments(bench: Workbench, model: Any) -> Moments:
    """E[x^2] of the target layers' inputs."""
    return input_moments(model, bench.targets(model), _sequences(bench))


def reconstruction(bench: Workbench, model: Any, quant: QuantConfig) -> Any:
    """s and b of the target layers, which get a new W0."""
    recipe, reports = bench.recipe, []

    def report(block: BlockReport) -> None:
        reports.append(asdict(block))

    options = ReconstructOptions(
        epochs=recipe.reconstruct_epochs, batch_size=recipe.batch, settle=recipe.reconstruct_settle, amp=recipe.amp
    )
    found = reconstruct(model, dict.fromkeys(bench.targets(model), quant), _sequences(bench), options, report)
    bench.notes["reconstruction"] = reports
    return found


def _sequences(bench: Workbench) -> list[list[int]]:
    return [ids for batch in bench.calibration for ids in batch.tolist()]
