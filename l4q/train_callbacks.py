"""What happens beside the training loop: metrics to JSON lines and the screen, held-out perplexity, a stop at NaN."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l4q.cli_command import progress_console
from l4q.distributed import whole
from l4q.durable import output_errors
from l4q.errors import L4QError
from l4q.train_state import newest_state
from l4q.train_view import View, choose_view

MEASURED = ("held_out_perplexity", "scale_drift", "clipped", "zero_point_moves")
"""Figures that not every step has, see `HeldOut` and `l4q.grid_watch`."""


class DivergedError(L4QError):
    """A loss or gradient that is NaN or infinite; saved states are kept."""


class StepReport(TrainerCallback):
    """Appends one JSON object per logged step to a file and shows the same figures on the screen (stderr).

    Keys: step, loss, lr_lora / lr_scales / lr_offsets, grad_norm, tokens (so far), tokens_per_s, memory_mb (peak: the
    GPU's allocator, else the process), elapsed_s and eta_s (of this session), and those of `MEASURED` that there are.
    """

    def __init__(self, path: Path) -> None:
        """Report to the JSON-lines file `path`."""
        self._path = path
        self._view: View | None = None
        self._started = 0.0
        self._first_step = 0
        self._last = (0.0, 0)
        self._stepped = 0.0
        self._rates: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the step the run continues from."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._last = (self._started, state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self._view = choose_view(progress_console())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates of this step; by the time it is logged, the schedule has moved on."""
        self._rates = {f"lr_{group['name']}": float(group["lr"]) for group in kwargs["optimizer"].param_groups}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when training proper ended: an evaluation may follow, and is not counted in tokens per second."""
        self._stepped = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the metrics of a step; the Trainer's closing summary has no loss and is not a step."""
        logs = kwargs["logs"]
        if "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        then, tokens_then = self._last
        self._last = (now, state.num_input_tokens_seen)
        done = max(state.global_step - self._first_step, 1)
        metrics = {
            "step": state.global_step,
            "loss": logs["loss"],
            **self._rates,
            "grad_norm": logs.get("grad_norm"),
            "tokens": state.num_input_tokens_seen,
            "tokens_per_s": (state.num_input_tokens_seen - tokens_then) / max(self._stepped - then, 1e-9),
            "memory_mb": peak_memory_mb(),
            "elapsed_s": now - self._started,
            "eta_s": (now - self._started) / done * (state.max_steps - state.global_step),
            **{key: logs[key] for key in MEASURED if key in logs},
        }
        with output_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._view is not None:
            self._view.show(metrics, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the view."""
        self.close()

    def close(self) -> None:
        """Close the view; safe to call again."""
        if self._view is not None:
            self._view.close()
            self._view = None


class HeldOut(TrainerCallback):
    """Measures held-out perplexity every so many steps, and after the last one.

    Training does not notice: no parameter, gradient or random generator changes.

    Args:
        measure: The perplexity of a model; every process of a run calls it.
        every: Steps between measurements; None = never.
    """

    def __init__(self, measure: Callable[[Any], float], every: int | None) -> None:
        self._measure, self._every = measure, every
        self._found: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time."""
        if self._every and (state.global_step % self._every == 0 or state.global_step == state.max_steps):
            with without_autocast(kwargs["model"]):
                self._found = {"held_out_perplexity": self._measure(kwargs["model"])}

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        found, self._found = self._found, {}
        return found


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """Take off the forward that accelerate put around a model for mixed precision: perplexities are float32's."""
    own = model.__dict__
    wrapped = own.pop("forward", None) if "_original_forward" in own else None
    try:
        yield
    finally:
        if wrapped is not None:
            own["forward"] = wrapped


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step that would write NaN or inf into the trainable parameters."""

    def __init__(self, run: Path) -> None:
        """Name the saved states of `run` in the error."""
        self._run = run

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the total norm; clipping has turned an infinite norm into NaN gradients by now."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not torch.isfinite(norm):
            raise diverged(self._run, state.global_step + 1, f"gradient norm {float(norm)}")


def diverged(run: Path, step: int, got: str) -> DivergedError:
    """The error for a run whose numbers are no longer finite; saved states are left as they are."""
    saved = newest_state(run)
    kept = f"the last good state is {saved[1]}" if saved else "no state had been saved yet"
    return DivergedError(
        f"training diverged at step {step}",
        where=run,
        got=got,
        expected="finite numbers",
        remedy=f"lower --lr (and --scale-lr, --offset-lr) or check the data; {kept}",
    )


def peak_memory_mb() -> float:
    """Peak memory in MB: of the current CUDA device's allocator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
