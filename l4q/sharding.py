"""Shard a model over the processes with FSDP2, although only process 0 has read its weights.

The other processes build the same modules on memory that is zero and therefore not yet there (`hollow_model`). Block
after block the weights go from process 0 to the devices of all, and each keeps its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from l4q.distributed import is_main, is_sharded_tensor, process_count
from l4q.errors import UnsupportedError, UsageError


def hollow_model(source: str, dtype: torch.dtype) -> Any:
    """A causal language model with the modules of `source` and all weights zero.

    Its memory is calloc's: the system provides a page when something is written to it, so reading zeros costs nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_untouched(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _untouched(buffer))
    model.tie_weights()
    return model.eval()


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Shard every parameter over the processes with FSDP2 and move the model to `device`, with process 0's weights.

    Blocks are the entries of the outermost nn.ModuleLists: for a decoder, its layers. What lies outside of them
    (embeddings, final norm, head) is one more unit, gathered for the whole of a step.

    Raises:
        UsageError: There is only one process.
        UnsupportedError: The model has no list of blocks, or is not the same on every process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if process_count() < 2:
        raise UsageError(
            "FSDP needs several processes",
            where="--fsdp",
            got="1 process",
            remedy="start with torchrun --nproc-per-node N -m l4q.cli_train ..., or leave --fsdp out",
        )
    blocks = list(_blocks(model))
    if not blocks:
        raise UnsupportedError(
            "the model cannot be sharded",
            where=type(model).__name__,
            expected="a torch.nn.ModuleList of blocks",
            remedy="train with DDP: leave --fsdp out",
        )
    _require_equal(model)
    mesh = init_device_mesh(device.type, (process_count(),))
    for unit in (*blocks, model):
        _spread(unit, device)
        fully_shard(unit, mesh=mesh)


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel() * tensor.element_size()
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(tensor.dtype).view(tensor.shape)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _require_equal(model: nn.Module) -> None:
    """All processes must hold tensors of the same names, shapes and dtypes, or the exchange would never end."""
    own = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in _tensors(model)]
    first: list[Any] = [own]
    dist.broadcast_object_list(first, src=0)
    verdict: list[Any] = [None] * process_count()
    dist.all_gather_object(verdict, first[0] == own)
    if not all(verdict):
        raise UnsupportedError(
            "the model is not the same on every process",
            where=type(model).__name__,
            got=next(([one, other] for one, other in zip(first[0], own, strict=False) if one != other), len(own)),
            expected="the tensors of process 0",
            remedy="train with DDP: leave --fsdp out",
        )


def _spread(unit: nn.Module, device: torch.device) -> None:
    """Move what is not sharded yet to the device and give it process 0's values."""
    for _, tensor in _tensors(unit):
        if not is_sharded_tensor(tensor):
            value = tensor.detach().to(device).contiguous()
            dist.broadcast(value.view(-1).view(torch.uint8), src=0)
            tensor.data = value


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def reads_weights(fsdp: bool) -> bool:
    """Whether this process reads the model's weights: with FSDP, process 0 does and gives them to the others."""
    return is_main() or not fsdp
