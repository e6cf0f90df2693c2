"""The plain-LoRA warm-up: the first steps train W0 + scaling * B A unquantized, then s and b start from that weight.

The paper's first versions did so (arXiv 2402.04902v1, Algorithm 1); the final one does not mention it, so the default
is no warm-up. The phase follows from the step alone, which is how a resumed run finds it again.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l4q.distributed import gathered_units
from l4q.errors import UsageError
from l4q.linear import L4QLinear
from l4q.model import l4q_layers

log = logging.getLogger(__name__)


def in_warmup(step: int, warmup_steps: int) -> bool:
    """Whether the state after `step` optimizer steps has no grid of its own yet.

    The grid is initialised as the first quantized step begins, so a state saved right at the end still has none.
    """
    return warmup_steps > 0 and step <= warmup_steps


def start_warmup(model: nn.Module) -> None:
    """Let every wrapped layer compute as plain LoRA."""
    for _, layer in l4q_layers(model):
        layer.start_warmup()


def start_quantization(model: nn.Module) -> None:
    """Initialise every wrapped layer's s and b from its merged weight and quantize from now on."""
    for members in gathered_units(model, changed=("scales", "offsets")):
        for _, layer in members:
            if isinstance(layer, L4QLinear):
                layer.start_quantization()


class LoraWarmup(TrainerCallback):
    """Switches the layers of the Trainer's model between the two phases."""

    def __init__(self, steps: int) -> None:
        """Warm up for `steps` optimizer steps; 0 = not at all."""
        self._steps = steps
        self._waiting = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the phase of the step the run starts or continues from.

        Raises:
            UsageError: The run would end before quantization starts.
        """
        if self._steps >= state.max_steps:
            raise UsageError(
                "the LoRA warm-up leaves no step that quantizes",
                where="lora_warmup_steps",
                got=self._steps,
                expected=f"fewer than the run's {state.max_steps} steps",
                remedy="lower --lora-warmup-steps, or train longer",
            )
        self._waiting = in_warmup(state.global_step, self._steps)
        if self._waiting:
            start_warmup(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start quantization before the first step after the warm-up."""
        if self._waiting and state.global_step >= self._steps:
            start_quantization(kwargs["model"])
            self._waiting = False
            log.info(
                "step %d: quantization starts, scales and offsets initialised from the merged weights", self._steps
            )
