"""The paper's benchmarks on a deployed model: seven commonsense tasks zero-shot, MMLU five-shot on a subset."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from l4q.errors import UsageError
from runtime_tests.lm_tasks import TaskOptions, evaluate_tasks, headline_metric
from tools.assets_benchmarks import COMMONSENSE, MMLU_TASK
from tools.reproduction.recipe import Recipe

FOLDER = "benchmarks"


def accuracies(model: Any, assets: Path, recipe: Recipe) -> dict[str, float]:
    """{"CSQA": mean of the seven, "MMLU 5-shot": ...} on the first `benchmark_items` questions of each task.

    Raises:
        UsageError: The benchmarks have not been fetched.
    """
    from transformers import AutoTokenizer

    folder = assets / FOLDER
    if not folder.is_dir():
        raise UsageError(
            "the benchmark questions are not there",
            where=folder,
            remedy="python -m tools.fetch_assets --only benchmarks, or --benchmark-items 0",
        )
    tokenizer = AutoTokenizer.from_pretrained(assets / recipe.model)
    options = TaskOptions(data=folder, limit=recipe.benchmark_items, batch_size=recipe.batch)
    found = evaluate_tasks(model, tokenizer, (*COMMONSENSE, MMLU_TASK), options)
    commonsense = statistics.fmean(headline_metric(found[task]) for task in COMMONSENSE)
    return {"CSQA": commonsense, "MMLU 5-shot": found[MMLU_TASK]["acc"]}
