"""What runs, starts, tasks, the browser and plans say when they refuse, message by message."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from exporters.driver import export, get_exporter
from exporters.inspect.open import open_source
from exporters.judge import JUDGES_VARIABLE, read_elsewhere
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.data import load_training_data
from l4q.distributed import AMP_VARIABLE, amp_requested
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.importing import ImportOptions, import_model
from l4q.refreeze import find_state
from l4q.starts import open_start
from l4q.train_state import load_optimizer, state_folder
from l4q.warmup import LoraWarmup
from runtime_tests.browser import Browser
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.import_sources import UP, exported, make_source
from runtime_tests.lm_tasks import TaskOptions, evaluate_tasks
from runtime_tests.start_files import edit_section, edit_tensors


@pytest.fixture(scope="module")
def awq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ export of a small model."""
    base = tmp_path_factory.mktemp("awq")
    return exported(make_source(base, {"bits": 4, "group_size": 32, "zero_point": "integer"}), "awq", base / "awq")


def lose_a_norm(folder: Path) -> None:
    """model.norm.weight is gone."""
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def spoil_scales(folder: Path) -> None:
    """One scale is NaN."""
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.scales"].view(-1)[0].fill_(float("nan")))


def name_another_model(folder: Path) -> None:
    """config.json is of a model with an encoder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


STARTS: dict[str, tuple[type[L4QError], Callable[[Path], None]]] = {
    "the folder's tensors are not those of its architecture": (UsageError, lose_a_norm),
    "invalid pre-quantized weight": (UsageError, spoil_scales),
}


@pytest.mark.parametrize("message", STARTS)
def test_starts_that_are_damaged(awq_folder: Path, tmp_path: Path, message: str) -> None:
    """Training does not begin from a folder that lacks a tensor or holds a NaN."""
    kind, damage = STARTS[message]
    shutil.copytree(awq_folder, tmp_path / "start")
    damage(tmp_path / "start")
    start = open_start(str(tmp_path / "start"))
    assert start is not None
    with pytest.raises(kind, match=message):
        start.load(torch.float32)


def test_a_source_without_a_causal_model(awq_folder: Path, tmp_path: Path) -> None:
    """An import of a config that transformers has no decoder for."""
    shutil.copytree(awq_folder, tmp_path / "source")
    name_another_model(tmp_path / "source")
    with pytest.raises(UnsupportedError, match="transformers knows no causal language model for this config"):
        import_model(ImportOptions(source=str(tmp_path / "source"), out=tmp_path / "out"))


def test_no_group_targets_a_module(tmp_path: Path) -> None:
    """A compressed-tensors folder whose groups name other modules: neither read back nor started from."""
    checkpoint = make_source(tmp_path, {"bits": 4, "group_size": 32, "zero_point": "none"})
    folder = exported(checkpoint, "compressed-tensors", tmp_path / "ct")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {name: {**group, "targets": ["re:.*q_proj"]} for name, group in section["config_groups"].items()}
    edit_section(folder, config_groups=groups)
    with pytest.raises(L4QError, match="no config group targets a quantized module"):
        dict(get_exporter("compressed-tensors").read_back(folder))
    start = open_start(str(folder))
    assert start is not None
    with pytest.raises(UsageError, match="no config group targets a quantized module"):
        start.load(torch.float32)


def test_a_gguf_file_transformers_cannot_load(tmp_path: Path) -> None:
    """A file of an unknown architecture as a start."""
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    start = open_start(str(tmp_path / "odd.gguf"))
    assert start is not None
    with pytest.raises(UnsupportedError, match="transformers cannot load this GGUF file"):
        start.load(torch.float32)


def test_plans_that_find_rows_that_do_not_fit(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """341 rows in AWQ's words, 341 columns in GGUF's blocks, and an activation the ONNX graph has no node for."""
    plain = L4QCheckpoint.open(glass_checkpoint("none"))
    with pytest.raises(UnsupportedError, match="AWQ packs 8 output rows into a word"):
        get_exporter("awq").plan(plain, ExportOptions())
    whole_rows = L4QCheckpoint.open(glass_checkpoint("none", group_size=-1))
    with pytest.raises(UnsupportedError, match=r"\d+ module\(s\) do not fill GGUF's blocks of 32 columns"):
        get_exporter("gguf").plan(whole_rows, ExportOptions())
    shutil.copytree(plain.path, tmp_path / "checkpoint")
    config = json.loads((plain.path / "config.json").read_text())
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UnsupportedError, match="the ONNX graph does not cover this hidden_act"):
        get_exporter("onnx").plan(L4QCheckpoint.open(tmp_path / "checkpoint"), ExportOptions(onnx_graph="built"))


def test_a_block_without_a_finite_scale(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """l4q-inspect does not count the codes of a NaN."""
    export(L4QCheckpoint.open(glass_checkpoint("none")), "gguf", tmp_path / "gguf", check="none")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.0.ffn_up.weight")
    data = bytearray(file.read_bytes())
    data[int(tensor.data_offset) : int(tensor.data_offset) + 2] = b"\x00\x7e"
    file.write_bytes(data)
    entry = next(entry for entry in open_source(file).entries if entry.name == "blk.0.ffn_up.weight")
    assert entry.values is not None
    with pytest.raises(UsageError, match="a block has a NaN or infinite scale"):
        entry.values()


def test_judges_and_tasks_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense 3-bit fields without a reader that knows them, and tasks without lm_eval."""
    monkeypatch.delenv(JUDGES_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"verifying dense 3-bit fields needs compressed-tensors 0\.18 or later"):
        next(read_elsewhere("gptq", tmp_path))
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python says of a package that is not there
    with pytest.raises(UsageError, match="tasks need the lm_eval package"):
        evaluate_tasks(None, None, ["piqa"], TaskOptions())


