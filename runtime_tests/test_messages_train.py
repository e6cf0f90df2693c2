"""What training, its data and its files say when they refuse, message by message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

from l4q import optim
from l4q.base import PackedBase
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.data import load_training_data
from l4q.data_records import read_records
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.evaluate import text_windows
from l4q.files import refuse_existing
from l4q.kernels.select import kernels_for, require_kernels
from l4q.linear import L4QLinear
from l4q.model import load_trainable_state, trainable_state
from l4q.refreeze import FreezeOptions, find_state, recorded_options
from l4q.rules import Override
from l4q.sharding import shard_model
from l4q.shards import ShardReader
from l4q.train import train
from l4q.train_callbacks import diverged
from l4q.train_model import load_model
from l4q.train_options import OptimOptions, TrainOptions
from l4q.train_state import load_rng
from l4q.trainer import parameter_groups
from runtime_tests.conftest import CheckpointMaker


def layer() -> L4QLinear:
    """A wrapped layer of 4 rows and 32 columns."""
    return L4QLinear(nn.Parameter(torch.randn(4, 32)), None, QuantConfig(group_size=32), LoraConfig(), kernels="eager")


RECORDS = {
    "this kind of training file is not known": ("data.csv", "text"),
    "the training file is empty": ("data.txt", " \n"),
    "a .json training file must hold a list of records": ("data.json", '{"text": "x"}'),
    "the training record has no known format": ("data.jsonl", '{"txt": "x"}'),
    "a training text is not a string": ("data.jsonl", '{"text": 3}'),
    "a chat message is malformed": ("data.jsonl", '{"messages": [{"role": "user"}]}'),
    "a chat message has an unknown role": ("data.jsonl", '{"messages": [{"role": "me", "content": "x"}]}'),
}


@pytest.mark.parametrize("message", RECORDS)
def test_files_that_are_no_training_data(tmp_path: Path, message: str) -> None:
    """Each is refused with its place."""
    name, content = RECORDS[message]
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as raised:
        list(read_records(tmp_path / name))
    assert name in str(raised.value)


REFUSED: dict[str, tuple[type[L4QError], Callable[[], object]]] = {
    "an override needs a pattern and a field": (UsageError, lambda: Override(pattern="", bits=3)),
    "the kernels do not run there": (UnsupportedError, lambda: kernels_for("numba", "cpu", torch.float64)),
    "unknown kernels": (UsageError, lambda: require_kernels("fast")),
    "a trained grid cannot change its bits or group size": (
        UsageError,
        lambda: layer().regrid(QuantConfig(bits=3, group_size=32)),
    ),
    "a weight is not finite or too large for a quantized base": (
        UsageError,
        lambda: PackedBase.quantize(torch.full((2, 64), 1e9), "int8"),
    ),
    "FSDP needs several processes": (UsageError, lambda: shard_model(nn.Linear(2, 2), torch.device("cpu"))),
    "the model's trainable parameters are not those of L4Q layers": (
        UsageError,
        lambda: parameter_groups(nn.Linear(2, 2), OptimOptions()),
    ),
    "the recorded options are not those of this version": (UsageError, lambda: TrainOptions.from_dict({"odd": 1})),
    "the saved state belongs to another model or other target modules": (
        UsageError,
        lambda: load_trainable_state(nn.Sequential(layer()), {}),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_calls_that_are_refused(message: str) -> None:
    """Wrong values and wrong models, from Python."""
    kind, act = REFUSED[message]
    with pytest.raises(kind, match=message):
        act()


def test_a_layer_in_its_warmup_has_no_grid() -> None:
    """It cannot be frozen before it quantizes."""
    warming = layer()
    warming.start_warmup()
    with pytest.raises(UsageError, match="the layer is in its LoRA warm-up and has no grid yet"):
        warming.freeze()


def test_a_state_of_another_shape() -> None:
    """A saved tensor must have the shape of the one it replaces."""
    model = nn.Sequential(layer())
    state = dict(trainable_state(model))
    name = next(name for name in state if name.endswith("lora_A"))
    state[name] = torch.zeros(1, 1)
    with pytest.raises(UsageError, match="a saved tensor has another shape"):
        load_trainable_state(model, state)


def test_texts_that_are_too_short(glassllm_dir: Path, tmp_path: Path) -> None:
    """For the windows asked for, and sequences of one token."""
    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    with pytest.raises(UsageError, match="the evaluation text does not hold the windows asked for"):
        text_windows(tokenizer, "a few words", 64, 4)
    with pytest.raises(UsageError, match="max_length leaves nothing to predict"):
        load_training_data([tmp_path / "unread.txt"], tokenizer, max_length=1)


def test_runs_and_states_that_are_not_there(tmp_path: Path) -> None:
    """A folder without a run, without a state, without this process's generators; an output path that is a file."""
    with pytest.raises(UsageError, match="the folder holds no run of l4q-train"):
        recorded_options(FreezeOptions(run=tmp_path, out=tmp_path / "out"))
    with pytest.raises(UsageError, match="the run has no such state"):
        find_state(tmp_path, 3)
    with pytest.raises(UsageError, match="the state was saved by fewer processes"):
        load_rng(tmp_path, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the output path is a file"):
        refuse_existing(tmp_path / "file", overwrite=True)
    text = str(diverged(tmp_path, 3, "loss nan"))
    assert text.startswith("training diverged at step 3")
    assert "no state had been saved yet" in text


def test_models_that_do_not_load(glassllm_dir: Path, tmp_path: Path) -> None:
    """A folder without weights, one of no known architecture, and sequences longer than the model reads."""
    data = tmp_path / "data.txt"
    data.write_text("some words to train on\n" * 200)
    options: dict[str, Any] = {"data": (data,), "out": tmp_path / "run", "steps": 1}
    shutil.copytree(glassllm_dir, tmp_path / "empty", ignore=lambda folder, names: ["model.safetensors"])
    with pytest.raises(UsageError, match="a weight file is missing"):
        load_model(TrainOptions(model=str(tmp_path / "empty"), **options))
    with pytest.raises(UsageError, match="the model cannot be loaded"):
        load_model(TrainOptions(model="nobody/has-this-model", **options))  # no hub is asked here
    shutil.copytree(glassllm_dir, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnsupportedError, match="transformers cannot load this as a causal language model"):
        load_model(TrainOptions(model=str(tmp_path / "odd"), **options))
    with pytest.raises(UsageError, match="the sequence length exceeds the model's context"):
        train(TrainOptions(model=str(glassllm_dir), max_length=4096, leave_dense=True, **options))


def test_eight_bit_states_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of the known packages is installed, the message says which one to take."""
    monkeypatch.setattr(optim, "EIGHT_BIT", {"no_such_package": "no_such_package.optim"})
    with pytest.raises(UnsupportedError, match="8-bit optimizer states need another library"):
        optim.OPTIMIZERS["8bit"]([])


def test_shards_that_contradict_their_index(tmp_path: Path) -> None:
    """A tensor twice, names that differ, and a file outside the folder."""
    for name in ("one", "two"):
        save_file({"weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    cases = {
        "a tensor stands in two shards": {"weight": "one.safetensors", "bias": "two.safetensors"},
        "the index and the shards name different tensors": {"bias": "one.safetensors"},
        "the shard index points outside its folder": {"weight": "../one.safetensors"},
    }
    for message, weight_map in cases.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UsageError, match=message):
            ShardReader.open(tmp_path)


def test_checkpoints_that_are_none(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A config that is a list, and one whose folder has no quantized tensor."""
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json is not a JSON object"):
        L4QCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text((glass_checkpoint("none") / "config.json").read_text())
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="the checkpoint has no quantized linear"):
        L4QCheckpoint.open(tmp_path)
