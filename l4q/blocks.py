"""A decoder's blocks, and how the model calls each of them on some sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l4q.errors import UnsupportedError

HIDDEN = "hidden_states"
"""transformers' name of a block's first argument."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is given beside the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states [batch, length, hidden]."""
        output = block(hidden, *self.args, **self.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """How a model calls its blocks."""

    hidden: list[torch.Tensor]
    """What the first block reads, [batch, length, hidden] per batch."""
    calls: list[list[Call]]
    """Per block, per batch."""


def decoder_blocks(model: nn.Module, targets: Collection[str]) -> dict[str, nn.Module]:
    """The blocks by dotted name, in order: the outermost list of modules that holds target layers.

    Raises:
        UnsupportedError: The model has no such list.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(target.startswith(f"{name}.") for target in targets):
            return {f"{name}.{number}": block for number, block in enumerate(module)}
    raise UnsupportedError(
        "the model has no list of blocks that could be reconstructed one after another",
        got=type(model).__name__,
        expected="a decoder whose layers are a torch.nn.ModuleList",
        remedy="train with --init calibrated",
    )


@torch.no_grad()
def record_calls(model: Any, blocks: Sequence[nn.Module], batches: Sequence[torch.Tensor]) -> Recording:
    """Run the model on every batch of token ids [batch, length] and keep what its blocks are called with."""
    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]

    def keeper(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != HIDDEN}
            calls[number].append(Call(args[1:], rest))
            if number == 0:
                hidden.append(args[0] if args else kwargs[HIDDEN])

        return keep

    hooks = [block.register_forward_pre_hook(keeper(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        for ids in batches:
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(hidden=hidden, calls=calls)