def test_states_and_phases_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged state, another model's optimizer, a run that ends in its warm-up, and fp16 asked for by accelerate."""
    folder = state_folder(tmp_path, 3)
    folder.mkdir()
    with pytest.raises(UsageError, match="the saved state is damaged"):
        find_state(tmp_path, 3)
    (folder / "optimizer.json").write_text(json.dumps({"groups": [{"params": ["other"]}]}))
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match="the saved optimizer belongs to other parameters"):
        load_optimizer(folder, torch.optim.AdamW([parameter]), {parameter: "mine"})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(UsageError, match="the LoRA warm-up leaves no step that quantizes"):
        LoraWarmup(2).on_train_begin(arguments, TrainerState(max_steps=2), TrainerControl())
    monkeypatch.setenv(AMP_VARIABLE, "fp16")
    with pytest.raises(UsageError, match="accelerate's configuration asks for another mixed precision"):
        amp_requested()


def test_a_template_that_refuses(glassllm_dir: Path, tmp_path: Path) -> None:
    """A chat the model's template raises about, or that transformers refuses, is named with file and line."""
    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    for messages, reason in ((turns, "roles must alternate"), (turns[1:], "empty conversation")):
        path.write_text(json.dumps({"messages": messages}))
        with pytest.raises(UsageError, match="the chat template refuses the conversation") as raised:
            load_training_data([path], tokenizer, max_length=8)
        assert reason in str(raised.value)
        assert "chats.jsonl, line 1" in str(raised.value)


def test_what_a_browser_cannot_do(tmp_path: Path) -> None:
    """A page that is not there, a script that throws, a command that does not exist."""
    page = tmp_path / "page.html"
    page.write_text("<title>page</title>")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        with pytest.raises(UsageError, match="the script failed in the page"):
            browser.evaluate("nothing.at.all")
        with pytest.raises(UsageError, match="the browser refused a command"):
            browser.call("No.such")
        with pytest.raises(UsageError, match="the browser cannot open the page"):
            browser.open(tmp_path / "gone.html")
