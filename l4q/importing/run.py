"""`import_model`: plan, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from l4q.checkpoint import save_checkpoint
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import VerificationError
from l4q.files import refuse_existing
from l4q.importing.fit import fit
from l4q.importing.plan import ImportPlan, make_plan
from l4q.importing.source import Source
from l4q.weight import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What `l4q-import` is asked to do."""

    source: str
    """GPTQ, AWQ or compressed-tensors folder or hub id, or a GGUF file."""
    out: Path
    """Checkpoint folder to create."""
    config: Path | None = None
    """Hugging Face folder whose config and tokenizer are taken in place of those in a GGUF file."""
    zero_point: ZeroPoint | None = None
    """Kind of zero-point of the checkpoint; None: the narrowest of those that hold most modules."""
    allow_dense: bool = False
    """Keep modules that do not fit as dense float32 weights, instead of stopping."""
    dry_run: bool = False
    """Plan only; `ImportPlan.check` is left to the caller."""
    overwrite: bool = False
    """Replace an existing folder."""


def import_model(options: ImportOptions, progress: Callable[[str], None] = lambda module: None) -> ImportPlan:
    """Write a pre-quantized model's own integers as an L4Q checkpoint, one module in memory at a time.

    Args:
        options: See there.
        progress: Called with each module that was written.

    Raises:
        UsageError: The source is damaged or no pre-quantized model, or the output folder exists.
        UnsupportedError: The source's format, architecture, or every module is beyond a checkpoint.
        InexactError: Some modules are, and `allow_dense` is false.
        VerificationError: A module does not dequantize to the source's values; nothing is left behind.
    """
    if not options.dry_run:
        refuse_existing(options.out, overwrite=options.overwrite)
    source = Source.open(options.source, options.config)
    plan = make_plan(source, options.zero_point)
    if options.dry_run:
        return plan
    plan.check(allow_dense=options.allow_dense)
    quant = cast(QuantConfig, plan.quant)
    with source.side_files() as side_files:
        save_checkpoint(
            options.out,
            config=source.config,
            weights=_weights(source, plan.exact, quant, progress),
            dense=_dense(source, plan),
            quant=quant,
            modules_to_not_convert=source.linears - set(plan.exact),
            side_files=side_files,
            overwrite=options.overwrite,
        )
    return plan


def _weights(
    source: Source, modules: tuple[str, ...], quant: QuantConfig, progress: Callable[[str], None]
) -> Iterator[tuple[str, QuantizedWeight]]:
    for module in modules:
        grid = source.grid(module)
        weight = "it has no integers" if grid is None else fit(grid, quant, module)
        if isinstance(weight, str) or not np.array_equal(weight.dequantize(), source.values(module).numpy()):
            raise VerificationError(
                "an imported module is not the source's",
                where=f"{source.path}: {module}",
                got=weight if isinstance(weight, str) else "other weights",
                expected="the source's weights, every one of them equal",
                remedy="if the source did not change meanwhile, this is a defect of l4q: please report it",
            )
        yield module, weight
        progress(module)


def _dense(source: Source, plan: ImportPlan) -> Iterator[tuple[str, torch.Tensor]]:
    yield from source.dense()
    for module in plan.refused:
        yield f"{module.name}.weight", source.values(module.name)
