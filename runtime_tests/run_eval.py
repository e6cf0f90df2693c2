"""What the `l4q-eval` command does once its options are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from l4q.cli_command import progress_console
from l4q.errors import UsageError
from runtime_tests.evaluation import EngineOptions, engine_perplexity, find_target, load_for_tasks
from runtime_tests.lm_tasks import TaskOptions, evaluate_tasks
from runtime_tests.run import engine_pythons, read_windows


def evaluate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure what was asked for.

    Returns:
        Plain JSON values: model, format, runtime, perplexity and tokens (None without a text), tasks.

    Raises:
        UsageError: Nothing was asked for, or bad input.
        UnsupportedError: Tasks on a format that transformers does not read.
        EngineError: The runtime failed.
    """
    tasks = [name.strip() for name in arguments["tasks"].split(",") if name.strip()]
    if arguments["text"] is None and not tasks:
        raise UsageError("nothing to evaluate", expected="--text FILE, --tasks NAMES, or both")
    target = find_target(Path(arguments["model"]), arguments["engine"])
    result: dict[str, Any] = {
        "model": str(target.folder),
        "format": target.label,
        "runtime": None,
        "perplexity": None,
        "tokens": 0,
        "tasks": {},
    }
    loaded = load_for_tasks(target) if tasks else None  # a format without tasks fails before the perplexity is spent
    if arguments["text"] is not None:
        found, result["runtime"] = _perplexity(target, arguments)
        result |= {"perplexity": found.value, "tokens": found.tokens}
    if loaded:
        options = TaskOptions(data=arguments["task_data"], limit=arguments["limit"], batch_size=arguments["batch_size"])
        result["tasks"] = evaluate_tasks(*loaded, tasks, options)
    return result


def _perplexity(target: Any, arguments: dict[str, Any]) -> Any:
    folder = arguments["tokenizer"] or target.folder
    windows, _ = read_windows(folder, arguments["text"], arguments["windows"], arguments["window"])
    options = EngineOptions(
        threads=arguments["threads"], timeout_s=arguments["timeout"], pythons=engine_pythons(arguments["pythons"])
    )
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console()) as bars:
        row = bars.add_task(target.engine, total=len(windows))
        return engine_perplexity(target, windows, options, lambda done: bars.advance(row, done))
