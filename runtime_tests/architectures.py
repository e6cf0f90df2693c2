"""Every tiny architecture in every format that runs it: `python -m runtime_tests.architectures` writes the table.

A cell is "ok" only if the foreign decoder reads back every quantized module bit for bit, the runtime gives
transformers' log-probabilities (GGUF from the F32 file, ONNX at accuracy level 0), the quantized run stays within its
activation noise, and greedy tokens are transformers'.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import gguf as gguf_exporter
from exporters import onnx as onnx_exporter
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError
from runtime_tests.engines.llamacpp_engine import Engine as LlamaEngine
from runtime_tests.engines.onnxruntime_engine import Engine as OnnxEngine
from runtime_tests.random_models import dequantized_model, model_logprobs
from runtime_tests.tiny_archs import TINY_ARCHS, TinyArch, tiny_arch_checkpoint

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"

IDS = [int(token) for token in np.random.default_rng(0).integers(3, 323, 50)]
GREEDY_PROMPT, GREEDY_TOKENS = 30, 6

MEAN_LIMIT = 1e-4
"""Mean |difference| of log-probabilities on equal weights; measured 7e-7, and 6e-5 with llama.cpp's GELU."""
KL_LIMIT = 0.02
"""Mean KL of the quantized file; measured 3e-4, and 7e-3 where int8 activations flip a router's choice."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One architecture in one format."""

    refused: str = ""
    """The exporter's message, if it refused."""
    wrong_modules: tuple[str, ...] = ()
    mean: float = 0.0
    """Mean |difference| of log-probabilities from the oracle."""
    kl: float = 0.0
    """Mean KL of the quantized run."""
    greedy_equal: bool = True
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """One of "ok", "refused" and "wrong"."""
        if self.refused:
            return "refused"
        right = not self.wrong_modules and self.mean < MEAN_LIMIT and self.kl < KL_LIMIT and self.greedy_equal
        return "ok" if right else "wrong"


class GgmlGelu(torch.nn.Module):
    """llama.cpp's GELU on CPUs: a table over float16 inputs with float16 results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round, compute, round."""
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def oracle(checkpoint: L4QCheckpoint, *, ggml: bool) -> Any:
    """Transformers on the dequantized weights; with `ggml`, its GELU replaced by llama.cpp's coarser one."""
    model = dequantized_model(checkpoint)
    if ggml and getattr(model.config, "hidden_activation", None):
        for layer in model.model.layers:
            layer.mlp.act_fn = GgmlGelu()
    return model


def wrong_modules(checkpoint: L4QCheckpoint, exporter: Any, folder: Path) -> tuple[str, ...]:
    """Modules that a foreign decoder reads with other bits, or not at all."""
    found = dict(exporter.read_back(folder))
    expected = {module: checkpoint.quantized(module).dequantize() for module in checkpoint.modules}
    return tuple(
        module
        for module, values in expected.items()
        if module not in found or not np.array_equal(found[module].view(np.uint32), values.view(np.uint32))
    )


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean KL(expected || got) in nats per token."""
    return float((np.exp(expected) * (expected - got)).sum(axis=1).mean())


def write_export(checkpoint: L4QCheckpoint, exporter: Any, folder: Path, **options: Any) -> tuple[str, ...]:
    """Plan and write into a new folder; the plan's notes."""
    chosen = ExportOptions(**options)
    plan = exporter.plan(checkpoint, chosen)
    folder.mkdir(parents=True)
    exporter.write(checkpoint, plan, folder, chosen, lambda name: None)
    return tuple(plan.notes)


def greedy_equal(model: Any, engine: Any) -> bool:
    """Whether the engine's continuation, through its cache, is the argmax of full forwards."""
    new, _ = engine.generate(IDS[:GREEDY_PROMPT], GREEDY_TOKENS)
    rows = model_logprobs(model, IDS[:GREEDY_PROMPT] + new)[GREEDY_PROMPT - 1 : -1]
    return bool(new) and [int(token) for token in rows.argmax(axis=1)] == new


