"""Cost of L4Q's own work in a linear layer: python -m tools.bench_kernels [--device cuda --model 7b].

For every kind of kernels that runs on the device: the forward (merge, quantize) and the backward (merge, W_q, the
product dL/dy^T x, reductions, dL/dA and dL/dB) of one decoder block's linears, after checking them against the eager
kernels bit by bit. Times are minima, as ratios to the eager kernels and to copying the bytes that have to move anyway
(W0 in, W_q out; in the backward also dL/dW_q in). The last line of stdout is one JSON object
{kernels: {"forward_vs_eager", "backward_vs_eager", "elementwise_vs_eager", "forward_vs_copy", "elementwise_vs_copy"}},
elementwise being the backward with 8 tokens, where that product costs little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from l4q.cli_common import run
from l4q.config import KernelChoice, QuantConfig
from l4q.errors import VerificationError
from l4q.kernels.problem import Kernels
from l4q.kernels.select import BY_DEVICE, kernels_for, require_kernels
from l4q.kernels.verify import compare, example
from tools.measure import timed

# [out, in] of a decoder block's linears, and how many there are
BLOCKS: dict[str, dict[tuple[int, int], int]] = {
    "smollm2": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "1b": {(2048, 2048): 2, (256, 2048): 2, (5632, 2048): 2, (2048, 5632): 1},
    "7b": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
}
FEW_TOKENS = 8
"""Makes the product dL/dy^T x cheap, so that what is left of the backward shows."""


@dataclass
class Seconds:
    """Of one decoder block's linears."""

    forward: float = 0.0
    backward: float = 0.0
    elementwise: float = 0.0
    """The backward with FEW_TOKENS tokens."""
    forward_copy: float = 0.0
    """Copying what the forward has to move."""
    backward_copy: float = 0.0

    def ratios(self, eager: Seconds) -> dict[str, float]:
        """The figures of the last line."""
        return {
            "forward_vs_eager": round(self.forward / eager.forward, 3),
            "backward_vs_eager": round(self.backward / eager.backward, 3),
            "elementwise_vs_eager": round(self.elementwise / eager.elementwise, 3),
            "forward_vs_copy": round(self.forward / self.forward_copy, 2),
            "elementwise_vs_copy": round(self.elementwise / self.backward_copy, 2),
        }


def measure(kernels: Kernels, model: str, dtype: torch.dtype, device: str, tokens: int, repeats: int) -> Seconds:
    """Check the kernels on every shape of a block, then time them.

    Raises:
        VerificationError: They differ from the eager ones.
    """
    total = Seconds()
    for shape, count in BLOCKS[model].items():
        problem, x, grad_y = example(QuantConfig(zero_point="integer"), dtype, device, shape=shape, tokens=tokens)
        few = x[:FEW_TOKENS].contiguous(), grad_y[:FEW_TOKENS].contiguous()
        odd = compare(kernels, problem, *few)
        if odd is not None:
            raise VerificationError("the kernels differ from the eager ones", where=f"{kernels.name}, {shape}", got=odd)
        moved = 2 * problem.weight.nbytes
        works = {
            "forward": lambda p=problem: kernels.quantize(p, dtype),
            "backward": lambda p=problem, a=x, b=grad_y: kernels.gradients(p, a, b),
            "elementwise": lambda p=problem, a=few[0], b=few[1]: kernels.gradients(p, a, b),
            "forward_copy": _copy(moved, device),
            "backward_copy": _copy(moved + problem.weight.nbytes, device),
        }
        for name, work in works.items():
            work()
            best = min(timed(device, work)[1] for _ in range(repeats))
            setattr(total, name, getattr(total, name) + count * best)
    return total


def _copy(nbytes: int, device: str) -> Any:
    """A copy that reads and writes `nbytes` altogether."""
    source, target = (torch.zeros(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _show(found: Mapping[KernelChoice, Seconds], title: str, console: Console) -> None:
    table = Table("kernels", "forward ms", "backward ms", f"backward, {FEW_TOKENS} tokens, ms", title=title)
    for name, cost in found.items():
        table.add_row(name, *(f"{1e3 * value:.2f}" for value in (cost.forward, cost.backward, cost.elementwise)))
    cost = next(iter(found.values()))
    table.add_row("copying", f"{1e3 * cost.forward_copy:.2f}", "", f"{1e3 * cost.backward_copy:.2f}")
    console.print(table)


@click.command(context_settings={"show_default": True})
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto: cuda if there is one."
)
@click.option("--model", type=click.Choice(sorted(BLOCKS)), help="[default: smollm2 on a CPU, 7b on cuda]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", help="Of W0 and activations.")
@click.option("--tokens", type=click.IntRange(FEW_TOKENS), default=1024, help="Rows of the activations.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="The fastest of so many counts.")
def command(device: str, model: str | None, dtype: str, tokens: int, repeats: int) -> None:
    """Compare the kernels of this device with the eager ones."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model or ("7b" if device == "cuda" else "smollm2")
    fast: KernelChoice = BY_DEVICE[device]
    require_kernels(fast)
    chosen: tuple[KernelChoice, ...] = ("eager", fast)
    found = {
        name: measure(kernels_for(name, device), model, getattr(torch, dtype), device, tokens, repeats)
        for name in chosen
    }
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    _show(found, f"linears of a {model} block, {tokens} tokens, {dtype}, {device}{threads}", Console())
    click.echo(json.dumps({name: cost.ratios(found["eager"]) for name, cost in found.items()}))


def main() -> None:
    """Entry point."""
    run(command)


if __name__ == "__main__":
    main()
