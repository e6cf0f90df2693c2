"""What every process of `test_distributed` runs: several trainings in one launch, as starting a process costs most."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from l4q import optim
from l4q.config import LoraConfig, QuantConfig
from l4q.distributed import decide, is_main, leave, process_index, shared_stage
from l4q.errors import L4QError
from l4q.optim import make_optimizer
from l4q.sharding import shard_model
from l4q.train import train
from l4q.train_model import load_model
from l4q.train_options import TrainOptions
from runtime_tests.train_runs import rewind

PROCESSES, STEPS, SAVED, WARMUP = 2, 5, 3, 2


def global_options(model: Path, data: Path, out: Path) -> TrainOptions:
    """Options for one process; every one of `PROCESSES` takes its share. With a LoRA warm-up and distillation."""
    return TrainOptions(
        model=str(model),
        data=(data,),
        out=out,
        quant=QuantConfig(zero_point="integer"),
        lora=LoraConfig(rank=4),
        init="l4q",  # the only one that DDP and FSDP both take
        leave_dense=True,
        lora_warmup_steps=WARMUP,
        distill=0.25,
        steps=STEPS,
        batch_size=PROCESSES,
        grad_accum=2,
        max_length=32,
        save_every=SAVED,
        keep_states=9,
    )


def reconstructed(options: TrainOptions, out: Path) -> TrainOptions:
    """The same from a reconstructed start, for two steps; batches of the blocks are a process's."""
    return replace(
        options,
        out=out,
        init="reconstructed",
        calibration=4,
        reconstruct_epochs=1,
        distill=0.0,
        lora_warmup_steps=0,
        steps=2,
    )


def main(model: Path, data: Path, folder: Path) -> None:
    """Train with DDP and with FSDP2, resume both from their states, resume each as the other, and fail twice."""
    options = replace(global_options(model, data, folder), batch_size=1)
    ddp, fsdp = folder / "ddp", folder / "fsdp"
    train(replace(options, out=ddp))
    train(replace(options, out=fsdp, fsdp=True, gradient_checkpointing=True))
    for name, source, sharded in (
        ("ddp_again", ddp, False),
        ("fsdp_again", fsdp, True),
        ("fsdp_to_ddp", fsdp, False),
        ("ddp_to_fsdp", ddp, True),
    ):
        out = folder / name
        decide(lambda out=out, source=source: rewind(source, out, SAVED))  # type: ignore[misc]
        train(replace(options, out=out, fsdp=sharded, gradient_checkpointing=source is fsdp, resume=True))
    train(reconstructed(options, folder / "reconstructed"))
    loaded, _ = load_model(replace(options, fsdp=True))
    weight = max(float(parameter.abs().max()) for parameter in loaded.parameters())
    note(folder / "weights", weight)
    unequal = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4 + process_index())])})
    note(folder / "claim", failure(lambda: train(replace(options, out=ddp))))
    note(folder / "unequal", failure(lambda: shard_model(unequal, torch.device("cpu"))))
    refusals(folder)
    leave()


def refusals(folder: Path) -> None:
    """A model without blocks, 8-bit moments of a sharded one, and a run folder on a disk of process 0's own."""
    note(folder / "blockless", failure(lambda: shard_model(nn.Linear(2, 2), torch.device("cpu"))))
    blocks = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]))
    shard_model(blocks, torch.device("cpu"))
    optim.EIGHT_BIT["torch"] = "torch.optim"  # a package that is there; sharded tensors are refused before it is used
    groups = [{"params": list(blocks.parameters())}]
    note(folder / "eight_bit", failure(lambda: make_optimizer(groups, "8bit", betas=(0.9, 0.95), eps=1e-8)))
    if is_main():
        decide(lambda: folder / "of-another-machine")
        note(folder / "elsewhere", "none")
    else:
        with ExitStack() as stack:
            note(folder / "elsewhere", failure(lambda: stack.enter_context(shared_stage(folder / "out"))))


def failure(action: Callable[[], object]) -> str:
    """The error an action ends with."""
    try:
        action()
    except L4QError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "none"


def note(path: Path, value: object) -> None:
    """Tell the test what this process saw."""
    path.with_name(f"{path.name}-{process_index()}.json").write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
