"""The two calls between a transformers model and a checkpoint: `prepare` before training, `freeze` after it.

They are the short forms of `l4q.model.wrap_linears` and `l4q.model.save_l4q`, which take every option there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4q.config import BaseStorage, Init, LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.rules import Override

if TYPE_CHECKING:
    from torch import nn

    from l4q.checkpoint import L4QCheckpoint
    from l4q.model import WrapReport


def prepare(
    model: nn.Module,
    quant: QuantConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    init: Init = "l4q",
    storage: BaseStorage = "dense",
    overrides: Sequence[Override] = (),
    skip: Sequence[str] = (),
    skip_indivisible: bool = False,
    quantize_head: bool = False,
) -> WrapReport:
    """Put LoRA and the quantizer into a model's linear layers, in place; train what then requires gradients.

    Args:
        model: A causal language model of transformers.
        quant: The grid; 4 bits, symmetric, groups of 64 if None.
        lora: Rank, scaling and target modules; rank 8 on every linear layer if None.
        init: How scales and offsets start, see `l4q.init`.
        storage: How the frozen weights are kept, see `l4q.base`.
        overrides: Other grids for some modules; the first that matches a module holds.
        skip: Patterns of modules that stay dense.
        skip_indivisible: Leave layers dense whose in_features the group size does not divide, instead of stopping.
        quantize_head: Quantize the output head too.

    Raises:
        UsageError: As `l4q.model.wrap_linears`.
        UnsupportedError: Likewise.
    """
    from l4q.model import wrap_linears

    return wrap_linears(
        model,
        quant or QuantConfig(),
        lora or LoraConfig(),
        init=init,
        storage=storage,
        overrides=overrides,
        skip=skip,
        skip_indivisible=skip_indivisible,
        quantize_head=quantize_head,
    )


def freeze(
    model: Any, out: str | Path, *, side_files_from: str | Path | None = None, overwrite: bool = False
) -> L4QCheckpoint:
    """Write a prepared model as an L4Q checkpoint: the integers it multiplied with, bit for bit.

    In a distributed run every process calls it.

    Args:
        model: A PreTrainedModel after `prepare`.
        out: Folder to create.
        side_files_from: Folder whose tokenizer, template and licence files are copied; runtimes want them.
        overwrite: Replace an existing folder.

    Returns:
        The checkpoint, opened.

    Raises:
        UsageError: The model was not prepared, the folder exists, or training left non-finite scales.
    """
    from l4q.checkpoint import L4QCheckpoint
    from l4q.distributed import barrier
    from l4q.model import l4q_layers, save_l4q, trained_grid

    if next(l4q_layers(model), None) is None:
        raise UsageError(
            "the model has no L4Q layers to freeze",
            got=type(model).__name__,
            expected="a model after l4q.prepare",
            remedy="call l4q.prepare(model) and train before freezing",
        )
    save_l4q(model, out, quant=trained_grid(model), side_files_from=side_files_from, overwrite=overwrite)
    barrier()  # the others open what process 0 has written
    return L4QCheckpoint.open(out)
