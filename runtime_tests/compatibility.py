"""Every format x stored bits x zero-point in every runtime that reads the format, on a real model: `Bench`.

A cell is "ok" only if the runtime loads the export and answers like the torch oracle on the checkpoint: within the
format's documented bounds (runtime_tests/thresholds.py), and for loaders that give their weights away, with every
weight bit for bit the trained one and the same greedy tokens. `python -m tools.compatibility` writes the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.driver import export, get_exporter
from exporters.plan import ExportOptions
from exporters.verify import verify
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig, ZeroPoint
from l4q.errors import L4QError, UnsupportedError, VerificationError
from l4q.model import save_l4q, wrap_linears
from runtime_tests.compare import LogprobComparison
from runtime_tests.conftest import disturb
from runtime_tests.engines.host import EngineError, RemoteEngine
from runtime_tests.engines.torch_engine import Engine as TorchEngine
from runtime_tests.thresholds import Limit, limits_for

# label -> (exporter, its options)
FORMATS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "GPTQ (v1)": ("gptq", {"gptq_format": "gptq"}),
    "GPTQ v2": ("gptq", {"gptq_format": "gptq_v2"}),
    "AWQ": ("awq", {}),
    "compressed-tensors": ("compressed-tensors", {}),
    "GGUF": ("gguf", {}),
    "ONNX": ("onnx", {}),
}
# label -> (bits of the checkpoint, options)
STORED: Mapping[str, tuple[int, dict[str, Any]]] = {
    "int4": (4, {}),
    "int3 in 4-bit fields": (3, {}),
    "int3 dense": (3, {"container_bits": 3}),
    "int2 dense": (2, {"container_bits": 2}),
}
DENSE = ("int3 dense", "int2 dense")
# exporter -> runtimes with a reader for the format; the others are "not supported"
READERS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("decoder", "vllm", "transformers", "gptqmodel"),
    "awq": ("decoder", "vllm", "transformers", "gptqmodel"),
    "compressed-tensors": ("decoder", "vllm", "transformers"),
    "gguf": ("decoder", "llamacpp", "transformers"),
    "onnx": ("decoder", "onnxruntime"),
}
GROUP_SIZE = 64
TOKENS = 64
GREEDY_PROMPT, GREEDY_TOKENS = 24, 12
MEAN_LIMIT = 1e-4
"""Mean |difference| of all log-probabilities of a loader that computes in float32; measured 2e-6."""
KL_LIMIT = 3e-4
"""Mean KL from the oracle on this model, beside the documented bounds, which are for any model; measured 3e-5 with
llama.cpp's int8 activations, while the integers of another grid are 6e-3 away."""
MESSAGE_CHARS = 220


@dataclass(frozen=True, order=True)
class Row:
    """One line of the table."""

    label: str
    """A key of FORMATS."""
    stored: str
    """A key of STORED."""
    zero_point: ZeroPoint

    @property
    def format(self) -> str:
        """The exporter's name."""
        return FORMATS[self.label][0]


@dataclass(frozen=True)
class Cell:
    """What one runtime did with one row."""

    status: str
    """One of "ok", "refused", "not supported" and "wrong"."""
    message: str = ""
    """Why it refused, or what is wrong."""


def table_rows() -> tuple[Row, ...]:
    """All rows: dense fields where a format could have them, float zero-points once where a format refuses them."""
    rows = []
    for label, (name, _) in FORMATS.items():
        blocks = name in ("gguf", "onnx")  # their storage follows from the grid, and they take float zero-points
        for stored in STORED:
            if blocks and stored in DENSE:
                continue
            rows += [Row(label, stored, "none"), Row(label, stored, "integer")]
            if blocks or stored == "int4":
                rows.append(Row(label, stored, "float"))
    return tuple(rows)


@dataclass
class Answers:
    """The oracle's."""

    rows: np.ndarray
    greedy: list[int]
    digests: dict[str, str]


