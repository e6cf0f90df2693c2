"""What the `l4q-parity` command does once its options are parsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from exporters.card import update_parity
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_command import progress_console
from l4q.errors import UsageError
from runtime_tests.parity_runs import ParityOptions, ParityReport, Progress, assert_parity, run_parity
from runtime_tests.report import markdown, report_files, table, write_report
from runtime_tests.report_html.details import describe
from runtime_tests.targets import detect

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def run_and_report(arguments: dict[str, Any], *, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the comparison, show and write its results, and raise if any bound was broken.

    Raises:
        UsageError: Bad input.
        VerificationError: Parity failed; the results are shown, reports and cards are written before that.
    """
    checkpoint = L4QCheckpoint.open(arguments["checkpoint"])
    if arguments["report"]:
        report_files(arguments["report"])  # a place that cannot be written to is refused before the engines start
    targets = [target for folder in arguments["exports"] for target in detect(folder)]
    windows, prompt = read_windows(checkpoint.path, arguments["text"], arguments["windows"], arguments["window"])
    check_context(checkpoint, arguments["window"], arguments["new_tokens"])
    options = ParityOptions(
        prompt=prompt if arguments["new_tokens"] else (),
        new_tokens=arguments["new_tokens"],
        timeout_s=arguments["timeout"],
        threads=arguments["threads"],
        pythons=engine_pythons(arguments["pythons"]),
    )
    with progress_bars() as progress:
        report = run_parity(checkpoint.path, targets, windows, options, progress)
    content = full_report(report, checkpoint, windows, arguments)
    if arguments["report"]:
        write_report(content, arguments["report"])
    if arguments["card"]:
        update_cards(content)
    show(content)
    assert_parity(report)
    return content


def print_table(content: dict[str, Any]) -> None:
    """Print a report as a table, and why rows were not run."""
    console = Console()
    console.print(table(content, width=console.width))
    for row in content["rows"]:
        if row["skipped"]:
            console.print(f"{row['format']}: not run, as {row['skipped']}", markup=False)


def full_report(
    report: ParityReport, checkpoint: L4QCheckpoint, windows: list[list[int]], arguments: dict[str, Any]
) -> dict[str, Any]:
    """report.json: the figures, and tokens in context, sizes and weight errors for the page.

    Raises:
        UsageError: The start that was named cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    settings = {
        "text": Path(arguments["text"]).name,
        "windows": arguments["windows"],
        "tokens_per_window": arguments["window"],
        "threads": arguments["threads"],
        "new_tokens": arguments["new_tokens"],
    }
    return describe(report, checkpoint, windows, decode, start=arguments["start"], settings=settings)


def read_windows(checkpoint: Path, text_file: Path, count: int, window: int) -> tuple[list[list[int]], list[int]]:
    """Token windows from the middle of a text, and a short prompt for generation from the first of them."""
    from transformers import AutoTokenizer

    from l4q.evaluate import text_windows

    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=text_file, got=error, expected="a UTF-8 text file") from error
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    windows = text_windows(tokenizer, text, window, count)
    return windows, windows[0][: _prompt_tokens(window)]


def check_context(checkpoint: L4QCheckpoint, window: int, new_tokens: int) -> None:
    """Refuse sequences longer than the model's context before an engine starts: llama.cpp aborts on them.

    Raises:
        UsageError: The window, or the prompt and its new tokens, do not fit.
    """
    context = checkpoint.config.get("max_position_embeddings")
    if not isinstance(context, int):
        return
    prompt = _prompt_tokens(window)
    for option, needed in (("--window", window), ("--new-tokens", prompt + new_tokens if new_tokens else 0)):
        if needed > context:
            raise UsageError(
                "the model's context is too short",
                where=option,
                got=f"{needed} tokens" + (f", {prompt} of them the prompt" if option == "--new-tokens" else ""),
                expected=f"at most {context}, max_position_embeddings of its config.json",
                remedy=f"choose a smaller {option}",
            )


def _prompt_tokens(window: int) -> int:
    return min(32, window // 2)


def update_cards(report: dict[str, Any]) -> None:
    """Write each export's own rows into its model card."""
    for folder in dict.fromkeys(row["folder"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["folder"] == folder]
        update_parity(Path(folder), markdown(report, rows), eval_results(report, rows))


def eval_results(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[EvalResult]:
    """The perplexity of every runtime that gave one, and the oracle's, for the card's model-index."""
    from huggingface_hub import EvalResult

    settings = report["settings"]
    values = {f"{row['runtime']} {row['variant']}".strip(): row.get("perplexity") for row in rows}
    values = {"torch float32, the oracle": report["oracle"]["perplexity"], **values}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=Path(settings["text"]).stem,
            dataset_name=settings["text"],
            dataset_args={"windows": settings["windows"], "tokens_per_window": settings["tokens_per_window"]},
            metric_type="perplexity",
            metric_name=f"Perplexity ({name})",
            metric_value=round(value, 4),
        )
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """One bar per engine on stderr."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=progress_console()) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done)

        yield progress


def engine_pythons(pairs: tuple[str, ...]) -> dict[str, str]:
    """Interpreters by engine, from ENGINE=PATH options.

    Raises:
        UsageError: An option has no "=" or no path.
    """
    chosen = {}
    for pair in pairs:
        engine, separator, path = pair.partition("=")
        if not separator or not path:
            raise UsageError("--python takes ENGINE=PATH", got=pair, expected="for example vllm=/opt/vllm/bin/python")
        chosen[engine] = path
    return chosen
