"""Quality per bit of every GGUF grid: python -m tools.compare_grids.

Each grid takes the same float32 model by plain rounding, without training: l4q's grids from their initial scales, and
llama.cpp's own quantizer (its C code, no importance matrix) to the same block types. What is measured are the blocks as
a GGUF file holds them, decoded by gguf-py: bits per weight, relative root mean square error of the weights, and
perplexity in torch, so that no runtime's rounding of activations is in it.

Every figure twice: with only the layers quantized whose rows K types can hold (in_features a multiple of 256), and with
all of them, those that K types cannot hold on the grid `QuantConfig.for_layer` gives them (llama.cpp: Q4_1 beside Q4_K,
Q4_0 beside Q3_K).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import gguf
import gguf.quants
import numpy as np
import torch

from exporters.gguf.encode import Subject, choose_encoding, encode
from l4q.cli_common import run
from l4q.config import Init, QuantConfig
from l4q.errors import UsageError
from l4q.evaluate import text_windows, windows_perplexity
from l4q.init import init_qparams
from l4q.k_grids import K_GRIDS, SUPERBLOCK
from l4q.quant import LoraUpdate, freeze_weight, grid_params
from l4q.weight import F32
from runtime_tests.engines.ggml_rows import quantize_rows
from tools.rotate import READERS, WRITERS, rotate_residual

ASSETS = Path("build/assets")
Stored = tuple[str, np.ndarray]
"""Block type and rows of blocks, uint8."""
Quantizer = Callable[[torch.Tensor], Stored]

K_FALLBACK = {"Q4_K": "Q4_1", "Q3_K": "Q4_0"}
"""What llama.cpp's quantizer is given where rows do not fill superblocks."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One set of layers on one grid."""

    bits: float
    """Bits per quantized weight, as stored."""
    rms: float
    """||W_q - W|| / ||W|| over these layers."""
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One grid."""

    grid: str
    block: str
    fitting: Figures
    """Only layers whose rows fill superblocks are quantized."""
    whole: Figures


def l4q_grid(quant: QuantConfig, init: Init) -> Quantizer:
    """Round to nearest on a grid of l4q, as a layer starts to train, stored as `l4q-export --to gguf` stores it."""

    def quantize(weight: torch.Tensor) -> Stored:
        grid = quant.for_layer(weight.shape[1])
        start = init_qparams(weight, grid, init)
        nothing = LoraUpdate(torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1), 0.0)
        frozen = freeze_weight(weight, nothing, grid_params(start.scales, start.offsets, grid), grid)
        kind = choose_encoding(Subject.of(frozen), "auto").name
        return kind, np.asarray(encode(frozen, kind))

    return quantize


def llama_cpp(kind: str) -> Quantizer:
    """llama.cpp's own quantizer."""

    def quantize(weight: torch.Tensor) -> Stored:
        chosen = K_FALLBACK.get(kind, kind) if weight.shape[1] % SUPERBLOCK else kind
        return chosen, quantize_rows(weight.numpy(), chosen)

    return quantize


def grid_config(bits: int, zero_point: str, scale_grid: str) -> QuantConfig:
    """A grid with the group size of its scale grid: 32, or 16 on q3_k."""
    size = K_GRIDS[scale_grid].group_size if scale_grid in K_GRIDS else 32
    values = {"bits": bits, "group_size": size, "zero_point": zero_point, "scale_grid": scale_grid}
    return QuantConfig.from_dict(values)


QUANTIZERS: Mapping[str, Quantizer] = {
    "l4q q3_k none": l4q_grid(grid_config(3, "none", "q3_k"), "l4q"),
    "llama.cpp Q3_K": llama_cpp("Q3_K"),
    "l4q q4_k none": l4q_grid(grid_config(4, "none", "q4_k"), "l4q"),
    "l4q q4_k float": l4q_grid(grid_config(4, "float", "q4_k"), "asymm"),
    "llama.cpp Q4_K": llama_cpp("Q4_K"),
    "l4q fp16 none, 3 bits": l4q_grid(grid_config(3, "none", "fp16"), "l4q"),
    "l4q fp16 none": l4q_grid(grid_config(4, "none", "fp16"), "l4q"),
    "llama.cpp Q4_0": llama_cpp("Q4_0"),
    "l4q fp16_s7 integer": l4q_grid(grid_config(4, "integer", "fp16_s7"), "asymm"),
    "l4q fp16 float": l4q_grid(grid_config(4, "float", "fp16"), "asymm"),
    "llama.cpp Q4_1": llama_cpp("Q4_1"),
    "l4q fp16 integer": l4q_grid(grid_config(4, "integer", "fp16"), "asymm"),
    "llama.cpp Q5_0": llama_cpp("Q5_0"),
}
"""In the order of the table; groups of 32 columns, 16 on q3_k."""