def gguf_cell(checkpoint: L4QCheckpoint, folder: Path, source: L4QCheckpoint | None = None) -> Cell:
    """Export F32 and quantized and run both in llama.cpp; `source` replaces what is exported."""
    source = source or checkpoint
    try:
        notes = write_export(source, gguf_exporter, folder / "blocks")
        write_export(source, gguf_exporter, folder / "f32", gguf_type="F32")
    except UnsupportedError as error:
        return Cell(refused=str(error))
    model = oracle(checkpoint, ggml=True)
    expected = model_logprobs(model, IDS)
    plain = LlamaEngine(str(folder / "f32"), kv="f32", n_threads=1)
    blocks = LlamaEngine(str(folder / "blocks"), kv="f32", n_threads=1)
    try:
        return Cell(
            wrong_modules=wrong_modules(checkpoint, gguf_exporter, folder / "blocks"),
            mean=float(np.abs(plain.prompt_logprobs(IDS) - expected).mean()),
            kl=divergence(expected, blocks.prompt_logprobs(IDS)),
            greedy_equal=greedy_equal(model, plain),
            notes=notes,
        )
    finally:
        plain.close()
        blocks.close()


def onnx_cell(checkpoint: L4QCheckpoint, folder: Path, source: L4QCheckpoint | None = None) -> Cell:
    """Export and run in ONNX Runtime at level 0; `source` replaces what is exported."""
    try:
        notes = write_export(source or checkpoint, onnx_exporter, folder)
    except UnsupportedError as error:
        return Cell(refused=str(error))
    model = oracle(checkpoint, ggml=False)
    expected = model_logprobs(model, IDS)
    engine = OnnxEngine(str(folder), threads=1)
    try:
        got = engine.prompt_logprobs(IDS)
        fused = engine.info()["matmulnbits"] == len(checkpoint.modules)
        return Cell(
            wrong_modules=wrong_modules(checkpoint, onnx_exporter, folder) if fused else ("not fused",),
            mean=float(np.abs(got - expected).mean()),
            kl=divergence(expected, got),
            greedy_equal=greedy_equal(model, engine),
            notes=notes,
        )
    finally:
        engine.close()


FORMATS: Mapping[str, Callable[..., Cell]] = {"gguf": gguf_cell, "onnx": onnx_cell}


def measure(arch: TinyArch, folder: Path) -> dict[str, Cell]:
    """All formats of one architecture."""
    checkpoint = tiny_arch_checkpoint(arch, folder / "checkpoint")
    return {name: cell(checkpoint, folder / name) for name, cell in FORMATS.items()}


HEADER = """\
# Architectures

Written by `python -m runtime_tests.architectures` and compared with a fresh run by the test suite; do not edit by hand.

Each row is a tiny random model of odd sizes (6 query heads on 2 key heads, a vocabulary of 323), wrapped, moved off its
starting point and frozen, then exported. **ok** means all of:

- a foreign decoder (gguf-py, onnx's reference evaluator) reads back every quantized module bit for bit;
- the real runtime gives transformers' log-probabilities with a mean difference below 1e-4: llama.cpp from the F32 file,
  ONNX Runtime at accuracy level 0 with every quantized linear fused to MatMulNBits;
- llama.cpp's quantized run stays below a mean KL of 0.02;
- greedy tokens through the runtime's cache are transformers'.

llama.cpp computes GELU from a float16 table, so for gemma the reference does too. **refused** means that the exporter
stops before writing, with the reason given.

| architecture | llama.cpp (gguf) | ONNX Runtime (onnx) |
|---|---|---|
"""
FOOTER = """\

GGUF refuses an architecture outside its table (`exporters/gguf/families.py`) with the list of those inside. For one
outside ONNX's (`exporters/onnx/family.py`), transformers' own model is exported with the integers in place, or refused
with the reason: [onnx.md](onnx.md).
"""


def render(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """The document."""
    remarks: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        lines = cell.refused.splitlines()
        notes = [note for note in cell.notes if note.startswith(("context length", "experts", "rope type"))]
        texts = [lines[0]] if lines else notes
        marks = "".join(f" [{remarks.setdefault(text, len(remarks) + 1)}]" for text in texts)
        return f"{cell.status}{marks}"

    rows = [
        f"| {TINY_ARCHS[name].family} | {' | '.join(shown(cells[form]) for form in FORMATS)} |"
        for name, cells in table.items()
    ]
    listed = [f"{number}. {text}" for text, number in remarks.items()]
    return HEADER + "\n".join([*rows, "", *listed]) + "\n" + FOOTER


def main() -> None:
    """Run everything and write docs/architectures.md."""
    with tempfile.TemporaryDirectory() as scratch:
        table = {name: measure(arch, Path(scratch) / name) for name, arch in TINY_ARCHS.items()}
    wrong = {name: cells for name, cells in table.items() if any(cell.status == "wrong" for cell in cells.values())}
    if wrong:
        sys.exit(f"not written, these are wrong: {wrong}")
    DOCUMENT.write_text(render(table), encoding="utf-8")


if __name__ == "__main__":
    main()
