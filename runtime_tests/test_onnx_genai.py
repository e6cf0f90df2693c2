"""onnxruntime-genai on ONNX exports: it loads the folder and generates the oracle's tokens, alone and in batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer

from l4q.checkpoint import L4QCheckpoint
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.torch_engine import Engine as Oracle
from runtime_tests.onnx_models import CASES, export_onnx, make_checkpoint, torch_logits, torch_model

NEW_TOKENS = 24
# float32 against float32: only the order of summation differs
DECIDED = 1e-3


@pytest.fixture(scope="module")
def prompts(glassllm_dir: Path, wiki_text: str) -> list[list[int]]:
    """Three prompts of different lengths from real text."""
    ids = Tokenizer.from_file(str(glassllm_dir / "tokenizer.json")).encode(wiki_text[:2000]).ids
    return [ids[:7], ids[40:70], ids[100:116]]


@pytest.fixture(scope="module")
def checkpoint(glass_checkpoint: CheckpointMaker) -> L4QCheckpoint:
    """Glassllm on the integer grid."""
    return L4QCheckpoint.open(glass_checkpoint("integer"))


@pytest.fixture(scope="module")
def exported(checkpoint: L4QCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folder at accuracy level 0."""
    return export_onnx(checkpoint, tmp_path_factory.mktemp("genai") / "onnx")


