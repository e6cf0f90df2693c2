"""lm-evaluation-harness tasks on a transformers model, with task data from local files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4q.errors import UsageError

STDERR_SUFFIX = "_stderr"
INSTALL = "pip install 'l4q[eval]'"


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks are run."""

    data: Path | None = None
    """Folder with TASK.yaml files in lm_eval's own task format; their data_files are relative to it."""
    limit: int | None = None
    """First questions of each task; None = all."""
    batch_size: int = 1
    """Requests per forward pass."""


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], options: TaskOptions
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}, standard errors as `<metric>_stderr`.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of TASK.yaml files in `options.data`, or of built-in tasks (their data are on the hub).
        options: Data folder, limit, batch size.

    Raises:
        UsageError: lm_eval is not installed, or a task or its data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UsageError("tasks need the lm_eval package", got=error, remedy=INSTALL) from error
    chosen = [load_task(name, options.data) for name in tasks]
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    try:
        found = simple_evaluate(
            model=harness, tasks=chosen, limit=options.limit, bootstrap_iters=0, log_samples=False, verbosity="WARNING"
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise UsageError(
            "lm_eval could not run the tasks",
            where=", ".join(tasks),
            got=f"{type(error).__name__}: {error}",
            remedy="check the names and the data files; built-in tasks need their data from the hub",
        ) from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def load_task(name: str, folder: Path | None) -> str | dict[str, Any]:
    """A task's configuration with absolute data files, or the name itself if the folder has no such task.

    Raises:
        UsageError: The file is not lm_eval's format, or names data files that do not exist.
    """
    path = folder / f"{name}.yaml" if folder else None
    if path is None or not path.is_file():
        if folder is not None and not folder.is_dir():
            raise UsageError("the task folder does not exist", where=folder)
        return name
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(
            "a task file cannot be read", where=path, got=error, expected="YAML without Python functions"
        ) from error
    if not isinstance(config, dict) or "task" not in config:
        raise UsageError("a task file lacks its task name", where=path, expected="lm_eval's task format: `task: NAME`")
    files = config.get("dataset_kwargs", {}).get("data_files", {})
    for split, relative in files.items():
        files[split] = str((path.parent / relative).resolve())
        if not Path(files[split]).is_file():
            raise UsageError("a task's data file does not exist", where=path, got=relative, expected=files[split])
    return config


def headline_metric(metrics: dict[str, float]) -> float:
    """Length-normalised accuracy where the task has it, as in the paper's tables; else accuracy."""
    return metrics["acc_norm"] if "acc_norm" in metrics else metrics["acc"]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm_eval's {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...} without filters and non-numbers."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float))
    }
