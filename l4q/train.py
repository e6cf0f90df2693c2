"""One training run from options to a frozen checkpoint: `train(TrainOptions(...))`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments, set_seed

from l4q.data import TrainingData, load_training_data, make_collator, padding_id, require_known
from l4q.distributed import (
    amp_requested,
    decide,
    fsdp_requested,
    on_cpu_processes,
    quiet_others,
    reshard,
)
from l4q.errors import UsageError
from l4q.evaluate import text_windows, windows_perplexity
from l4q.files import portable_tokenizer_config
from l4q.found_start import FoundStart, find_start, load_found, save_found
from l4q.kernels.select import kernels_for
from l4q.model import load_trainable_state, save_l4q, trained_grid, unquantized
from l4q.reporters import require_reporters
from l4q.run_folder import RunFolder
from l4q.sharding import shard_model
from l4q.state_tensors import saved_tensors
from l4q.train_callbacks import HeldOut
from l4q.train_model import load_model, wrap_model
from l4q.train_options import EvalOptions, TrainOptions
from l4q.train_state import TRAINABLE, read_json, write_json
from l4q.trainer import L4QTrainer

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024
DEFAULT_WINDOW = 512
LOSS_SPAN = 10
"""Steps the reported first and last losses are averaged over."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Held-out windows, measured at the three stages of a run; without windows it measures nothing."""

    windows: Sequence[Sequence[int]]

    def measure(self, stage: str, model: Any) -> dict[str, float]:
        """{stage: perplexity}, or {} if there is no evaluation text."""
        if not self.windows:
            return {}
        value = self.perplexity(model)
        log.info("perplexity, %s: %.3f", stage, value)
        return {stage: value}

    def perplexity(self, model: Any) -> float:
        """Perplexity on the windows; every process of a run takes part."""
        value = windows_perplexity(model, self.windows).value
        reshard(model)
        return value


class TrainingInput(NamedTuple):
    """What the loop reads: examples, the id they are padded with, and what it is measured on."""

    data: TrainingData
    pad: int
    held_out: HeldOut


def train(options: TrainOptions) -> dict[str, Any]:
    """Train, freeze, and write RUN/checkpoint.

    Returns:
        The content of RUN/result.json: paths, steps, losses, and perplexities "base" (the unquantized model), "start"
        (quantized, before training) and "trained", if an evaluation text was given.

    Raises:
        UsageError: Bad options, data or run folder.
        UnsupportedError: A model or chat template that cannot be trained.
        DivergedError: The loss or a gradient became NaN or infinite.
    """
    amp = amp_requested()
    if amp != "none" and options.dtype == "float32":  # bfloat16 weights need no autocast
        options = replace(options, amp=amp)
    options = replace(options, fsdp=fsdp_requested() or options.fsdp)
    require_reporters(options.report_to)
    args = training_arguments(options)
    device = args.device  # joins the other processes, if there are any
    quiet_others()
    kernels_for(options.kernels, device.type)  # refuses what cannot run there
    run = RunFolder(options.out)
    try:
        decide(lambda: run.claim(options))
        return _train(options, args, run)
    finally:
        run.release()


def _train(options: TrainOptions, args: TrainingArguments, run: RunFolder) -> dict[str, Any]:
    """`train`, within a run folder that is this process's."""
    device = args.device
    model, tokenizer = load_model(options)
    context = context_length(model)
    data = load_training_data(options.data, tokenizer, max_length=_fit(options.max_length, DEFAULT_LENGTH, context))
    require_known(data, model.get_input_embeddings().weight.shape[0])
    log.info("data: %s", data.words())
    evaluator = Evaluator(windows=evaluation_windows(options.evaluation, model, tokenizer))
    decide(lambda: run.check(options, data.facts()))
    finished = decide(lambda: run.finished(options))
    if finished is not None:
        log.info("the run is complete; nothing to do")
        return finished

    set_seed(options.seed)
    if not options.fsdp and options.base_storage == "dense":
        model.to(device)
    found, base = _found_start(model, options, data, run, evaluator)
    report = wrap_model(model, options, data, found.grids)
    if not options.fsdp:
        model.to(device)  # packed weights are packed on the CPU: the device never sees them dense
    log.info("%d linear layers quantized, %d left dense", len(report.wrapped), len(report.dense))
    if options.fsdp:
        shard_model(model, device)
    with unquantized(model):
        perplexities = base or evaluator.measure("base", model)
    perplexities |= evaluator.measure("start", model)
    decide(lambda: run.start(options, data.facts()))
    decide(lambda: None if run.found_start.exists() else save_found(run.found_start, found))

    began, use_cache = time.monotonic(), model.config.use_cache
    held_out = HeldOut(evaluator.perplexity, options.evaluation.every)
    state = _fit_model(model, args, options, run, TrainingInput(data, padding_id(tokenizer), held_out))
    model.config.use_cache = use_cache  # the Trainer switches it off, and the checkpoint would generate without one
    seconds = time.monotonic() - began
    perplexities |= evaluator.measure("trained", model)
    # A run killed before it recorded its result has left a checkpoint; someone may be reading it.
    save_frozen(model, tokenizer, options, run.checkpoint, overwrite=True)
    result = {
        "run": str(run.path),
        "checkpoint": str(run.checkpoint),
        **_loss_summary(state),
        "tokens": state["num_input_tokens_seen"],
        "seconds": round(seconds, 3),
        "perplexity": perplexities,
        "quantized_layers": len(report.wrapped),
        "dense_layers": len(report.dense),
        "data": data.facts(),
    }
    decide(lambda: write_json(run.result, result))
    return result


