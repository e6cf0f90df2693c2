"""How a model calls its blocks is recorded without running them, and as if they had run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l4q.blocks import Call, decoder_blocks, record_calls
from runtime_tests.random_models import build_model
from runtime_tests.tiny_archs import SIZES, TINY_ARCHS

BATCHES = tuple(torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(length)) for length in (7, 5))


class Counter:
    """A block's own forward, counted."""

    def __init__(self, block: nn.Module) -> None:
        self.calls, self._forward = 0, block.forward
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Count and compute."""
        self.calls += 1
        return self._forward(*args, **kwargs)


class Block(nn.Module):
    """Adds a number; returns a tensor or a tuple, as transformers' blocks of some versions do."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(4, 4), as_tuple

    def forward(self, hidden_states: torch.Tensor, shift: Any) -> Any:
        """[batch, length, 4]."""
        output = self.linear(hidden_states) + shift["by"][0]
        return (output, None) if self.as_tuple else output


class Model(nn.Module):
    """Blocks that are told something the blocks before them have computed, unless `constant`."""

    device = torch.device("cpu")

    def __init__(self, *, constant: bool, as_tuple: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(as_tuple=as_tuple) for _ in range(3))
        self.constant = constant

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        """Ids to hidden states."""
        hidden = input_ids[..., None].expand(-1, -1, 4).float()
        for layer in self.layers:
            shift = torch.ones(1) if self.constant else hidden.mean()
            output = layer(hidden, shift={"by": [shift]})
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


def recorded_by_hooks(model: Any, blocks: list[nn.Module]) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """What the first block reads, and the keyword arguments of all blocks: the model runs as a whole."""
    hidden: list[torch.Tensor] = []
    kwargs: list[list[dict[str, Any]]] = [[] for _ in blocks]
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))]
    for number, block in enumerate(blocks):
        hooks.append(
            block.register_forward_pre_hook(lambda _, a, k, n=number: kwargs[n].append(dict(k)), with_kwargs=True)
        )
    with torch.no_grad():
        for ids in BATCHES:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return hidden, kwargs


def equal(one: Any, other: Any) -> bool:
    """Whether nested values are the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", TINY_ARCHS)
def test_the_record_is_that_of_a_whole_run(name: str) -> None:
    """For every architecture; only the first batch is computed, and the blocks are as before."""
    model: Any = build_model(TINY_ARCHS[name].model_type, {**SIZES, **TINY_ARCHS[name].changes}).eval()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = list(decoder_blocks(model, targets).values())
    hidden, kwargs = recorded_by_hooks(model, blocks)
    counters = [Counter(block) for block in blocks]
    recording = record_calls(model, blocks, BATCHES)
    assert equal(recording.hidden, hidden)
    assert equal([[call.kwargs for call in calls] for calls in recording.calls], kwargs)
    assert not equal(recording.hidden[::-1], hidden)
    assert [counter.calls for counter in counters] == [1] * (len(blocks) - 1) + [0]
    assert all(vars(block)["forward"] is counter for block, counter in zip(blocks, counters, strict=True))


@pytest.mark.parametrize(("constant", "as_tuple", "runs"), [(True, False, 1), (True, True, 2), (False, False, 2)])
def test_blocks_that_must_run_do(constant: bool, as_tuple: bool, runs: int) -> None:
    """Where a block is told what the ones before it have computed, or returns more than hidden states."""
    torch.manual_seed(0)
    model = Model(constant=constant, as_tuple=as_tuple)
    blocks = list(model.layers)
    _, kwargs = recorded_by_hooks(model, blocks)
    counters = [Counter(block) for block in blocks]
    recording = record_calls(model, blocks, BATCHES)
    assert equal([[call.kwargs for call in calls] for calls in recording.calls], kwargs)
    assert [counter.calls for counter in counters] == [runs, runs, 0]


def test_no_batches_are_no_calls() -> None:
    """An empty list is not an error here."""
    model = Model(constant=True, as_tuple=False)
    assert record_calls(model, list(model.layers), []).calls == [[], [], []]
    assert isinstance(record_calls(model, list(model.layers), BATCHES).calls[0][0], Call)
