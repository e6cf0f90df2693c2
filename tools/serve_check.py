"""`python -m tools.serve_check CHECKPOINT EXPORT...`: serve exports for real and hold the answers against the oracle.

Each GPTQ, AWQ, compressed-tensors or GGUF folder is put behind vLLM's or llama.cpp's OpenAI-compatible server on
127.0.0.1 and asked through the openai client: the list of models, chats in one piece, streamed, and all at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from l4q.cli_common import run
from l4q.errors import VerificationError


@click.command(
    name="serve_check",
    epilog="Example: python -m tools.serve_check RUN/checkpoint exports/gptq exports/gguf",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("exports", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--new-tokens", default=16, show_default=True, type=click.IntRange(1), help="Tokens per answer.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(1), help="Prompt and answer, in tokens.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads per server.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds a server may take to start.")
@click.option("--python", "pythons", multiple=True, metavar="RUNTIME=PATH", help="Another interpreter for a server.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    checkpoint: Path,
    exports: tuple[Path, ...],
    new_tokens: int,
    context: int,
    threads: int,
    timeout: float,
    pythons: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve every folder of EXPORTS and compare greedy chats with torch float32 on CHECKPOINT.

    Exit code 4 if a server does not start or answers anything but the checkpoint's text.
    """
    from runtime_tests.run import engine_pythons
    from runtime_tests.serving.judge import expect
    from runtime_tests.serving.runtimes import ServeOptions, runtime_of

    options = ServeOptions(context=context, threads=threads, timeout_s=timeout, pythons=engine_pythons(pythons))
    for folder in exports:  # refuse before anything runs
        runtime_of(folder)
    expected = expect(checkpoint, new_tokens)
    rows = [check(folder, expected, new_tokens, options) for folder in exports]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        Console().print(table(rows))
    failed = [row for row in rows if row["problems"]]
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(rows)} servers do not answer like the checkpoint",
            where=", ".join(row["export"] for row in failed),
            got="; ".join(failed[0]["problems"][:3]),
            expected="the oracle's greedy text, wherever it decides a token by more than the runtime's noise",
            remedy="l4q-parity compares the weights and the log-probabilities of these folders",
        )


def check(folder: Path, expected: Any, new_tokens: int, options: Any) -> dict[str, Any]:
    """One export's row: facts, texts and problems."""
    from runtime_tests.serving.client import Client
    from runtime_tests.serving.judge import judge
    from runtime_tests.serving.runtimes import RUNTIMES, runtime_of, serve

    name = runtime_of(folder)
    runtime = RUNTIMES[name]
    with serve(folder, options) as server:
        client = Client(server.url, fields=runtime.request_fields)
        report = judge(client, folder.resolve().name, expected, new_tokens, runtime.noise)
        client.close()
        started = server.seconds_to_start
    return {
        "export": str(folder),
        "runtime": name,
        "seconds_to_start": round(started, 1),
        "tokens_equal": report.tokens_equal,
        "tokens": report.tokens,
        "worst_dlogprob": report.worst_dlogprob,
        "noise": runtime.noise,
        "texts": list(report.texts),
        "problems": list(report.problems),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """What was found, one line per export."""
    result = Table("export", "server", "started in", "tokens equal", "largest Δ logprob", "first answer", "passed")
    for row in rows:
        result.add_row(
            row["export"],
            row["runtime"],
            f"{row['seconds_to_start']:.1f} s",
            f"{row['tokens_equal']} of {row['tokens']}",
            f"{row['worst_dlogprob']:.4f} of {row['noise']:g}",
            row["texts"][0],
            "no" if row["problems"] else "yes",
        )
    return result


if __name__ == "__main__":
    run(command)