@pytest.fixture(scope="module")
def expected(checkpoint: L4QCheckpoint, prompts: list[list[int]]) -> list[list[int]]:
    """The oracle's greedy ids, prompts included; it decides every one of them."""
    oracle = Oracle(str(checkpoint.path))
    answers = [prompt + oracle.generate(prompt, NEW_TOKENS)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        best = np.sort(oracle.prompt_logprobs(answer)[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        assert (best[:, 1] - best[:, 0]).min() > DECIDED
    return answers


def generate(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy sequences of a batch, prompts included and without padding; a stop token that ends one is left out."""
    model = og.Model(str(folder))
    longest = max(len(prompt) for prompt in prompts)
    generator = start(model, len(prompts), longest + new_tokens)
    pad = json.loads((folder / "genai_config.json").read_text())["model"].get("pad_token_id", 0)
    # onnxruntime-genai masks trailing padding only, as its own tokenizer writes it
    padded = [list(prompt) + [pad] * (longest - len(prompt)) for prompt in prompts]
    generator.append_tokens(np.array(padded if len(prompts) > 1 else padded[0], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [[int(token) for token in generator.get_sequence(row)] for row in range(len(prompts))]
    return [row[: len(prompt)] + row[longest:] for row, prompt in zip(rows, prompts, strict=True)]


def start(model: Any, batch: int, length: int) -> Any:
    """A greedy generator for sequences of up to `length` tokens."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=length, batch_size=batch)
    return og.Generator(model, params)


def edited(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy of a folder with values of one JSON file replaced (None removes one)."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    content.update(values)
    (target / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return target


def test_greedy_ids_are_the_oracles(exported: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """The folder loads as it is, and every generated id is torch's."""
    assert [generate(exported, [prompt])[0] for prompt in prompts] == expected


def test_a_damaged_row_is_noticed(
    exported: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """The twin: one output row of one layer, its scales 16 times too large, loads and gives other ids."""
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    name = "model.layers.1.self_attn.o_proj.scales"
    tensor = next(
        tensor
        for tensor in onnx.load(exported / "model.onnx", load_external_data=False).graph.initializer
        if tensor.name == name
    )
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(damaged / "model.onnx.data", mode="r+", dtype=np.uint8)
    raw = data[int(place["offset"]) :][: int(place["length"])]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    scales = raw.view(dtype).reshape(tuple(tensor.dims))  # [blocks, out]
    scales[:, 5] *= 16
    data.flush()
    assert [generate(damaged, [prompt])[0] for prompt in prompts] != expected


def test_batches_with_padding_give_the_same_ids(
    exported: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Prompts of different lengths, padded on the right, are answered as each one alone."""
    for answer, alone in zip(generate(exported, prompts), expected, strict=True):
        assert answer[: len(alone)] == alone


@pytest.fixture(scope="module")
def stopping(
    checkpoint: L4QCheckpoint,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, int]:
    """A folder whose answer to the first prompt ends early, and the token that ends it.

    Only generation_config.json knows that token, as it is with the second stop token of many chat models.
    """
    base = tmp_path_factory.mktemp("stopping")
    stop = expected[0][len(prompts[0]) + 3]
    source = edited(checkpoint.path, base / "source", "generation_config.json", eos_token_id=[3, stop])
    return export_onnx(L4QCheckpoint.open(source), base / "onnx"), stop


def test_every_stop_token_of_the_generation_config_stops(
    stopping: tuple[Path, int], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The answer ends before the first stop token, which onnxruntime-genai leaves out."""
    folder, stop = stopping
    assert json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"] == [3, stop]
    assert generate(folder, prompts[:1])[0] == expected[0][: expected[0].index(stop, len(prompts[0]))]


def test_a_conversation_continues_from_its_cache(
    stopping: tuple[Path, int], checkpoint: L4QCheckpoint, prompts: list[list[int]]
) -> None:
    """A second turn appended after the first answer: the next tokens are the oracle's to the whole conversation."""
    folder, stop = stopping
    generator = start(og.Model(str(folder)), 1, 64)
    generator.append_tokens(np.array(prompts[0], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    first = [int(token) for token in generator.get_sequence(0)]
    generator.append_tokens(np.array([stop, *prompts[2]], dtype=np.int32))
    generator.generate_next_token()
    generator.generate_next_token()
    conversation = [*first, stop, *prompts[2]]
    wanted, _ = Oracle(str(checkpoint.path)).generate(conversation, 2)
    assert stop not in wanted
    assert [int(token) for token in generator.get_sequence(0)] == conversation + wanted


def test_a_model_without_special_tokens_loads(
    checkpoint: L4QCheckpoint, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """Unknown ids are left out (onnxruntime-genai refuses null) and the answer runs to its length."""
    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    plain = edited(checkpoint.path, tmp_path / "a", "generation_config.json", **nothing)
    source = edited(plain, tmp_path / "b", "config.json", **nothing)
    folder = export_onnx(L4QCheckpoint.open(source), tmp_path / "onnx")
    assert generate(folder, prompts[:1])[0][: len(expected[0])] == expected[0]
    broken = json.loads((folder / "genai_config.json").read_text())
    broken["model"]["eos_token_id"] = None
    (folder / "genai_config.json").write_text(json.dumps(broken))
    with pytest.raises(RuntimeError, match="eos_token_id - Expected a number but saw a null"):
        og.Model(str(folder))


@pytest.mark.parametrize("name", ["integer-untied-llama3", "mistral-window", "qwen2", "qwen3"])
def test_other_architectures_generate_torchs_ids(name: str, tmp_path: Path) -> None:
    """Rope scaling, a sliding window shorter than the text, biases and head norms, over 12 decode steps."""
    checkpoint = make_checkpoint(CASES[name], tmp_path / "checkpoint")
    prompt = [int(token) for token in np.random.default_rng(1).integers(3, 77, 9)]
    answer = generate(export_onnx(checkpoint, tmp_path / "onnx"), [prompt], 12)[0]
    logits = torch_logits(torch_model(checkpoint), np.array([answer], dtype=np.int64))[0, len(prompt) - 1 : -1]
    assert len(answer) == len(prompt) + 12 or answer[-1] == 2
    assert answer[len(prompt) :] == logits.argmax(axis=-1).tolist()


def test_the_accuracy_level_of_the_config_is_used(
    checkpoint: L4QCheckpoint, exported: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """At level 0 the logits are torch's; at level 4, written by the option, activations are rounded to int8."""
    want = torch_logits(torch_model(checkpoint), np.array([prompts[1]], dtype=np.int64))[0, -1]
    worst = {}
    for level, folder in {0: exported, 4: export_onnx(checkpoint, tmp_path / "4", onnx_accuracy_level=4)}.items():
        generator = start(og.Model(str(folder)), 1, 64)
        generator.append_tokens(np.array(prompts[1], dtype=np.int32))
        worst[level] = float(np.abs(generator.get_logits()[0, -1] - want).max())
    assert worst[0] < 1e-3 < 1e-2 < worst[4]
