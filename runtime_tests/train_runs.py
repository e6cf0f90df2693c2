"""A short training run on the tiny real model, and ways to look at what it left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from l4q.config import LoraConfig, QuantConfig
from l4q.train_options import TrainOptions
from l4q.train_state import list_states

Options = Callable[..., TrainOptions]
"""Options of a run; keywords change them."""

RECORDS, BATCH, ACCUM = 24, 2, 2
STEPS_PER_EPOCH = RECORDS // (BATCH * ACCUM)


def base_options(glassllm_dir: Path, folder: Path) -> TrainOptions:
    """Options of a run over nearly two epochs of `write_pairs`, with everything random switched on."""
    return TrainOptions(
        model=str(glassllm_dir),
        data=(write_pairs(glassllm_dir, folder / "pairs.jsonl"),),
        out=folder / "whole",
        quant=QuantConfig(zero_point="integer"),
        lora=LoraConfig(rank=4, dropout=0.1),
        leave_dense=True,
        steps=10,
        batch_size=BATCH,
        grad_accum=ACCUM,
        max_length=64,
        save_every=3,
        keep_states=99,
    )


def write_pairs(glassllm_dir: Path, path: Path) -> Path:
    """Write 24 prompt pairs of different lengths from real text."""
    text = (glassllm_dir.parent / "text" / "train.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line) > 60][:RECORDS]
    pairs = [{"prompt": line[:30], "completion": line[30:300]} for line in lines]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The last saved A, B, s and b."""
    return load_file(list_states(run)[-1][1] / "trainable.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewind(run: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it was after saving the state of `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoint")
    (copy / "result.json").unlink()
    for saved, folder in list_states(copy):
        if saved > step:
            shutil.rmtree(folder)
    return copy


def same_checkpoints(left: Path, right: Path) -> bool:
    """Whether two frozen checkpoints hold the same tensors, bit for bit."""
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start_state(made: TrainOptions) -> dict[str, torch.Tensor]:
    """A, B, s and b before the first step."""
    from l4q.model import trainable_state

    return {name: tensor.clone() for name, tensor in trainable_state(wrapped_model(made)).items()}


def wrapped_model(made: TrainOptions) -> Any:
    """The run's model before its first step."""
    from transformers import set_seed

    from l4q.train_model import load_model, wrap_model

    model, _ = load_model(made)
    set_seed(made.seed)
    wrap_model(model, made)
    return model