@dataclass
class Bench:
    """A real model's checkpoints and exports, and the workers that run them; close it after use."""

    source: Path
    """A Hugging Face folder."""
    text: str
    """Held-out text; its first TOKENS tokens are asked."""
    scratch: Path
    """An empty folder."""
    _engines: dict[str, RemoteEngine] = field(default_factory=dict)
    _answers: dict[Path, Answers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        encoded = AutoTokenizer.from_pretrained(self.source)(self.text[:400])["input_ids"]
        self.ids = [int(token) for token in encoded[:TOKENS]]

    def checkpoint(self, row: Row) -> L4QCheckpoint:
        """The attention projections quantized, the odd-sized MLP dense, as after a short training."""
        from transformers import AutoModelForCausalLM

        bits = STORED[row.stored][0]
        target = self.scratch / f"int{bits}-{row.zero_point}"
        if not target.exists():
            quant = QuantConfig(bits=bits, group_size=GROUP_SIZE, zero_point=row.zero_point)
            model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
            wrap_linears(model, quant, LoraConfig(rank=4, target_modules=("*.self_attn.*",)))
            disturb(model)
            save_l4q(model, target, quant=quant, side_files_from=self.source)
        return L4QCheckpoint.open(target)

    def folder(self, row: Row) -> Path:
        """The row's export.

        Raises:
            UnsupportedError: l4q-export refuses it.
        """
        checkpoint = self.checkpoint(row)
        target = checkpoint.path / f"{row.label} {row.stored}"
        if not target.exists():
            options = ExportOptions(**FORMATS[row.label][1], **STORED[row.stored][1])
            export(checkpoint, row.format, target, options, check="none")
        return target

    def cell(self, row: Row, runtime: str) -> Cell:
        """Export and run."""
        if runtime not in READERS[row.format]:
            return Cell("not supported")
        try:
            folder = self.folder(row)
        except UnsupportedError as error:
            return Cell("refused", f"by l4q-export: {error.what}")
        return self.judge(row, runtime, folder)

    def judge(self, row: Row, runtime: str, folder: Path) -> Cell:
        """Run a folder that holds the row, or claims to."""
        try:
            problem = RUNTIMES[runtime](self, row, folder)
        except EngineError as error:
            return Cell("refused", message_of(error, folder))
        return Cell("wrong", problem) if problem else Cell("ok")

    def engine(self, name: str, folder: Path, **options: Any) -> RemoteEngine:
        """The one worker of an engine, with this folder loaded."""
        if name in self._engines:
            self._engines[name].reload(folder, **options)
        else:
            self._engines[name] = RemoteEngine(name, folder, **options)
        return self._engines[name]

    def oracle(self, row: Row) -> Answers:
        """Torch in float32 on the row's checkpoint."""
        checkpoint = self.checkpoint(row)
        if checkpoint.path not in self._answers:
            engine = TorchEngine(str(checkpoint.path))
            weights = {module: checkpoint.quantized(module).dequantize() for module in checkpoint.modules}
            self._answers[checkpoint.path] = Answers(
                rows=engine.prompt_logprobs(self.ids),
                greedy=engine.generate(self.ids[:GREEDY_PROMPT], GREEDY_TOKENS)[0],
                digests={module: hashlib.sha256(array.tobytes()).hexdigest() for module, array in weights.items()},
            )
        return self._answers[checkpoint.path]

    def close(self) -> None:
        """End all workers."""
        for engine in self._engines.values():
            engine.close()


def decoder(bench: Bench, row: Row, folder: Path) -> str:
    """The format's foreign decoder: every quantized weight bit for bit."""
    try:
        report = verify(bench.checkpoint(row), get_exporter(row.format), folder)
    except VerificationError as error:
        return error.what
    return "" if report.passed else f"{len(report.differing)} of {report.total} modules differ"


def loader(name: str) -> Callable[[Bench, Row, Path], str]:
    """GPTQModel or transformers: weights bit for bit, log-probabilities and greedy tokens."""

    def run(bench: Bench, row: Row, folder: Path) -> str:
        engine, oracle = bench.engine("loaders", folder, loader=name), bench.oracle(row)
        found = json.loads(engine.info()["digests"])
        wrong = [module for module, digest in oracle.digests.items() if found.get(module) != digest]
        if wrong:
            return f"{len(wrong)} of {len(oracle.digests)} weights differ"
        got = engine.prompt_logprobs(bench.ids)
        if row.format == "awq":  # GPTQModel's AWQ layer multiplies in float16
            return out_of_bounds(bench, row, got, "")
        mean = float(np.abs(got - oracle.rows).mean())
        if not mean < MEAN_LIMIT:
            return f"log-probabilities differ by {mean:.2g} in the mean"
        greedy = engine.generate(bench.ids[:GREEDY_PROMPT], GREEDY_TOKENS)[0]
        return "" if greedy == oracle.greedy else f"greedy tokens {greedy} instead of {oracle.greedy}"

    return run


def runtime(name: str, variant: str, **options: Any) -> Callable[[Bench, Row, Path], str]:
    """A runtime with kernels of its own: log-probabilities within its documented bounds."""

    def run(bench: Bench, row: Row, folder: Path) -> str:
        return out_of_bounds(bench, row, bench.engine(name, folder, **options).prompt_logprobs(bench.ids), variant)

    return run


def out_of_bounds(bench: Bench, row: Row, got: np.ndarray, variant: str) -> str:
    """The documented bounds that an answer breaks."""
    comparison = LogprobComparison()
    try:
        comparison.add(bench.ids, bench.oracle(row).rows, got)
    except VerificationError as error:  # NaN
        return error.what
    sharper = Limit(figure="kl", bound=KL_LIMIT, reason="this model shows no more")
    checks = [limit.check(comparison.stats) for limit in (*limits_for(row.format, variant), sharper)]
    return "; ".join(f"{check.limit.figure} {check.value:.2g}" for check in checks if not check.passed)


RUNTIMES: Mapping[str, Callable[[Bench, Row, Path], str]] = {
    "decoder": decoder,
    "vllm": runtime("vllm", "", max_model_len=128),
    "llamacpp": runtime("llamacpp", "quantized", kv="f32", n_threads=1),
    "onnxruntime": runtime("onnxruntime", "0", threads=1),
    "transformers": loader("transformers"),
    "gptqmodel": loader("gptqmodel"),
}


def message_of(error: L4QError, folder: Path) -> str:
    """The runtime's own words, in one line, without paths."""
    text = " ".join(error.what.replace(str(folder), "FOLDER").split())
    text = re.sub(r"^the \w+ engine failed in \w+: ", "", text)
    text = re.sub(r"^.*Value error, |\[type=.*", "", text).strip()  # pydantic's frame around a message
    text = text.partition(" Reasons: ")[0]  # vLLM's list of all its kernels, which depends on the processor
    return text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS].rsplit(" ", 1)[0] + " ..."
