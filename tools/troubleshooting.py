"""Write docs/troubleshooting.md from the errors the code can raise: python -m tools.troubleshooting [--untested]."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import click

from tools.error_messages import Message, error_classes, literal_parts, messages, untested

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"

# Area of the page -> the start of the modules' paths; the longest start that fits decides.
AREAS: dict[str, tuple[str, ...]] = {
    "Options and grids": ("l4q/", "l4q/config", "l4q/rules", "l4q/module_grids", "l4q/targets", "l4q/cli"),
    "Training data": ("l4q/data",),
    "Loading and starting from a model": ("l4q/starts/", "l4q/init", "l4q/calibrate", "l4q/base", "l4q/train_model"),
    "Training, saved states and freezing": (
        "l4q/train", "l4q/warmup", "l4q/optim", "l4q/run_folder", "l4q/refreeze", "l4q/linear", "l4q/model",
        "l4q/kernels/", "l4q/quant",
    ),
    "Several processes": ("l4q/distributed", "l4q/sharding"),
    "Checkpoints and files": (
        "l4q/checkpoint", "l4q/shards", "l4q/files", "l4q/bitpack", "l4q/weight", "l4q/state_tensors", "l4q/hf",
    ),
    "l4q-import": ("l4q/importing/",),
    "l4q-export, every format": ("exporters/",),
    "GPTQ, AWQ and compressed-tensors": (
        "exporters/gptq/", "exporters/awq/", "exporters/compressed_tensors/", "exporters/hf_", "exporters/words",
        "exporters/container", "exporters/tensor_parallel",
    ),
    "GGUF": ("exporters/gguf/", "exporters/k_grid"),
    "ONNX": ("exporters/onnx/",),
    "l4q-inspect": ("exporters/inspect/",),
    "Engines, l4q-parity and l4q-eval": ("runtime_tests/",),
    "Servers": ("runtime_tests/serving/",),
}  # fmt: skip

HEAD = """\
# Troubleshooting

Every error this code raises on purpose, with what to do about it. **Written by `python -m tools.troubleshooting` from
the sources; a test compares.** A command prints such an error without a traceback,

    error: the group size does not divide in_features of some layers
      where: model.layers.0.mlp.down_proj
      got: group_size 64, in_features [341]
      expected: in_features 341: only -1 (one group per row)
      do: choose a group size that fits all, use -1, or leave these layers dense (--leave-dense)

and ends with its exit code. The first line is the one to look for here; `{name}` stands for what is filled in, `{…}`
for anything longer. The other lines name the file, tensor or option, what was found there, and what to do. In Python
these are subclasses of `l4q.errors.L4QError`.

| exit code | class | means |
|---|---|---|
"""

MEANINGS = {
    "L4QError": "the class of all; an error of a judge's own process that has no other class",
    "UsageError": "a bad option, or missing or damaged input",
    "UnsupportedError": "an architecture, format or runtime that cannot hold what was asked of it",
    "InexactError": "an export or import that would have to round, without leave",
    "VerificationError": "written bytes or a runtime's answers that do not match the checkpoint",
    "HubError": "a finished export could not be pushed; the export itself is complete",
    "OutputError": "an output could not be written: no room, no right, or the disk failed",
    "BusyError": "another process is writing the same output; the same command may work later",
    "PeerError": "process 0 of a distributed run failed; its message, and its exit code, count",
    "DivergedError": "the loss is no number any more; the run can be resumed with other rates",
    "EngineError": "a runtime's process crashed, hung or refused; the end of its log is part of the message",
    "ServerError": "a server did not start, died or does not answer",
}

TAIL = """\

## No message of ours

A traceback means a defect, of l4q or of a package below it: please report it with the command, the versions
(`pip freeze`) and the model's config.json. A run that was killed leaves its folder resumable (`--resume`); an export,
import or checkpoint is complete or not there at all, so what remains is at most a hidden folder beside it, which can be
deleted. Slow starts of vLLM on a CPU and how to shorten them: [serving.md](serving.md).
"""


def area(module: str) -> str:
    """The part of the page that a module's errors belong to."""
    fitting = [(len(start), name) for name, starts in AREAS.items() for start in starts if module.startswith(start)]
    return max(fitting)[1]


def advice(message: Message) -> str:
    """One line: the remedy, or what would have been accepted, or that the message says it."""
    if message.remedy:
        return message.remedy
    if literal_parts(message.expected):
        return f"expected: {message.expected}"
    return "the message says what would fit" if message.expected else "the message names what to look at"


def page() -> str:
    """The whole page."""
    classes = error_classes()
    rows = [f"| {code} | `{name}` | {MEANINGS.get(name, 'see its docstring')} |\n" for name, code in classes.items()]
    order = list(AREAS)
    found = sorted(messages(), key=lambda message: (order.index(area(message.module)), message.module, message.what))
    parts = [HEAD, *sorted(rows, key=lambda row: row[2])]
    for title, group in groupby(found, key=lambda message: area(message.module)):
        parts += [f"\n## {title}\n\n| message | exit | what to do | raised in |\n|---|---|---|---|\n"]
        parts += dict.fromkeys(_row(message, classes) for message in group)
    return "".join([*parts, TAIL])


def _row(message: Message, classes: dict[str, int]) -> str:
    cells = (_cell(message.what), str(classes[message.kind]), _cell(advice(message)), f"`{message.module}`")
    return f"| {' | '.join(cells)} |\n"


def _cell(text: str) -> str:
    """Text as a table cell that shows every character."""
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}" if character not in "<>" else f"&{'lg'[character == '>']}t;")
    return " ".join(text.split())


def report(missing: Sequence[Message]) -> str:
    """The messages that no test names, one a line."""
    lines = [f"{message.module}:{message.line}: {message.what}" for message in missing]
    return "\n".join([*lines, f"{len(missing)} of {len(messages())} messages are named by no test"])


@click.command(name="troubleshooting")
@click.option("--untested", "only_untested", is_flag=True, help="List the messages no test names; write nothing.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if the page is stale.")
def command(only_untested: bool, check: bool) -> None:
    """Write docs/troubleshooting.md from the errors the code can raise."""
    if only_untested:
        click.echo(report(untested()))
    elif check:
        raise SystemExit(PAGE.read_text(encoding="utf-8") != page())
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    command()
