"""Move a GPTQ model to llama.cpp without quantizing it again.

python -m tools.examples.gptq_to_gguf SOURCE OUT

SOURCE is a GPTQ folder or hub id (AWQ, compressed-tensors and GGUF work as well); OUT gets checkpoint/ and gguf/.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from exporters import export
from l4q.checkpoint import L4QCheckpoint
from l4q.importing import ImportOptions, import_model


@click.command(name="gptq_to_gguf")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
def command(source: str, out: Path) -> None:
    """Take SOURCE's integers over into OUT/checkpoint, and pack them into OUT/gguf."""
    # Raises with the reason, before anything is written, if a layer is on no grid that holds it exactly.
    plan = import_model(ImportOptions(source=source, out=out / "checkpoint"))
    exact = sum(module.exact for module in plan.modules)
    click.echo(f"{plan.format}: {exact} of {len(plan.modules)} layers taken over, integer for integer")

    # Raises if gguf's own decoder reads anything but the checkpoint's weights out of the file.
    done = export(L4QCheckpoint.open(out / "checkpoint"), "gguf", out / "gguf")
    types = Counter(tensor.encoding for tensor in done.plan.quantized)
    click.echo(f"{done.folder}: {', '.join(f'{count} x {name}' for name, count in types.items())}")


if __name__ == "__main__":
    command()
