"""transformers.Trainer with three learning rates, safetensors-only saved states, and a stop at non-finite losses.

Only what those three need is overridden; the loop, accumulation, clipping, schedule and distribution are the Trainer's.
The layers are ordinary modules, so another trainer or a plain loop works on a wrapped model just as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from l4q.distill import divergence, learned_positions, teacher_logits
from l4q.distributed import barrier, decide, is_main, is_sharded, own_rows, shared_stage
from l4q.errors import UsageError
from l4q.grid_watch import GridWatch
from l4q.model import load_trainable_state, trainable_state
from l4q.optim import make_optimizer
from l4q.reporters import finish_reporters
from l4q.state_tensors import save_sharded, saved_tensors
from l4q.train_callbacks import FiniteGradients, HeldOut, StepReport, diverged
from l4q.train_options import OptimOptions
from l4q.train_state import (
    TRAINABLE,
    load_optimizer,
    load_rng,
    prune_states,
    read_json,
    save_optimizer,
    save_rng,
    seal_state,
    state_folder,
    write_json,
)
from l4q.warmup import LoraWarmup

# last part of a parameter's name -> the group whose learning rate it follows
PARAMETER_GROUPS = {"lora_A": "lora", "lora_B": "lora", "scales": "scales", "offsets": "offsets"}


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Optimizer groups "lora", "scales" and "offsets" (those that train), for any torch optimizer.

    Raises:
        UsageError: A trainable parameter is of no known kind, or none is trainable.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in PARAMETER_GROUPS.values()}
    unknown = []
    for name, parameter in model.named_parameters():
        kind = PARAMETER_GROUPS.get(name.rpartition(".")[2])
        if parameter.requires_grad and kind is None:
            unknown.append(name)
        elif parameter.requires_grad and kind is not None:
            members[kind].append(parameter)
    if unknown or not any(members.values()):
        raise UsageError(
            "the model's trainable parameters are not those of L4Q layers",
            got=unknown[:5] or "no trainable parameter",
            expected=sorted(PARAMETER_GROUPS),
            remedy="call l4q.wrap_linears(model, ...) first and leave everything else frozen",
        )
    settings: dict[str, dict[str, Any]] = {
        "lora": {"lr": options.lr, "weight_decay": options.weight_decay},
        "scales": {"lr": options.scale_lr, "weight_decay": 0.0},
        "offsets": {"lr": options.offset_lr, "weight_decay": 0.0},
    }
    return [{"name": name, "params": params, **settings[name]} for name, params in members.items() if params]


class L4QTrainer(Trainer):
    """Trains a model made by `wrap_linears`.

    Args:
        model: The wrapped model.
        args: Trainer settings; output_dir is the run folder.
        optim: Learning rates and weight decay.
        keep_states: Saved states to keep.
        lora_warmup_steps: First steps that train plain LoRA.
        distill: Share of the loss that is the divergence from the original model, see `l4q.distill`.
        held_out: Measures perplexity in between.
        **kwargs: Passed on to transformers.Trainer (train_dataset, data_collator, ...).
    """

    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        optim: OptimOptions,
        keep_states: int,
        lora_warmup_steps: int = 0,
        distill: float = 0.0,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the Trainer and replace its console callbacks."""
        super().__init__(model=model, args=args, **kwargs)
        if is_sharded(model):
            # The Trainer's own word for a model that comes sharded: it must not be wrapped in DDP or sharded again.
            self.is_distributed_loading_by_transformers = True
        self._optim = optim
        self._keep_states = keep_states
        self._distill = distill
        self._run = Path(str(args.output_dir))
        self._report = StepReport(self._run / "metrics.jsonl")
        # The stock callbacks print to stdout, which belongs to the command's result.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(self._report)
        self.add_callback(FiniteGradients(self._run))
        self.add_callback(LoraWarmup(lora_warmup_steps))
        self._watch = GridWatch(model, self._run)
        self.add_callback(self._watch)
        self._held_out = held_out
        if held_out is not None:
            self.add_callback(held_out)
        self._place_reports()

    def _place_reports(self) -> None:
        """TensorBoard files go to one folder of the run, however often it is resumed, unless the user says where."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self._run / "tensorboard")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log of a step, with the held-out perplexity and the grid's figures, for every reporter."""
        if "loss" in logs:
            found = self._held_out.take() if self._held_out is not None else {}
            logs = {**logs, **found, **self._watch.measure()}
        super().log(logs, start_time)

    def close(self) -> None:
        """End the view, the reporters' runs, and the autocast that accelerate left in the forward."""
        self._report.close()
        finish_reporters(self.args.report_to)
        own = self.model.__dict__
        if own.pop("_original_forward", None) is not None:
            own.pop("forward", None)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW over `parameter_groups`, its moments kept as the options say."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self._optim)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = make_optimizer(groups, self._optim.state, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's step, stopping at a loss that is not finite.

        Raises:
            DivergedError: The loss is NaN or infinite; no optimizer step was made from it.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(self._run, self.state.global_step + 1, f"loss {float(loss)}")
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, of which a share is the divergence from the original model if asked for."""
        if not self._distill:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        teacher = teacher_logits(model, inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"]
        # As the Trainer scales its loss: over all processes and accumulated batches, or by the mean of this batch.
        together = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        count: Any = num_items_in_batch if together else learned_positions(labels)
        scale = self.accelerator.num_processes if together else 1
        kl = divergence(outputs.logits, teacher, labels) * scale / count
        loss = (1 - self._distill) * loss + self._distill * kl
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write RUN/state-<step>: complete under its final name, or not at all; every process writes what it keeps."""
        step = self.state.global_step
        state = trainable_state(self.model)
        broken = [name for name, tensor in state.items() if not torch.isfinite(own_rows(tensor).tensor).all()]
        if broken:
            raise diverged(self._run, step, f"non-finite values in {broken[:3]}")
        self.store_flos()
        with shared_stage(state_folder(self._run, step)) as stage:
            save_sharded(stage / TRAINABLE, state)
            save_optimizer(stage, self.optimizer, self._parameter_names())
            save_rng(stage, self.args.process_index)
            barrier()
            if is_main():
                write_json(stage / "scheduler.json", self.lr_scheduler.state_dict())
                self.state.save_to_json(str(stage / "trainer_state.json"))
                seal_state(stage, step)
        decide(lambda: prune_states(self._run, self._keep_states))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable_state(self.model, saved_tensors(Path(resume_from_checkpoint) / TRAINABLE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self._parameter_names())
            self.lr_scheduler.load_state_dict(read_json(Path(checkpoint) / "scheduler.json"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng(Path(checkpoint), self.args.process_index)

    def _parameter_names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}
