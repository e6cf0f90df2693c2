"""`l4q curves`: loss, held-out perplexity and the grid's movements of a run, as one page."""

from __future__ import annotations

import math
from pathlib import Path

import click

from l4q.cli_command import command_line, print_json
from l4q.errors import UsageError

PLACE = click.Path(path_type=Path, exists=True)


@command_line(
    "curves",
    examples=(
        "l4q curves RUN",
        'l4q curves RUN --compare OTHER_RUN --reference "16-bit LoRA=25.9"',
    ),
)
@click.argument("run", type=PLACE)
@click.option(
    "--compare", type=PLACE, multiple=True, metavar="RUN",
    help="Another run to draw beside it: of l4q-train, or of transformers' Trainer (a 16-bit LoRA); repeatable.",
)  # fmt: skip
@click.option(
    "--reference", "references", multiple=True, metavar="LABEL=PERPLEXITY",
    help="A perplexity to draw as a line, for example that of a 16-bit LoRA; repeatable.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Page to write.  [default: RUN/curves.html]"
)
def command(as_json: bool, run: Path, compare: tuple[Path, ...], references: tuple[str, ...], out: Path | None) -> None:
    """Draw RUN, a folder of l4q-train, as one self-contained HTML page.

    It shows loss, held-out perplexity beside reference lines, scale drift, clipped weights, zero-point moves and the
    gradient norm by step. A run that is still training can be drawn, too.
    """
    from runtime_tests.report_html.curves import KINDS, numbers, render_curves, write_curves
    from runtime_tests.report_html.runs import read_run

    if len(compare) >= len(KINDS):
        raise UsageError("too many runs for one page", got=1 + len(compare), expected=f"at most {len(KINDS)}")
    levels = dict(map(parse_reference, references))
    runs = [read_run(path) for path in (run, *compare)]
    page = out or (run if run.is_dir() else run.parent) / "curves.html"
    write_curves(render_curves(runs, levels), page)
    if as_json:
        print_json({"page": str(page), "references": levels, "figures": numbers(runs)})
    else:
        click.echo(page)


def parse_reference(text: str) -> tuple[str, float]:
    """LABEL=PERPLEXITY.

    Raises:
        UsageError: There is no label, or no positive number.
    """
    label, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not label.strip() or not (math.isfinite(value) and value > 0):
        raise UsageError("--reference takes LABEL=PERPLEXITY", got=text, expected='for example "16-bit LoRA=25.9"')
    return label.strip(), value
