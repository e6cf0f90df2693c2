"""`l4q-export`: move a checkpoint's integers into the formats that runtimes load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4q.cli_command import CommandLine, SuggestingChoice, command_line, print_json
from l4q.cli_common import ByteSize, run

# Names only: the packages behind them load when a format is chosen, so that --help stays quick.
FORMATS = ("gptq", "awq", "compressed-tensors", "gguf", "onnx")


class ExportCommand(CommandLine):
    """Offers the formats that other packages bring beside our own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Complete the choices of --to, then parse as usual."""
        from exporters.plugins import plugin_formats

        to = next(parameter for parameter in self.params if parameter.name == "formats")
        to.type = SuggestingChoice(tuple(dict.fromkeys((*FORMATS, *plugin_formats()))))
        return super().parse_args(ctx, args)


@command_line(
    "export",
    cls=ExportCommand,
    examples=(
        "l4q-export RUN/checkpoint --to gptq gguf onnx --out exports",
        "l4q-export RUN/checkpoint --to gguf --gguf-type Q4_1 --out exports --dry-run",
    ),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "formats", multiple=True, required=True, type=click.Choice(FORMATS), help="One or more formats.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder; each format gets a folder inside.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option(
    "--verify", type=click.Choice(["full", "sample", "none"]), is_flag=False, flag_value="full", default="full",
    show_default=True, help="Read every quantized tensor back with foreign decoders, a sample of them, or none.",
)  # fmt: skip
@click.option("--no-verify", "verify", flag_value="none", help="The same as --verify none.")
@click.option("--overwrite", is_flag=True, help="Replace existing output folders.")
@click.option(
    "--resume", is_flag=True,
    help="Go on with what an interrupted export has completed, and keep completed files if interrupted.",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait for another process that writes the same folder.")
@click.option("--allow-rounding", is_flag=True, help="Accept a format that cannot hold the trained values exactly.")
@click.option(
    "--gptq-format", type=click.Choice(["gptq", "gptq_v2"]), default="gptq", show_default=True,
    help="How zero-points are stored: gptq, minus one, which every reader knows; gptq_v2, as they are.",
)  # fmt: skip
@click.option(
    "--gguf-type", type=click.Choice(["auto", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q3_K", "F32"]), default="auto",
    show_default=True, help="Block type of the quantized layers; auto takes the smallest exact one, F32 dequantizes.",
)  # fmt: skip
@click.option(
    "--gguf-embeddings", type=click.Choice(["stored", "f16", "q8_0"]), default="stored", show_default=True,
    help="Dense embedding and output matrices; f16 and q8_0 round them.",
)  # fmt: skip
@click.option(
    "--onnx-graph", type=click.Choice(["auto", "built", "exported"]), default="auto", show_default=True,
    help="Build the graph, or export transformers' model; auto builds where it can.",
)  # fmt: skip
@click.option(
    "--onnx-scales", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
    help="Stored scales; both are exact, but K grids need float32.",
)  # fmt: skip
@click.option(
    "--onnx-block-size", type=int, default=None, help="Finer DequantizeLinear blocks (a power of two, 16-256)."
)
@click.option(
    "--onnx-accuracy-level", type=click.IntRange(0, 4), default=0, show_default=True, help="0 float32, 4 int8."
)
@click.option(
    "--onnx-runtime-optimized", is_flag=True,
    help="Also save the graph in the installed ONNX Runtime's operators: loads and decodes faster, only for it.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True,
    help="Dense tensors of GPTQ, AWQ and compressed-tensors.",
)  # fmt: skip
@click.option(
    "--max-shard-size", "max_shard_bytes", type=ByteSize(), default="1GB", show_default=True,
    help="Weights per file of GPTQ, AWQ and compressed-tensors: 500MB, 2GiB, ...",
)  # fmt: skip
@click.option(
    "--container-bits", type=int, default=None,
    help="Bits per stored code in GPTQ and compressed-tensors; 4 unless given, which is what vLLM runs. "
    "2 and 3 pack 2- and 3-bit codes densely, for GPTQModel and transformers; vLLM on a CPU refuses them.",
)  # fmt: skip
@click.option(
    "--tensor-parallel", type=click.IntRange(1), default=1, show_default=True,
    help="Check that GPTQ, AWQ and compressed-tensors survive vLLM's split over this many ranks.",
)  # fmt: skip
@click.option(
    "--push-to-hub", metavar="USER/NAME",
    help="Upload what was exported to the Hugging Face hub; with several formats, name {format} in it.",
)  # fmt: skip
@click.option("--private", is_flag=True, help="With --push-to-hub: make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="With --push-to-hub: push to this branch instead of main.")
def command(as_json: bool, **arguments: Any) -> None:
    """Export CHECKPOINT, the folder l4q-train wrote, packing its trained integers without quantizing again."""
    from exporters.run import run_export

    summary = run_export(arguments, table=not as_json)
    if as_json:
        print_json(summary)


def main() -> None:
    """Entry point of the `l4q-export` command."""
    run(command)
