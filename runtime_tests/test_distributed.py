"""Several processes: two of them, each with half of the batch, end with what one process gets from all of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from l4q.model import load_trainable_state, save_l4q
from l4q.state_tensors import saved_tensors
from l4q.train import train
from l4q.train_model import load_model, wrap_model
from l4q.train_options import TrainOptions
from runtime_tests.distributed_worker import PROCESSES, SAVED, STEPS, WARMUP, global_options, reconstructed
from runtime_tests.train_runs import metrics, rewind, same_bits, same_checkpoints, write_pairs

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(PROCESSES), "--num_machines", "1"),
    *("--main_process_port", "0", "--dynamo_backend", "no"),
)


@pytest.fixture(scope="module")
def single(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A finished run of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("distributed")
    options = global_options(glassllm_dir, write_pairs(glassllm_dir, folder / "pairs.jsonl"), folder / "single")
    train(options)
    return options


@pytest.fixture(scope="module")
def runs(single: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `distributed_worker`, made by two processes with gloo; tests only read them."""
    folder = tmp_path_factory.mktemp("processes")
    launch(*LAUNCH, "-m", "runtime_tests.distributed_worker", single.model, str(single.data[0]), str(folder))
    return folder


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end and show what it said if it failed."""
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def seen(runs: Path, name: str) -> list[Any]:
    """What each process noted under a name."""
    return [json.loads((runs / f"{name}-{index}.json").read_text()) for index in range(PROCESSES)]


def distance(left: Path, right: Path, step: int = STEPS) -> float:
    """Largest difference of a saved A, B, s or b, relative to its tensor's largest value."""
    pairs = [saved_tensors(run / f"state-{step}/trainable.safetensors") for run in (left, right)]
    assert set(pairs[0]) == set(pairs[1])
    return max(
        float((pairs[0][name] - pairs[1][name]).abs().max() / pairs[0][name].abs().max().clamp(min=1e-6))
        for name in pairs[0]
    )


def other_weights(left: Path, right: Path) -> float:
    """Share of frozen weights that differ by more than a thousandth of the largest."""
    a, b = (L4QCheckpoint.open(run / "checkpoint") for run in (left, right))
    assert a.modules == b.modules
    assert a.dense_names == b.dense_names
    assert all(torch.equal(a.dense(name), b.dense(name)) for name in a.dense_names)
    differ = total = 0
    for module in a.modules:
        one, other = a.quantized(module).dequantize(), b.quantized(module).dequantize()
        differ += int((np.abs(one - other) > 1e-3 * np.abs(one).max()).sum())
        total += one.size
    return differ / total


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_to_ddp", "ddp_to_fsdp"])
def test_two_processes_equal_one(single: TrainOptions, runs: Path, name: str) -> None:
    """DDP, FSDP2 with checkpointing, and runs that went from one to the other: one process's losses and weights."""
    reference, run = metrics(single.out), metrics(runs / name)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in run] == pytest.approx([line[key] for line in reference], rel=1e-5)
    assert [line["tokens"] for line in run] == [line["tokens"] for line in reference]
    assert distance(single.out, runs / name) < 1e-3
    assert other_weights(single.out, runs / name) < 1e-3


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_again", "fsdp_to_ddp", "ddp_to_fsdp"])
def test_figures_of_the_grid_are_one_processs(single: TrainOptions, runs: Path, name: str) -> None:
    """Drift and clipped share of rows that lie on two processes are those of one, and not those of a step before."""
    for key, near in (("scale_drift", 1e-4), ("clipped", 2e-3)):
        expected = [line[key] for line in metrics(single.out) if line["step"] > WARMUP]
        found = {line["step"]: line[key] for line in metrics(runs / name) if key in line}
        assert list(found) == list(range(WARMUP + 1, STEPS + 1))
        assert list(found.values()) == pytest.approx(expected, rel=near)
        assert all(one != pytest.approx(other, rel=10 * near) for one, other in pairwise(expected))


