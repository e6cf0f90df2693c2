"""Model cards: metadata that huggingface_hub reads, taken from where it is known, and Python that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from exporters.card_data import card_data, front_matter
from exporters.driver import export, make_plan
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.run import update_cards
from runtime_tests.start_files import byte_tokenizer
from runtime_tests.tiny_llama import tiny_checkpoint

START_CARD = """---
license: cc-by-4.0
language: [en, la]
datasets: [me/letters]
base_model: me/grandparent
tags: [mine]
eval_results: nonsense
---

# The start
"""


@pytest.fixture
def run(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> Path:
    """A run's folder with a checkpoint that can be changed."""
    shutil.copytree(glass_checkpoint("none", group_size=32), tmp_path / "RUN" / "checkpoint")
    return tmp_path / "RUN"


def name_start(run: Path, start: str, *data: str) -> None:
    """Let the run's record and the checkpoint say what training started from."""
    (run / "config.json").write_text(json.dumps({"l4q_run": 1, "options": {"model": start, "data": data}}))
    config = json.loads((run / "checkpoint" / "config.json").read_text())
    (run / "checkpoint" / "config.json").write_text(json.dumps({**config, "_name_or_path": start}))


def metadata(run: Path) -> dict[str, Any]:
    """What the card of a GGUF export would have on top."""
    checkpoint = L4QCheckpoint.open(run / "checkpoint")
    found: dict[str, Any] = card_data(checkpoint, make_plan(checkpoint, "gguf", ExportOptions())).to_dict()
    return found


def test_metadata_of_a_model_of_the_hub(run: Path, tmp_path: Path) -> None:
    """huggingface_hub reads base model, licence, task and tags from the card; no path of this machine is in it."""
    name_start(run, "HuggingFaceTB/SmolLM2-135M", "/home/me/letters.txt")
    folder = export(run / "checkpoint", "gguf", tmp_path / "gguf").folder
    found = metadata_load(folder / "README.md")
    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "l4q", "4-bit", "quantized", "quantization-aware-training", "llama"],
    }
    text = (folder / "README.md").read_text()
    assert "- Fine-tuned on: letters.txt" in text
    assert "/home/me" not in text
    assert str(tmp_path) not in text


def test_metadata_is_taken_over(run: Path, tmp_path: Path) -> None:
    """The start's card gives what its licence file would, and more; the checkpoint's own card has the last word."""
    assert "base_model" not in metadata(run)
    start = tmp_path / "start"
    start.mkdir()
    (start / "README.md").write_text(START_CARD)
    name_start(run, str(start))
    found = metadata(run)
    carried = {"license": "cc-by-4.0", "language": ["en", "la"], "datasets": ["me/letters"]}
    assert {key: found[key] for key in carried} == carried
    assert found["base_model"] == "me/grandparent"
    assert "mine" not in found["tags"]
    (run / "checkpoint" / "README.md").write_text("---\nlicense: gpl-3.0\nbase_model: me/parent\n---\n")
    found = metadata(run)
    assert (found["license"], found["base_model"], found["language"]) == ("gpl-3.0", "me/parent", ["en", "la"])


def test_the_hubs_cache_is_asked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a start that was downloaded gives licence and language; the base model is the start, not its own."""
    snapshot = tmp_path / "hub" / "models--me--start" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(START_CARD)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name_start(run, "me/start")
    found = metadata(run)
    assert (found["base_model"], found["license"], found["language"]) == ("me/start", "cc-by-4.0", ["en", "la"])


@pytest.mark.parametrize("card", ["", "no front matter", "---\n: [\n---\n", "---\n- a\n---\n"])
def test_unreadable_cards_are_passed_over(run: Path, card: str) -> None:
    """A README.md that is no model card changes nothing."""
    expected = metadata(run)
    (run / "checkpoint" / "README.md").write_text(card)
    assert front_matter(run / "checkpoint" / "README.md") == {}
    assert metadata(run) == expected


def test_an_unknown_licence_is_linked(run: Path) -> None:
    """A licence text without a name on the hub is "other", with the file that travels along, unless a card names it."""
    (run / "checkpoint" / "LICENSE").write_text("You may read this.")
    found = metadata(run)
    assert (found["license"], found["license_link"]) == ("other", "LICENSE")
    (run / "checkpoint" / "README.md").write_text("---\nlicense: mit\n---\n")
    found = metadata(run)
    assert found["license"] == "mit"
    assert "license_link" not in found


def test_measured_results_are_in_the_model_index(run: Path, tmp_path: Path) -> None:
    """l4q-parity's figures reach the hub's evaluation results, once, however often they are measured."""
    folder = export(run / "checkpoint", "gguf", tmp_path / "gguf").folder
    before = metadata_load(folder / "README.md")
    assert before is not None
    row = {"runtime": "llamacpp", "format": "gguf", "variant": "Q4_0", "folder": str(folder), "quantized_tensors": 20}
    settings = {"text": "held_out.txt", "windows": 2, "tokens_per_window": 100}
    for perplexity in (31.5, 30.25):
        rows = [{**row, "perplexity": perplexity}, {**row, "variant": "failed", "perplexity": None}]
        update_cards({"tokens": 198, "oracle": {"perplexity": 30.0}, "settings": settings, "rows": rows})
    after: Any = ModelCard((folder / "README.md").read_text()).data
    results = {result.metric_name: result for result in after.eval_results}
    values = {name: result.metric_value for name, result in results.items()}
    assert values == {"Perplexity (torch float32, the oracle)": 30.0, "Perplexity (llamacpp Q4_0)": 30.25}
    assert all(result.dataset_name == "held_out.txt" for result in results.values())
    assert all(result.metric_type == "perplexity" for result in results.values())
    rest = metadata_load(folder / "README.md")
    assert rest is not None
    assert {key: value for key, value in rest.items() if key != "model-index"} == before


def python_of(folder: Path) -> str:
    """The Python block of a card."""
    found = re.search(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def run_block(folder: Path, *, after: str = "") -> str:
    """Run a card's Python inside its folder; returns what it prints."""
    words = [sys.executable, "-c", python_of(folder) + after]
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=300).stdout


def test_python_of_the_cards_runs(tmp_path: Path) -> None:
    """llama.cpp answers as the GGUF's card says, transformers generates as that of compressed-tensors does."""
    source = tiny_checkpoint(tmp_path / "tiny", QuantConfig(), bos_token_id=0, eos_token_id=0).path
    byte_tokenizer(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    checkpoint = L4QCheckpoint.open(source)
    answer = run_block(export(checkpoint, "gguf", tmp_path / "gguf").folder)
    assert "assistant" in answer
    ask = "ids = tokenizer('Hello', return_tensors='pt')\nprint(model.generate(**ids, max_new_tokens=4).shape[1])\n"
    folder = export(checkpoint, "compressed-tensors", tmp_path / "ct").folder
    assert int(run_block(folder, after=ask).split()[-1]) > 4
