"""`l4q-inspect`: what a checkpoint, an export or somebody else's quantized model holds."""

from __future__ import annotations

from pathlib import Path

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run


@command_line("inspect", examples=("l4q-inspect RUN/checkpoint", "l4q-inspect model.gguf --json"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--headers", is_flag=True, help="Read headers only: quick, without bits, group sizes and histograms.")
def command(path: Path, headers: bool, as_json: bool) -> None:
    """Show what PATH holds: layers, bits, group sizes, zero-points, histograms, sizes, and which runtimes load it.

    PATH is an L4Q checkpoint, a GPTQ, AWQ or compressed-tensors folder, a model that is not quantized, a GGUF file or
    an ONNX file; ours or anybody's.
    """
    from rich.console import Console

    from exporters.inspect import show
    from exporters.inspect.counts import count
    from exporters.inspect.open import open_source

    source = open_source(path)
    counts = count(source, read=not headers)
    if as_json:
        print_json(show.as_json(path, source, counts))
    else:
        show.show(path, source, counts, Console(width=show.WIDTH))


def main() -> None:
    """Entry point of the `l4q-inspect` command."""
    run(command)
