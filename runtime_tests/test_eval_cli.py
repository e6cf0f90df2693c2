"""`l4q-eval`: the same perplexity as computed by hand, in torch and in an export's runtime; tasks as scored by hand."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from exporters.driver import export
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_common import status
from l4q.errors import UnsupportedError, UsageError
from l4q.evaluate import text_windows, windows_perplexity
from runtime_tests.cli_eval import command
from runtime_tests.evaluation import find_target, load_for_tasks
from runtime_tests.lm_tasks import TaskOptions, evaluate_tasks, load_task
from tools.assets_benchmarks import TASK_YAML, read_requests

WINDOWS = ("--windows", "2", "--window", "64", "--threads", "1")


@pytest.fixture(scope="module")
def text_file(wiki_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the held-out text."""
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(wiki_text[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(glass_checkpoint: Callable[..., Path]) -> Path:
    """A small checkpoint with integer zero-points."""
    return glass_checkpoint("integer", group_size=32)


def evaluate(*arguments: str | Path) -> dict[str, Any]:
    """Run the command in this process and parse its JSON."""
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_hand(folder: Path, text_file: Path) -> float:
    """The perplexity through transformers, without any engine."""
    model, tokenizer = load_for_tasks(find_target(folder))
    windows = text_windows(tokenizer, text_file.read_text(encoding="utf-8"), 64, 2)
    return windows_perplexity(model, windows).value


def test_a_checkpoints_perplexity_is_transformers_own(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """The engine's figure equals a plain loop's; scales a tenth larger change it."""
    found = evaluate(checkpoint, "--text", text_file, *WINDOWS)
    assert found["perplexity"] == pytest.approx(by_hand(checkpoint, text_file), rel=1e-4)
    assert found["tokens"] == 126
    assert found["format"] == "l4q"
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name] = (tensors[name] * np.float16(1.1)).astype(np.float16)
        save_file(tensors, path)
    assert by_hand(broken, text_file) != pytest.approx(found["perplexity"], rel=1e-3)


def test_an_export_is_evaluated_in_its_own_runtime(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """ONNX Runtime's perplexity of the export is the checkpoint's; tasks on it are refused with the way out."""
    out = tmp_path / "onnx"
    export(L4QCheckpoint.open(checkpoint), "onnx", out)
    found = evaluate(out, "--text", text_file, "--tokenizer", checkpoint, *WINDOWS)
    assert found["runtime"]["runtime"] == "onnxruntime"
    assert found["perplexity"] == pytest.approx(by_hand(checkpoint, text_file), rel=2e-3)
    with pytest.raises(UnsupportedError, match="transformers model"):
        load_for_tasks(find_target(out))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two local tasks: options in the continuation, and options in the context as in WinoGrande."""
    rows = [
        {"query": "The sea is", "choices": [" blue", " a deep and wide water"], "gold": 0, "tail": ""},
        {"query": "He said", "choices": [" that", " zq"], "gold": 0, "tail": ""},
        {"query": "She went to the", "choices": [" xylophone", " house"], "gold": 1, "tail": ""},
        {"query": "One day the", "choices": [" man", " of"], "gold": 1, "tail": ""},
    ]
    turned = [
        {"query": "", "choices": ["The man", "The of"], "gold": 0, "tail": " was there."},
        {"query": "", "choices": ["It is qq", "It is a"], "gold": 1, "tail": " good thing."},
        {"query": "", "choices": ["They had", "They zz"], "gold": 1, "tail": " to go."},
    ]
    for task, items, text, target in (("plain", rows, "query", "gold"), ("turned", turned, "gold", "tail")):
        (tmp_path / f"{task}.yaml").write_text(TASK_YAML.format(task=task, text=text, target=target))
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def accuracy_by_hand(model: Any, tokenizer: Any, path: Path) -> float:
    """Summed log-probabilities of what follows, one option at a time."""
    hits = []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        pairs = [(c, item["tail"]) if item["tail"] else (item["query"], c) for c in item["choices"]]
        scores = []
        for context, continuation in pairs:
            whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
            start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logprobs[at - 1, whole[at]]) for at in range(start, len(whole))))
        hits.append(int(np.argmax(scores)) == item["gold"])
    return float(np.mean(hits))


def test_task_accuracy_is_what_summed_logprobs_say(glassllm_dir: Path, questions: Path, tmp_path: Path) -> None:
    """lm_eval's accuracy on local questions of both shapes equals ours; with turned answers it changes."""
    model, tokenizer = load_for_tasks(find_target(glassllm_dir))
    tasks = ("plain", "turned")
    found = evaluate_tasks(model, tokenizer, tasks, TaskOptions(data=questions))
    expected = {task: accuracy_by_hand(model, tokenizer, questions / f"{task}.jsonl") for task in tasks}
    assert {task: found[task]["acc"] for task in tasks} == expected
    path = questions / "plain.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**item, "gold": 1 - item["gold"]}) + "\n" for item in items))
    assert evaluate_tasks(model, tokenizer, ("plain",), TaskOptions(data=questions))["plain"]["acc"] == pytest.approx(
        1 - expected["plain"]
    )


def test_bad_task_data_is_named(questions: Path, tmp_path: Path) -> None:
    """A missing data file, a file without a task and a missing folder each say what is wrong."""
    (questions / "plain.jsonl").unlink()
    with pytest.raises(UsageError, match="data file does not exist"):
        load_task("plain", questions)
    (questions / "turned.yaml").write_text("- a list\n")
    with pytest.raises(UsageError, match="lacks its task name"):
        load_task("turned", questions)
    with pytest.raises(UsageError, match="task folder does not exist"):
        load_task("plain", tmp_path / "nowhere")
    assert load_task("built_in", questions) == "built_in"


def test_nothing_to_evaluate_is_a_usage_error(
    glassllm_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and a message that names the options; an unknown folder likewise."""
    monkeypatch.setattr(sys, "argv", ["l4q-eval", str(glassllm_dir)])
    assert status(command) == 2
    assert "--text FILE" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["l4q-eval", str(glassllm_dir / "nowhere"), "--text", "x"])
    assert status(command) == 2
    assert "no such folder" in capsys.readouterr().err


def test_requests_become_questions_without_their_unconditioned_twins() -> None:
    """Options are grouped by doc_id, shared contexts become the query, five-shot contexts are cut to the question."""

    def request(doc: int, idx: int, context: str, continuation: str, query: str = "") -> str:
        record = {"doc_id": doc, "idx": idx, "label": 1, "doc": {"query": query}}
        return json.dumps({**record, "request": {"context": context, "continuation": continuation}})

    lines = [
        request(0, 0, "Shots.\n\nQ: a?\nA:", " x", "Q: a?\nA:"),
        request(0, 1, "Shots.\n\nQ: a?\nA:", " y", "Q: a?\nA:"),
        request(1, 0, "The cat", " sat."),
        request(1, 1, "The dog", " sat."),
        request(1_000_000, 0, "Answer:", " x"),
        "",
    ]
    lines = gzip.decompress(gzip.compress("\n".join(lines).encode())).decode().split("\n")
    assert read_requests(lines) == [
        {"query": "Q: a?\nA:", "choices": [" x", " y"], "gold": 1, "tail": ""},
        {"query": "", "choices": ["The cat", "The dog"], "gold": 1, "tail": " sat."},
    ]
