"""Self-distillation: the frozen W0, which a run keeps anyway, teaches the quantized model at no memory for weights.

Not in the paper. Beside the loss on the text, each position is given the original model's whole distribution over the
vocabulary, not one token, so that few steps say more. The teacher is the same module with its quantizer and A, B off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l4q.model import l4q_layers

IGNORED = -100
"""Labels that take no part in a loss, transformers' convention."""
BLOCK = 256
"""Positions whose distributions are in memory in float32 at once."""


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Let every wrapped layer multiply with W0 alone: neither A and B nor the quantizer."""
    layers = [layer for _, layer in l4q_layers(model)]
    for layer in layers:
        layer.adapting = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapting = True


@torch.no_grad()
def teacher_logits(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of the original model.

    Args:
        model: A wrapped model, or what DDP made of it.
        inputs: Of its forward; labels are left out.
    """
    with original(model):
        logits: torch.Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits


def divergence(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over the positions that predict a label.

    Args:
        student: Logits [batch, length, vocabulary]; gradients flow here.
        teacher: Logits of the same shape.
        labels: Token ids [batch, length], `IGNORED` where nothing is to be learned; position t predicts labels[t + 1].
    """
    learned = labels[:, 1:] != IGNORED
    left, right = student[:, :-1][learned], teacher[:, :-1][learned]
    total = left.new_zeros((), dtype=torch.float32)
    for some, others in zip(left.split(BLOCK), right.split(BLOCK), strict=True):
        total = total + checkpoint(_block_divergence, some, others, use_reentrant=False)
    return total


def learned_positions(labels: torch.Tensor) -> torch.Tensor:
    """How many positions `divergence` sums over, at least 1."""
    return (labels[:, 1:] != IGNORED).sum().clamp(min=1)


def _block_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    target, found = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)
    return F.kl_div(found, target, reduction="sum", log_target=True)
