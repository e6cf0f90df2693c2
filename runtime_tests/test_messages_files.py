"""What the readers of model folders, weight files, tokenizers and training data say, message by message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.data import load_training_data, require_known
from l4q.data_records import read_records
from l4q.errors import BusyError, L4QError, UnsupportedError, UsageError
from l4q.files import find_side_files
from l4q.json_files import MOST_BYTES, MOST_LEVELS
from l4q.locks import exclusive
from l4q.shard_writer import dtype_word
from l4q.shards import ShardReader
from l4q.tokenizers import read_tokenizer, require_tokenizer
from l4q.train_model import load_model
from l4q.train_options import TrainOptions
from runtime_tests.attacks.edit import Change, config, grown, join, link, record, set_item
from runtime_tests.tiny_llama import tiny_checkpoint, tiny_llama

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj"


def as_pickle(folder: Path) -> None:
    """The weights are a pickle."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def as_folder(folder: Path) -> None:
    """The weights are a folder."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def nested(folder: Path) -> None:
    """config.json has one level too many."""
    (folder / "config.json").write_text("[" * (MOST_LEVELS + 2) + "]" * (MOST_LEVELS + 2))


MODELS: dict[str, tuple[type[L4QError], str, Change]] = {
    "the weights are a pickle, and loading one can run any code": (
        UsageError,
        r"got: \['pytorch_model\.bin'\]\n  expected: safetensors\n  do: take the model's safetensors",
        as_pickle,
    ),
    "the config describes a model far larger than its weight files": (
        UsageError,
        "do: config.json and weights do not belong together",
        config(vocab_size=1 << 29),
    ),
    "config.json says what no model can be": (
        UsageError,
        r"where: .*config\.json: num_hidden_layers\n  got: -1\n  expected: a whole number from 0",
        config(num_hidden_layers=-1),
    ),
    "config.json is nested too deeply": (UsageError, f"expected: at most {MOST_LEVELS} levels", nested),
    "config.json is too large": (UsageError, "expected: <= 33,554,432", grown("config.json", MOST_BYTES + 1)),
    "transformers cannot load this model": (UsageError, "got: KeyError: 'nonsense'", config(hidden_act="nonsense")),
    "a weight file is not a file": (
        UsageError,
        r"where: .*model\.safetensors\n  expected: a safetensors file",
        as_folder,
    ),
    "a weight file is a link that leaves its folder": (
        UsageError,
        r"got: /dev/null\n  expected: a file of the folder\n  do: put the file itself there",
        link(WEIGHTS, "/dev/null"),
    ),
    "the shard index is a link that leaves its folder": (UsageError, "got: /dev/null", link(INDEX, "/dev/null")),
    "quantization_config is not a JSON object": (
        UsageError,
        "got: list\n  expected: an object",
        config(quantization_config=[]),
    ),
    "the model brings Python code of its own, which is not run": (
        UnsupportedError,
        "do: read that code",
        config(auto_map={"AutoModel": "own.Model"}),
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in float32, without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny_llama(folder)
    return folder


@pytest.mark.parametrize("message", MODELS)
def test_models_that_are_not_loaded(llama: Path, tmp_path: Path, message: str) -> None:
    """Training refuses the folder, and says why."""
    kind, details, damage = MODELS[message]
    folder = shutil.copytree(llama, tmp_path / "model")
    damage(folder)
    options = TrainOptions(model=str(folder), data=(tmp_path / "unread.txt",), out=tmp_path / "run", steps=1)
    with pytest.raises(kind, match=f"(?s)^{message}.*{details}"):
        load_model(options)


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    """A dtype that neither NumPy nor torch has, a file cut after it was opened, and a dtype no file holds."""
    entry = {"dtype": "F8_E8M0", "shape": [4, 4], "data_offsets": [0, 16]}
    join(tmp_path / WEIGHTS, json.dumps({"weight": entry}).encode(), bytes(16))
    reader = ShardReader.open(tmp_path)
    with pytest.raises(UsageError, match=r"a tensor has a dtype that is not read\n  where: .*weight\n  got: F8_E8M0"):
        reader.tensor("weight")
    join(tmp_path / WEIGHTS, json.dumps({"weight": {**entry, "dtype": "U8"}}).encode(), bytes(16))
    reader = ShardReader.open(tmp_path)
    assert reader.tensor("weight").sum() == 0
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate((tmp_path / WEIGHTS).stat().st_size - 1)
    with pytest.raises(UsageError, match=r"a weight file was cut while it was read\n  where: .*safetensors"):
        reader.tensor("weight")
    with pytest.raises(UsageError, match="a dtype has no place in safetensors files\n  got: complex64"):
        dtype_word(np.zeros(1, dtype=np.complex64))


def test_a_folder_that_is_being_written(tmp_path: Path) -> None:
    """The second who wants it hears who has it; when it is free again, it can be taken."""
    for _ in range(2):
        with (
            exclusive(tmp_path / "out"),
            pytest.raises(BusyError, match=r"(?s)another process is writing this folder.*got: process \d+.*do: wait"),
            exclusive(tmp_path / "out"),
        ):
            pytest.fail("entered twice")


CHECKPOINTS: dict[str, tuple[str, Change]] = {
    "a dense tensor holds NaN or infinite values": (
        r"where: .*model\.norm\.weight\n  got: \[nan, nan\]",
        set_item("model.norm.weight", (0,), float("nan")),
    ),
    "a file of the model is a link that leaves its folder": (
        r"got: \['tokenizer\.json'\]\n  expected: files of the folder",
        link("tokenizer.json", __file__),
    ),
    "the tensors are not those of config.json": (
        "got: tensors of 1 layers, 0 to 0\n  expected: layers 0 to 1",
        config(num_hidden_layers=2),
    ),
}


@pytest.mark.parametrize("message", CHECKPOINTS)
def test_checkpoints_that_are_damaged(tmp_path: Path, message: str) -> None:
    """A checkpoint with a NaN, a link to a stranger's file, or a layer too few."""
    details, damage = CHECKPOINTS[message]
    folder = tiny_checkpoint(tmp_path, QuantConfig(group_size=32), num_hidden_layers=1).path

    def read() -> None:
        checkpoint = L4QCheckpoint.open(folder)
        checkpoint.dense("model.norm.weight")
        find_side_files(folder)

    read()
    damage(folder)
    with pytest.raises(UsageError, match=f"{message}\n(?s:.*){details}"):
        read()