def _found_start(
    model: Any, options: TrainOptions, data: TrainingData, run: RunFolder, evaluator: Evaluator
) -> tuple[FoundStart, dict[str, float]]:
    """What init "reconstructed" finds or has found, and the original model's perplexity; else nothing."""
    if options.init != "reconstructed":
        return FoundStart({}, {}), {}
    base = evaluator.measure("base", model)
    if options.resume and run.config.exists():
        return load_found(run.found_start, model), base
    return find_start(model, options, data), base


def context_length(model: Any) -> int | None:
    """The model's longest sequence in tokens, if its config says so."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if value is None else int(value)


def training_arguments(options: TrainOptions) -> TrainingArguments:
    """The Trainer's settings for these options."""
    epochs = 1.0 if options.epochs is None else options.epochs
    return TrainingArguments(
        output_dir=str(options.out),
        use_cpu=on_cpu_processes() or not torch.accelerator.is_available(),  # else the Trainer refuses bf16 there
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        max_steps=options.steps or -1,
        num_train_epochs=epochs,
        learning_rate=options.optim.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.optim.warmup_ratio,
        max_grad_norm=options.optim.max_grad_norm,
        bf16=options.amp == "bfloat16",
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # s and b take no part in a LoRA warm-up.
        ddp_find_unused_parameters=options.lora_warmup_steps > 0,
        seed=options.seed,
        data_seed=options.seed,
        save_strategy="steps",
        save_steps=options.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=list(options.report_to) or "none",
        run_name=options.out.resolve().name,
        disable_tqdm=True,
    )


def _fit_model(
    model: Any, args: TrainingArguments, options: TrainOptions, run: RunFolder, given: TrainingInput
) -> dict[str, Any]:
    """Train from the start or the newest state; returns the final trainer_state.json's content."""
    trainer = L4QTrainer(
        model,
        args,
        optim=options.optim,
        keep_states=options.keep_states,
        lora_warmup_steps=options.lora_warmup_steps,
        distill=options.distill,
        held_out=given.held_out,
        train_dataset=given.data.examples,
        data_collator=make_collator(given.pad),
    )
    point = decide(run.resume_point)
    if point is not None:
        log.info("continuing from %s", point[1])
        saved: dict[str, Any] = read_json(point[1] / "trainer_state.json")
        if saved["global_step"] >= saved["max_steps"]:  # killed between the last step and the freeze
            load_trainable_state(model, saved_tensors(point[1] / TRAINABLE))
            return saved
    try:
        trainer.train(resume_from_checkpoint=str(point[1]) if point else None)
    finally:
        trainer.close()
    return dict(vars(trainer.state))


def save_frozen(model: Any, tokenizer: Any, options: TrainOptions, out: Path, *, overwrite: bool = False) -> None:
    """Freeze a trained model into a new L4Q checkpoint folder, with the base model's tokenizer and licence.

    Args:
        model: The wrapped model, on the device it was trained on: another one may round B @ A to other bits.
        tokenizer: Of the base model.
        options: Of the run.
        out: Folder to create.
        overwrite: Replace an existing folder.

    Raises:
        UsageError: The folder exists, or scales are not finite.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(options.model)
        if not folder.is_dir():  # a hub id or a GGUF file: tokenizer and generation settings come from what was loaded
            folder = Path(scratch)
            tokenizer.save_pretrained(folder)
            portable_tokenizer_config(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        save_l4q(model, out, quant=trained_grid(model), side_files_from=folder, overwrite=overwrite)


def _loss_summary(state: dict[str, Any]) -> dict[str, float | int]:
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    first, last = losses[:LOSS_SPAN], losses[-LOSS_SPAN:]
    return {
        "steps": state["global_step"],
        "first_loss": math.fsum(first) / len(first),
        "final_loss": math.fsum(last) / len(last),
    }


def evaluation_windows(options: EvalOptions, model: Any, tokenizer: Any) -> list[list[int]]:
    """The windows to measure perplexity on; none without a text.

    Raises:
        UsageError: The text cannot be read or is too short, or a window exceeds the model's context.
    """
    if options.text is None:
        return []
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the evaluation text cannot be read", where=options.text, got=error) from error
    window = _fit(options.window, DEFAULT_WINDOW, context_length(model))
    return text_windows(tokenizer, text, window, options.windows)


def _fit(asked: int | None, default: int, context: int | None) -> int:
    """The length asked for, or the default cut to the model's context.

    Raises:
        UsageError: More tokens were asked for than the model can read.
    """
    if asked is None:
        return default if context is None else min(default, context)
    if context is not None and asked > context:
        raise UsageError("the sequence length exceeds the model's context", got=asked, expected=f"at most {context}")
    return asked