def test_other_training_is_noticed(single: TrainOptions, runs: Path, tmp_path: Path) -> None:
    """The comparisons above see a run over the same data in another order."""
    other = replace(single, out=tmp_path / "other", seed=1)
    train(other)
    assert distance(other.out, runs / "ddp") > 0.1
    assert other_weights(other.out, runs / "ddp") > 0.05


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_resumed_processes_end_bit_equal(runs: Path, name: str) -> None:
    """Two processes continued from a saved state end with the bits of two that were never stopped."""
    assert distance(runs / name, runs / f"{name}_again") == 0
    assert [line["loss"] for line in metrics(runs / name)] == [line["loss"] for line in metrics(runs / f"{name}_again")]
    assert same_checkpoints(runs / name, runs / f"{name}_again")


def test_sharded_state_is_never_whole(runs: Path) -> None:
    """Each process has written about half of every tensor, and only process 0's files otherwise exist."""
    folder = runs / f"fsdp/state-{STEPS}"
    assert not (folder / "trainable.safetensors").exists()
    name = "model.layers.0.mlp.up_proj.scales"  # 341 rows
    lengths = []
    for part in sorted(folder.glob("trainable-*-of-00002.safetensors")):
        with safe_open(part, framework="pt") as handle:
            lengths.append(handle.get_slice(name).get_shape()[0])
    assert lengths == [171, 170]
    assert saved_tensors(folder / "trainable.safetensors")[name].shape[0] == 341
    assert {path.name for path in folder.glob("rng-*.json")} == {"rng-0.json", "rng-1.json"}


def test_one_process_freezes_a_sharded_state(single: TrainOptions, runs: Path, tmp_path: Path) -> None:
    """A state written by two processes gives one process the checkpoint that the two wrote, bit for bit."""
    model, _ = load_model(single)
    wrap_model(model, single)
    load_trainable_state(model, saved_tensors(runs / f"fsdp/state-{STEPS}/trainable.safetensors"))
    save_l4q(model, tmp_path / "checkpoint", quant=single.quant)
    assert same_checkpoints(tmp_path, runs / "fsdp")


def test_damaged_parts_are_refused(runs: Path, tmp_path: Path) -> None:
    """A part that is missing, or stands in for another one, is noticed."""
    folder = tmp_path / "state"
    shutil.copytree(runs / f"fsdp/state-{SAVED}", folder)
    first, second = sorted(folder.glob("trainable-*.safetensors"))
    shutil.copyfile(first, second)
    with pytest.raises(UsageError, match="lacks rows"):
        saved_tensors(folder / "trainable.safetensors")
    second.unlink()
    with pytest.raises(UsageError, match="not complete"):
        saved_tensors(folder / "trainable.safetensors")


def test_other_number_of_processes_is_refused(single: TrainOptions, runs: Path, tmp_path: Path) -> None:
    """A run is continued by as many processes as began it, for they share out the batch."""
    copy = rewind(runs / "ddp", tmp_path / "copy", SAVED)
    with pytest.raises(UsageError, match=r"(?s)only be resumed.*'processes': 1.*'processes': 2"):
        train(replace(single, out=copy, batch_size=1, resume=True))


def test_fsdp_needs_processes(single: TrainOptions, tmp_path: Path) -> None:
    """--fsdp without a launcher says what to do, and writes nothing."""
    with pytest.raises(UsageError, match="torchrun"):
        train(replace(single, out=tmp_path / "run", fsdp=True))
    assert not (tmp_path / "run").exists()


def test_one_process_reads_the_weights(runs: Path) -> None:
    """With FSDP the other process builds the model on zeros; the equal results above prove what it was given."""
    first, second = seen(runs, "weights")
    assert first > 0
    assert second == 0


def test_failure_is_told_once(runs: Path) -> None:
    """A refused run folder is process 0's error; the other ends with its exit code and without a message of its own."""
    first, second = seen(runs, "claim")
    assert re.match(r"(?s)UsageError 2: the run folder is not empty.*--resume", first)
    assert second.startswith("PeerError 2: process 0 failed")