class Measured:
    """A model whose linears can be replaced by what a quantizer makes of them."""

    def __init__(self, model: Any, windows: list[list[int]]) -> None:
        self._model, self._windows = model, windows
        names = (*READERS, *WRITERS)
        self._linears = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
        self._originals = {name: linear.weight.detach().clone() for name, linear in self._linears.items()}
        if not self.fitting:
            raise UsageError("no layer's rows fill superblocks", expected=f"in_features that {SUPERBLOCK} divides")

    @property
    def fitting(self) -> list[str]:
        """The linears whose rows fill superblocks."""
        return [name for name, weight in self._originals.items() if weight.shape[1] % SUPERBLOCK == 0]

    def perplexity(self) -> float:
        """Of the weights in place."""
        return windows_perplexity(self._model, self._windows).value

    @torch.no_grad()
    def measure(self, name: str, quantizer: Quantizer) -> Row:
        """Quantize the fitting layers, then all of them; the original weights are put back."""
        stored = {linear: quantizer(weight) for linear, weight in self._originals.items()}
        figures = {}
        for label, linears in (("fitting", self.fitting), ("whole", list(self._originals))):
            for linear in linears:
                self._linears[linear].weight.copy_(torch.from_numpy(decode(stored[linear])))
            figures[label] = Figures(
                bits=self._bits(stored, linears), rms=self._rms(linears), perplexity=self.perplexity()
            )
        for linear, weight in self._originals.items():
            self._linears[linear].weight.copy_(weight)
        return Row(grid=name, block=stored[self.fitting[0]][0], **figures)

    def _bits(self, stored: Mapping[str, Stored], linears: Iterable[str]) -> float:
        sizes = [(stored[name][1].nbytes, self._originals[name].numel()) for name in linears]
        return 8 * sum(size for size, _ in sizes) / sum(count for _, count in sizes)

    def _rms(self, linears: Iterable[str]) -> float:
        error = size = 0.0
        for name in linears:
            error += float((self._linears[name].weight - self._originals[name]).double().square().sum())
            size += float(self._originals[name].double().square().sum())
        return float((error / size) ** 0.5)


def decode(stored: Stored) -> F32:
    """gguf-py's reading of the blocks."""
    kind, data = stored
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32, copy=False)


def format_table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [
        "| grid | block | bits/weight | weight RMS | perplexity | all: bits/weight | weight RMS | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{f.bits:.4g} | {100 * f.rms:.2f} % | {f.perplexity:.3f}" for f in (row.fitting, row.whole)]
        lines.append(f"| {row.grid} | {row.block} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(name="compare_grids", context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path), default=ASSETS / "smollm2", help="A llama; a folder.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=ASSETS / "text" / "wiki_demo.txt")
@click.option("--window", default=512, help="Tokens per window.")
@click.option("--windows", default=4, help="Number of windows.")
@click.option("--rotate/--no-rotate", default=True, help="Take the weights off the grid they were published on.")
@click.option("--only", multiple=True, help="Grids to measure, by a part of their names; repeatable.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path, text: Path, window: int, windows: int, rotate: bool, only: tuple[str, ...], as_json: bool
) -> None:
    """Measure every grid on MODEL and print a table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = text_windows(tokenizer, text.read_text(encoding="utf-8"), window, windows)
    base = windows_perplexity(loaded, ids).value
    if rotate:
        rotate_residual(loaded)
    measured = Measured(loaded, ids)
    click.echo(
        f"base: perplexity {base:.3f}" + (f", rotated {measured.perplexity():.3f}" if rotate else ""), err=as_json
    )
    rows = []
    for name, quantizer in QUANTIZERS.items():
        if not only or any(part in name for part in only):
            rows.append(measured.measure(name, quantizer))
            click.echo(format_table(rows[-1:]).splitlines()[-1], err=True)
    click.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else format_table(rows))


if __name__ == "__main__":
    run(command)
