"""What `--init reconstructed` found: computed as a run begins, kept in its folder, read by whoever goes on with it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import nn

from l4q.blocks import decoder_blocks
from l4q.config import QuantConfig
from l4q.data import TrainingData
from l4q.durable import output_errors, sync_file
from l4q.errors import UnsupportedError, UsageError
from l4q.init import Start
from l4q.model import fitting
from l4q.reconstruct import BlockReport, ReconstructOptions, reconstruct
from l4q.starts import open_start
from l4q.state_tensors import saved_tensors
from l4q.targets import choose_targets
from l4q.train_options import TrainOptions

log = logging.getLogger(__name__)


class FoundStart(NamedTuple):
    """By layer."""

    weights: dict[str, torch.Tensor]
    """W0, [out, in]."""
    grids: dict[str, Start]
    """s and b."""


def find_start(model: Any, options: TrainOptions, data: TrainingData) -> FoundStart:
    """Reconstruct the blocks of a loaded model on sequences of the training data; its layers hold the new W0 then.

    Raises:
        UnsupportedError: The model is pre-quantized already, or has no list of blocks.
        UsageError: The options do not fit the model, see `l4q.model.wrap_linears`.
    """
    if open_start(options.model) is not None:
        raise UnsupportedError(
            "a pre-quantized model has a grid of its own, which reconstruction would not keep",
            where="--init reconstructed",
            got=options.model,
            expected="a model in floating point",
            remedy="leave --init out, or start from the original model",
        )
    grids = _layers(model, options)
    sequences = data.spread(cast(int, options.calibration))
    log.info("reconstructing blocks on %d sequences, %d times each", len(sequences), options.reconstruct_epochs)
    settings = ReconstructOptions(
        epochs=options.reconstruct_epochs,
        batch_size=options.batch_size,
        settle=options.reconstruct_settle,
        amp=options.amp == "bfloat16",
    )
    found = reconstruct(model, grids, sequences, settings, _Progress(len(decoder_blocks(model, grids))))
    return FoundStart({name: _weight(model, name).detach() for name in found}, found)


def save_found(path: Path, found: FoundStart) -> None:
    """Write the file, whole or not at all; no file if nothing was found.

    It holds `<layer>.weight` [out, in], `<layer>.scales` and `<layer>.offsets` [out, groups].
    """
    if not found.weights:
        return
    tensors = {f"{name}.weight": weight for name, weight in found.weights.items()}
    for name, grid in found.grids.items():
        tensors |= {f"{name}.scales": grid.scales, f"{name}.offsets": grid.offsets}
    part = path.with_name(f".{path.name}.part")
    with output_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        part.chmod(0o644)  # save_file leaves it readable by its owner only
        sync_file(part)
        os.replace(part, path)


@torch.no_grad()
def load_found(path: Path, model: Any) -> FoundStart:
    """Read the file, and give the layers of a loaded model its W0.

    Raises:
        UsageError: It is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise UsageError(
            "the run's reconstructed start is missing", where=path, remedy="start the run anew with --overwrite"
        )
    tensors = saved_tensors(path)
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        shape = list(linears[name].weight.shape) if name in linears else "no such layer"
        if list(tensors[f"{name}.weight"].shape) != shape:
            raise UsageError(
                "the run's reconstructed start is of another model",
                where=f"{path}: {name}",
                got=list(tensors[f"{name}.weight"].shape),
                expected=shape,
            )
        linears[name].weight.copy_(tensors[f"{name}.weight"])
    grids = {name: Start(tensors[f"{name}.scales"], tensors[f"{name}.offsets"]) for name in names}
    return FoundStart({name: _weight(model, name).detach() for name in names}, grids)


def _layers(model: nn.Module, options: TrainOptions) -> dict[str, QuantConfig]:
    """The layers that will be wrapped, by the same rules, with their grids."""
    patterns, head = options.lora.target_modules, options.quantize_head
    chosen = choose_targets(model, options.quant, patterns, overrides=options.overrides, skip=options.skip, head=head)
    names, _ = fitting(chosen, options.lora, skip_indivisible=options.leave_dense)
    return {name: chosen.grids[name] for name in names}


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return cast(nn.Linear, model.get_submodule(name)).weight


class _Progress:
    """One line of the log per block, with the time that is left."""

    def __init__(self, blocks: int) -> None:
        self._blocks, self._done, self._began = blocks, 0, time.monotonic()

    def __call__(self, report: BlockReport) -> None:
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._blocks - self._done)
        log.info("%s: error %.5f -> %.5f, %.0f s left", report.name, report.before, report.after, left)