def test_a_row_of_half_a_superblock(tmp_path: Path) -> None:
    """The record of a module must have rows of whole groups, and on a K grid of whole superblocks."""
    quant = QuantConfig.from_dict({"scale_grid": "q4_k", "zero_point": "float", "bits": 4, "group_size": 32})
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 1}
    folder = tiny_checkpoint(tmp_path, quant, **sizes).path
    L4QCheckpoint.open(folder)
    record(UP, lambda values: values.update(shape=[256, 288]))(folder)
    with pytest.raises(UsageError, match=rf"superblocks do not fill a row\n  where: .*{UP}\n  got: 288 / 256"):
        L4QCheckpoint.open(folder)
    folder = tiny_checkpoint(tmp_path / "plain", QuantConfig(group_size=32), num_hidden_layers=1).path
    record(UP, lambda values: values.update(shape=[256, 100]))(folder)
    with pytest.raises(UsageError, match=rf"group_size does not divide in_features\n  where: .*{UP}\n  got: 100 / 32"):
        L4QCheckpoint.open(folder)


class Lost(PreTrainedTokenizer):
    """A tokenizer without a vocabulary: every character is token -1."""

    vocab_size = 0

    def get_vocab(self) -> dict[str, int]:
        """Empty."""
        return {}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return -1


def test_tokenizers_that_do_not_work(tmp_path: Path) -> None:
    """One that raises for a text of no known word, and one whose ids are none."""
    odd = Tokenizer(WordLevel({"b": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=odd).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"the tokenizer does not work\n  where: model\n  got: .*\[UNK\]"):
        require_tokenizer(read_tokenizer(tmp_path), "model")
    with pytest.raises(UsageError, match=r"the tokenizer gives no token ids\n  where: model\n  got: \[-1\]"):
        require_tokenizer(Lost(), "model")


def test_data_for_another_tokenizer(glassllm_dir: Path, tmp_path: Path) -> None:
    """Ids beyond the embedding are refused before a step is trained."""
    path = tmp_path / "data.txt"
    path.write_text("some words to train on")
    data = load_training_data([path], AutoTokenizer.from_pretrained(glassllm_dir), max_length=16)
    largest = max(max(example.input_ids) for example in data.examples)
    require_known(data, largest + 1)
    message = rf"the tokenizer gives ids that the model has no embedding for\n.*\n  got: {largest}\n"
    with pytest.raises(UsageError, match=message + f"  expected: at most {largest - 1}"):
        require_known(data, largest)


DATA: dict[str, Callable[[Path], object]] = {
    "the training file is not a file": Path.mkdir,
    "a training text is no Unicode text": lambda path: path.write_text('{"text": "\\ud800"}'),
}


@pytest.mark.parametrize("message", DATA)
def test_training_files_that_are_none(tmp_path: Path, message: str) -> None:
    """A folder, and half of a surrogate pair."""
    DATA[message](tmp_path / "data.jsonl")
    with pytest.raises(UsageError, match=rf"{message}\n  where: .*data\.jsonl"):
        list(read_records(tmp_path / "data.jsonl"))