def test_unequal_models_are_refused(runs: Path) -> None:
    """Processes that hold different models stop with the difference, instead of waiting for each other forever."""
    first, second = seen(runs, "unequal")
    assert first.startswith("UnsupportedError 3: the model is not the same on every process")
    assert "[4, 4]" in second
    assert "[5, 4]" in second


def test_what_cannot_be_spread_is_refused(runs: Path) -> None:
    """A model without blocks, 8-bit moments of a sharded one, and a run folder on a disk of process 0's own."""
    for name, message in (
        ("blockless", r"the model cannot be sharded\n  where: Linear\n  expected: a torch\.nn\.ModuleList of blocks"),
        ("eight_bit", "8-bit optimizer states cannot be sharded\n  where: optim_state\n  got: a model sharded by"),
    ):
        assert all(re.match(f"UnsupportedError 3: {message}", text) for text in seen(runs, name)), seen(runs, name)
    message = "UsageError 2: the run folder is not visible to every process\n  where: .*of-another-machine\n"
    assert seen(runs, "elsewhere")[0] == "none"
    message += "  got: process 1 does not see it\n  do: put --out on storage"
    assert re.match(message, seen(runs, "elsewhere")[1])


def test_every_process_reconstructs_alike(single: TrainOptions, runs: Path, tmp_path: Path) -> None:
    """Two processes keep the start that one finds, bit for bit, and train on from it alike."""
    made = reconstructed(replace(single, batch_size=1, grad_accum=single.grad_accum * PROCESSES), tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as launched: the order of a matrix product's sums depends on it, and so do last bits
    try:
        train(made)
    finally:
        torch.set_num_threads(threads)
    one, two = (load_file(run / "start.safetensors") for run in (made.out, runs / "reconstructed"))
    assert same_bits(one, two)
    assert distance(made.out, runs / "reconstructed", 2) < 1e-3
    moved = {name: tensor * (1 + 1e-6) for name, tensor in one.items()}
    assert not same_bits(moved, two)


def test_accelerate_launch_prints_one_result(single: TrainOptions, tmp_path: Path) -> None:
    """Accelerate's launcher, configured for FSDP, runs the command; one process prints and records the run."""
    run = tmp_path / "run"
    arguments = ["--data", str(single.data[0]), "--out", str(run), "--leave-dense", "--json"]
    arguments += ["--steps", "1", "--max-length", "32"]
    chosen = ("--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "no")
    done = launch(*ACCELERATE, *chosen, "-m", "l4q.cli_train", single.model, *arguments)
    assert json.loads(done.stdout)["steps"] == 1
    assert len(metrics(run)) == 1
    assert len(load_file(run / "state-1/trainable-00002-of-00002.safetensors")) > 0
    assert L4QCheckpoint.open(run / "checkpoint").modules


def test_accelerate_launch_with_bf16_is_amp(single: TrainOptions, tmp_path: Path) -> None:
    """Copies of the model (DDP) under the launcher's --mixed_precision bf16: recorded as --amp, float32 saved."""
    run = tmp_path / "run"
    arguments = ["--data", str(single.data[0]), "--out", str(run), "--leave-dense", "--json"]
    arguments += ["--steps", "1", "--max-length", "32"]
    chosen = ("--multi_gpu", "--mixed_precision", "bf16")
    done = launch(*ACCELERATE, *chosen, "-m", "l4q.cli_train", single.model, *arguments)
    assert json.loads(done.stdout)["steps"] == 1
    recorded = json.loads((run / "config.json").read_text())
    assert (recorded["processes"], recorded["options"]["amp"]) == (PROCESSES, "bfloat16")
    assert {tensor.dtype for tensor in load_file(run / "state-1/trainable.safetensors").values()} == {torch.float32}


def test_other_mixed_precision_is_refused(
    single: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 in accelerate's configuration stops the run with what to ask for instead."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match=r"(?s)fp16.*--mixed_precision bf16"):
        train(replace(single, out=tmp_path / "run"))
