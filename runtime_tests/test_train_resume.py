"""Run folders: a run that was killed and resumed ends with the very weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from l4q.errors import UsageError
from l4q.train import train
from l4q.train_options import TrainOptions
from l4q.train_state import is_intact, list_states, newest_state
from runtime_tests.train_runs import (
    ACCUM,
    BATCH,
    STEPS_PER_EPOCH,
    base_options,
    final_weights,
    metrics,
    rewind,
    same_bits,
    same_checkpoints,
)

Options = Callable[..., TrainOptions]


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Options of a short run over nearly two epochs, with everything random switched on."""
    return base_options(glassllm_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(base: TrainOptions) -> Path:
    """The folder of that run, uninterrupted; tests only read it."""
    train(base)
    return base.out


@pytest.fixture
def options(base: TrainOptions, tmp_path: Path) -> Options:
    """The same options for a folder of the test's own; keywords change them."""

    def make(**changes: Any) -> TrainOptions:
        return replace(base, **{"out": tmp_path / "run", **changes})

    return make


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, 9])
def test_resumed_run_ends_bit_equal(options: Options, whole: Path, tmp_path: Path, step: int) -> None:
    """Resuming mid-epoch, at an epoch's end, or in the second epoch gives the uninterrupted run's bits and losses."""
    resumed = rewind(whole, tmp_path / "resumed", step)
    train(options(out=resumed, resume=True))
    assert same_bits(final_weights(whole), final_weights(resumed))
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(resumed)]
    assert same_checkpoints(whole, resumed)


def test_other_seed_ends_elsewhere(options: Options, whole: Path) -> None:
    """The comparisons above notice a run that took another path."""
    train(options(seed=1))
    assert not same_bits(final_weights(whole), final_weights(options().out))
    assert not same_checkpoints(whole, options().out)


def test_damaged_state_is_not_trusted(options: Options, whole: Path, tmp_path: Path) -> None:
    """A newest state with one flipped bit, and one without manifest, are passed over for an older one."""
    damaged = rewind(whole, tmp_path / "damaged", 9)
    moments = damaged / "state-9/optimizer.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    (damaged / "state-6/state.json").unlink()
    assert not is_intact(damaged / "state-9")
    assert newest_state(damaged) == (3, damaged / "state-3")
    train(options(out=damaged, resume=True))
    assert same_bits(final_weights(whole), final_weights(damaged))


def test_killed_process_resumes_bit_equal(options: Options, tmp_path: Path) -> None:
    """A process killed with SIGKILL in mid-training and resumed gives the uninterrupted run's weights."""
    steps = 40
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train(options(out=unbroken, steps=steps, save_every=5))
    arguments = [
        options().model,
        "--data",
        str(options().data[0]),
        "--out",
        str(killed),
        "--leave-dense",
        "--steps",
        str(steps),
    ]
    arguments += ["--zero-point", "integer", "--rank", "4", "--dropout", "0.1", "--max-length", "64"]
    arguments += ["--batch-size", str(BATCH), "--grad-accum", str(ACCUM), "--save-every", "5", "--keep-states", "99"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from l4q.cli_train import main; main()", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (killed / "state-10").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "result.json").exists()
    assert not (killed / f"state-{steps}").exists()
    train(options(out=killed, steps=steps, save_every=5, resume=True))
    assert same_bits(final_weights(unbroken), final_weights(killed))
    assert [line["step"] for line in metrics(killed)] == list(range(1, steps + 1))


def test_run_folder_holds_no_pickle(whole: Path) -> None:
    """Everything a run writes is JSON, safetensors or a text that came with the model."""
    names = {path.name for path in whole.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in names - {"LICENSE"}} == {".json", ".jsonl", ".safetensors"}


def test_finished_run_is_returned_again(options: Options, whole: Path) -> None:
    """Resuming a complete run trains nothing and returns the same result."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train(options(out=whole, resume=True)) == json.loads((whole / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_killed_between_last_step_and_freeze(options: Options, whole: Path, tmp_path: Path) -> None:
    """A run whose last state is there but whose checkpoint is not gets the checkpoint without another step."""
    expected = json.loads((whole / "result.json").read_text())
    resumed = rewind(whole, tmp_path / "resumed", 10)
    result = train(options(out=resumed, resume=True))
    assert [result[key] for key in ("steps", "final_loss")] == [expected[key] for key in ("steps", "final_loss")]
    assert same_checkpoints(whole, resumed)


def test_only_newest_states_are_kept(options: Options) -> None:
    """keep_states bounds the disk a run takes."""
    train(options(keep_states=2))
    assert [step for step, _ in list_states(options().out)] == [9, 10]


def test_existing_run_needs_a_decision(options: Options) -> None:
    """A second run into the same folder is refused, replaced with overwrite, and never silently continued."""
    train(options(steps=2))
    with pytest.raises(UsageError, match=r"(?s)not empty.*--resume.*--overwrite"):
        train(options(steps=2))
    assert train(options(steps=3, overwrite=True))["steps"] == 3
    with pytest.raises(UsageError, match=r"(?s)only be resumed.*'seed': 5.*'seed': 0"):
        train(options(steps=3, seed=5, resume=True))


def test_changed_data_is_not_resumed(options: Options, tmp_path: Path) -> None:
    """Other training text under another name is recognised by its hash; the same text elsewhere is fine."""
    train(options(steps=2))
    other, same = tmp_path / "other.jsonl", tmp_path / "same.jsonl"
    same.write_bytes(options().data[0].read_bytes())
    other.write_bytes(options().data[0].read_bytes().replace(b"the", b"teh", 1))
    train(options(steps=2, data=(same,), resume=True))
    with pytest.raises(UsageError, match="data sha256"):
        train(options(steps=2, data=(other,), resume=True))


def test_foreign_folder_is_never_deleted(options: Options, tmp_path: Path) -> None:
    """--overwrite deletes runs only."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not written by l4q-train"):
        train(options(out=precious, overwrite=True))
    assert (precious / "config.json").read_text() == "{}"
