"""What happens beside the training loop: metrics to JSON lines, a progress bar, and a stop at non-finite gradients."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from l4q.distributed import whole
from l4q.durable import output_errors
from l4q.errors import L4QError
from l4q.train_state import newest_state


class DivergedError(L4QError):
    """A loss or gradient that is NaN or infinite; saved states are kept."""


class StepReport(TrainerCallback):
    """Appends one JSON object per logged step to a file and shows the same figures on a progress bar (stderr).

    Keys: step, loss, lr_lora / lr_scales / lr_offsets, grad_norm, tokens (so far), tokens_per_s, memory_mb (peak: the
    GPU's allocator, else the process), elapsed_s and eta_s (of this session).
    """

    def __init__(self, path: Path) -> None:
        """Report to the JSON-lines file `path`."""
        self._path = path
        self._bar: tqdm[Any] | None = None
        self._started = 0.0
        self._first_step = 0
        self._last = (0.0, 0)
        self._rates: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start clock and bar at the step the run continues from."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._last = (self._started, state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates of this step; by the time it is logged, the schedule has moved on."""
        self._rates = {f"lr_{group['name']}": float(group["lr"]) for group in kwargs["optimizer"].param_groups}

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
            "tokens_per_s": (state.num_input_tokens_seen - tokens_then) / max(now - then, 1e-9),
            "memory_mb": peak_memory_mb(),
            "elapsed_s": now - self._started,
            "eta_s": (now - self._started) / done * (state.max_steps - state.global_step),
        }
        with output_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{metrics['loss']:.4f}",
                lr=f"{metrics['lr_lora']:.2e}",
                tok_s=f"{metrics['tokens_per_s']:.0f}",
                mem=f"{metrics['memory_mb']:.0f}MB",
                refresh=False,
            )
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar; safe to call again."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


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
