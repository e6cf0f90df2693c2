"""A decoder's blocks, and how the model calls each of them on some sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
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


def record_calls(model: Any, blocks: Sequence[nn.Module], batches: Sequence[torch.Tensor]) -> Recording:
    """Run the model on every batch of token ids [batch, length] and keep what its blocks are called with.

    What stands beside the hidden states (positions, masks) comes from the ids in most models. Where the first batch
    shows that it does, the blocks of all others only hand their input on.
    """
    if not batches:
        return Recording(hidden=[], calls=[[] for _ in blocks])
    recorder = _Recorder(model, blocks)
    first, rest = recorder.record(batches[:1]), None
    if recorder.returns_tensors:
        with _handing_on(blocks):
            if _same(first, recorder.record(batches[:1])):
                rest = recorder.record(batches[1:])
    if rest is None:
        rest = recorder.record(batches[1:])
    return Recording(
        hidden=first.hidden + rest.hidden,
        calls=[some + others for some, others in zip(first.calls, rest.calls, strict=True)],
    )


class _Recorder:
    """Runs a model and keeps its blocks' calls."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self.returns_tensors = True
        """Whether no block has been seen to return anything but hidden states."""

    @torch.no_grad()
    def record(self, batches: Sequence[torch.Tensor]) -> Recording:
        """The calls of every block, for every batch."""
        hidden: list[torch.Tensor] = []
        calls: list[list[Call]] = [[] for _ in self._blocks]

        def keeper(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {name: value for name, value in kwargs.items() if name != HIDDEN}
                calls[number].append(Call(args[1:], rest))
                if number == 0:
                    hidden.append(args[0] if args else kwargs[HIDDEN])
                if number == len(calls) - 1:
                    raise _Recorded

            return keep

        def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.returns_tensors &= isinstance(output, torch.Tensor)

        hooks = [block.register_forward_pre_hook(keeper(n), with_kwargs=True) for n, block in enumerate(self._blocks)]
        hooks += [block.register_forward_hook(look) for block in self._blocks]
        try:
            for ids in batches:
                with suppress(_Recorded):
                    self._model(input_ids=ids.to(self._model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return Recording(hidden=hidden, calls=calls)


class _Recorded(Exception):
    """The last block has been called: what the model would do from there on is of no interest."""


@contextmanager
def _handing_on(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks return the hidden states that they are given."""

    def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
        given: torch.Tensor = args[0] if args else kwargs[HIDDEN]
        return given

    own = [vars(block).get("forward") for block in blocks]  # what other libraries may have put over the class's
    try:
        for block in blocks:
            block.forward = hand_on
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _same(one: Any, other: Any) -> bool:
    """Whether two recordings, or parts of them, hold the same values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same(some, others) for some, others in zip(one, other, strict=True))
    if isinstance(one, (Recording, Call)):
        return _same(vars(one), vars(other))
    return bool(one is other or one == other)
