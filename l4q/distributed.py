"""Several processes on one run: who decides and speaks, and how one model is spread over them.

Started by torchrun or accelerate launch, every process runs the whole of `l4q.train.train`. Process 0 alone writes the
run folder; what it finds there is told to the others (`decide`). A model is either replicated (DDP, the Trainer's
business) or sharded by `l4q.sharding` with torch's FSDP2: every parameter is a DTensor of which each process keeps a
run of rows, and the blocks of the model are gathered one at a time, in the forward, the backward and when freezing.

FSDP2 keeps dtypes: frozen 16-bit weights and float32 A, B, s and b travel in one gather, as bytes. Of accelerate's FSDP
settings only the fact that they are on is used: its plugin knows no CPU processes, and shards under other rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from l4q.errors import L4QError, PeerError, UsageError
from l4q.files import staged_folder
from l4q.train_options import Amp

T = TypeVar("T")

FSDP_VARIABLE = "ACCELERATE_USE_FSDP"
AMP_VARIABLE = "ACCELERATE_MIXED_PRECISION"
# accelerate's word -> `l4q.train_options.Amp`
AMP_WORDS: dict[str, Amp] = {"no": "none", "bf16": "bfloat16"}


class Rows(NamedTuple):
    """The part of a tensor that this process keeps."""

    start: int
    """First row; 0 for a tensor that is not sharded."""
    total: int
    """Rows of the whole tensor."""
    tensor: torch.Tensor
    """The rows themselves, a plain tensor that shares memory."""


def process_count() -> int:
    """Processes of this run; 1 if it was started without a launcher."""
    return dist.get_world_size() if _joined() else 1


def process_index() -> int:
    """This process's number, 0 for the one that writes and speaks."""
    return dist.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this is the process that writes the run folder."""
    return process_index() == 0


def fsdp_requested() -> bool:
    """Whether accelerate's launcher was configured for FSDP; takes the request over, so that accelerate stays out."""
    return os.environ.pop(FSDP_VARIABLE, "false").lower() == "true"


def amp_requested() -> Amp:
    """What accelerate's launcher was told of mixed precision; takes the request over, so that the run records it.

    Raises:
        UsageError: It asks for fp16 or fp8.
    """
    asked = os.environ.pop(AMP_VARIABLE, "no").lower()
    if asked not in AMP_WORDS:
        raise UsageError(
            "accelerate's configuration asks for another mixed precision",
            where=AMP_VARIABLE,
            got=asked,
            expected=f"one of {sorted(AMP_WORDS)}",
            remedy="accelerate launch --mixed_precision bf16 (or no)",
        )
    return AMP_WORDS[asked]


def on_cpu_processes() -> bool:
    """Whether a launcher started several processes on a machine without an accelerator; accelerate must be told."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def quiet_others() -> None:
    """Silence transformers' bars and notices on every process but the first."""
    from transformers.utils import logging

    if not is_main():
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def leave() -> None:
    """End the process group, if there is one; nothing may be exchanged afterwards."""
    if _joined():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if _joined():
        dist.barrier()


def decide(action: Callable[[], T]) -> T:
    """Let process 0 act and give its answer to every process.

    Raises:
        PeerError: On the other processes, if the action failed on process 0, where its own error is raised.
    """
    if process_count() == 1:
        return action()
    failure: BaseException | None = None
    message: list[Any] = [None, None]
    if is_main():
        try:
            message = [action(), None]
        except L4QError as error:
            failure, message = error, [None, error.exit_code]
        except BaseException as error:
            failure, message = error, [None, PeerError.exit_code]
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise PeerError(message[1])
    answer: T = message[0]
    return answer


@contextmanager
def shared_stage(target: Path) -> Iterator[Path]:
    """`l4q.files.staged_folder` that all processes may write into; complete when every one of them is.

    On several machines the folder must lie on storage that they share.
    """
    if process_count() == 1:
        with staged_folder(target, overwrite=True) as stage:
            yield stage
        return
    context = staged_folder(target, overwrite=True)
    stage = decide(lambda: context.__enter__())
    if not stage.is_dir():
        raise UsageError(
            "the run folder is not visible to every process",
            where=stage,
            got=f"process {process_index()} does not see it",
            remedy="put --out on storage that all machines share",
        )
    try:
        yield stage
        barrier()
    except BaseException as error:
        if is_main():
            context.__exit__(type(error), error, error.__traceback__)
        raise
    decide(lambda: context.__exit__(None, None, None))


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded (`l4q.sharding.shard_model`)."""
    return any(True for _ in _units(model))


def gathered_units(model: nn.Module, changed: tuple[str, ...] = ()) -> Iterator[list[tuple[str, nn.Module]]]:
    """Named modules of one unit after the other, with whole parameters until the next is asked for.

    All processes must run through it together. A model that is not sharded is one unit.

    Args:
        model: Any model.
        changed: Names of parameters that the caller changes in place; other changes to gathered ones are lost.
    """
    units = dict(_units(model))
    if not units:
        yield list(model.named_modules())
        return
    for unit_name, unit in units.items():
        members = [(name, module) for name, module in model.named_modules() if _owner(name, units) == unit_name]
        kept: list[tuple[nn.Module, str, torch.Tensor]] = []
        unit.unshard()
        try:
            yield members
            kept = [
                (module, name, parameter.detach().clone())
                for _, module in members
                for name, parameter in module.named_parameters(recurse=False)
                if name in changed
            ]
        finally:
            unit.reshard()
        for module, name, value in kept:
            own = own_rows(getattr(module, name))
            own.tensor.copy_(value[own.start : own.start + own.tensor.shape[0]])


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters that a forward without backward has left behind."""
    for _, unit in _units(model):
        unit.reshard()


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether this process keeps only some rows of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in full on every process; all of them must ask for it together if it is sharded."""
    sharded: Any = tensor
    full: torch.Tensor = sharded.full_tensor() if is_sharded_tensor(tensor) else tensor
    return full


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's values, in place; all of them must ask for it together."""
    dist.all_reduce(values)
    return values


def own_rows(tensor: torch.Tensor) -> Rows:
    """What this process keeps of a parameter, or of anything shaped like it."""
    if not is_sharded_tensor(tensor):
        return Rows(0, tensor.shape[0] if tensor.ndim else 1, tensor.detach())
    total = tensor.shape[0]
    step = -(-total // process_count())  # FSDP2 splits as torch.chunk does: all but the last parts are this large
    sharded: Any = tensor.detach()
    return Rows(min(process_index() * step, total), total, sharded.to_local())


def like(rows: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's rows as a tensor that is sharded as `parameter` is."""
    if not is_sharded_tensor(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    local = rows.to(parameter.device)
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that own FSDP parameters: the blocks, then the whole model."""
    if not _joined():
        return
    from torch.distributed.fsdp import FSDPModule

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    yield from sorted(found, key=lambda pair: pair[0] == "")


def _owner(name: str, units: dict[str, Any]) -> str:
    """The unit a module belongs to: the one whose name is its longest prefix."""
    return max((unit for unit in units if not unit or name == unit or name.startswith(f"{unit}.")), key=len)
