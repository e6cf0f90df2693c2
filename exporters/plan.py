"""What an export will write, decided and checked before the first byte: `ExportPlan`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from l4q.prefix_hash import Advance, ignore
from l4q.shard_layout import MAX_SHARD_BYTES

GptqFormat = Literal["gptq", "gptq_v2"]
GgufType = Literal["auto", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q3_K", "F32"]
GgufEmbeddings = Literal["stored", "f16", "q8_0"]
OnnxGraph = Literal["auto", "built", "exported"]
OnnxScales = Literal["float32", "float16"]
DenseDtype = Literal["float16", "bfloat16", "float32"]


class Fidelity(Enum):
    """Whether a stored tensor equals the checkpoint's."""

    EXACT = "exact"
    ROUNDED = "rounded"


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    """Module or tensor name in the checkpoint."""
    target: str
    """Name in the output file."""
    encoding: str
    """The format's own word for the storage: "Q4_0", "INT4 block 64", "F16"."""
    shape: tuple[int, ...]
    """Logical shape of the source."""
    nbytes: int
    """Bytes in the output, scales and zero-points included."""
    fidelity: Fidelity
    reason: str = ""
    """Why this encoding, and why it rounds if it does."""
    quantized: bool
    """True for linears with integer codes, False for dense tensors."""


@dataclass(frozen=True, kw_only=True)
class RuntimeSupport:
    """Whether a runtime will load the result."""

    runtime: str
    loads: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything an export is about to write, with the reasons."""

    format: str
    tensors: tuple[PlannedTensor, ...]
    runtimes: tuple[RuntimeSupport, ...]
    notes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """Installed packages whose release decides bytes of the output."""
    warnings: tuple[str, ...] = ()
    """What a runtime that loads the result is known to ignore, round or misread."""

    @property
    def cautions(self) -> tuple[str, ...]:
        """The warnings, and a line for every runtime that does not load the result, old releases of one excepted."""
        refusing = [r for r in self.runtimes if not r.loads and "<" not in r.runtime]
        return (*self.warnings, *(f"{runtime.runtime} does not load it: {runtime.reason}" for runtime in refusing))

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that carry trained integers."""
        return tuple(tensor for tensor in self.tensors if tensor.quantized)

    @property
    def rounded(self) -> tuple[PlannedTensor, ...]:
        """The quantized tensors this export would change."""
        return tuple(tensor for tensor in self.quantized if tensor.fidelity is Fidelity.ROUNDED)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero-points included; 0 without quantized tensors."""
        weights = sum(int(np.prod(tensor.shape)) for tensor in self.quantized)
        return 8 * sum(tensor.nbytes for tensor in self.quantized) / weights if weights else 0.0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Choices of one export; a format reads the fields that concern it.

    Raises:
        UsageError: A field has an unknown value.
    """

    gptq_format: GptqFormat = "gptq"
    """Stored zero-points: "gptq" (v1) holds z - 1, "gptq_v2" holds z."""
    gguf_type: GgufType = "auto"
    """Block type of quantized tensors; "F32" writes dequantized weights, for parity checks."""
    gguf_embeddings: GgufEmbeddings = "stored"
    """Dense embedding and output matrices of GGUF: "stored" keeps their dtype, the others round."""
    onnx_graph: OnnxGraph = "auto"
    """Graph of ONNX: "built" here from standard operators, "exported" from transformers by torch.onnx; "auto" builds
    where it can."""
    onnx_block_size: int | None = None
    """Columns per DequantizeLinear block; None takes the largest that fits the group."""
    onnx_scales: OnnxScales = "float32"
    """Stored scales of ONNX; "float16" is as exact, smaller, and goes through a Cast that runtimes fold."""
    onnx_accuracy_level: int = 0
    """ONNX Runtime's MatMulNBits accuracy level recorded in the folder: 0 float32, 4 int8 activations."""
    onnx_runtime_optimized: bool = False
    """Also write the graph in the installed ONNX Runtime's operators: loads and decodes faster, only for it."""
    dtype: DenseDtype = "float16"
    """Dense tensors and serving dtype of GPTQ, AWQ and compressed-tensors."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Bytes of tensors per safetensors file of GPTQ, AWQ and compressed-tensors; a module is never split."""
    container_bits: int | None = None
    """Bits per stored code in GPTQ and compressed-tensors, 2 to 4, dense (AWQ has 4 only); None takes 4, for which
    vLLM has kernels everywhere."""
    tensor_parallel: int = 1
    """Ranks that vLLM shall split GPTQ, AWQ and compressed-tensors over; refused where a module does not survive it."""
    allow_rounding: bool = False
    """Write a format that cannot hold the trained values exactly, rounding them."""

    def __post_init__(self) -> None:
        choices = {
            "gptq_format": (self.gptq_format, get_args(GptqFormat)),
            "gguf_type": (self.gguf_type, get_args(GgufType)),
            "gguf_embeddings": (self.gguf_embeddings, get_args(GgufEmbeddings)),
            "onnx_graph": (self.onnx_graph, get_args(OnnxGraph)),
            "onnx_scales": (self.onnx_scales, get_args(OnnxScales)),
            "onnx_accuracy_level": (self.onnx_accuracy_level, (0, 1, 2, 3, 4)),
            "dtype": (self.dtype, get_args(DenseDtype)),
        }
        if self.max_shard_bytes < 1:
            raise UsageError("no room for weights", where="max_shard_bytes", got=self.max_shard_bytes, expected=">= 1")
        if self.tensor_parallel < 1:
            raise UsageError(
                "unknown number of ranks", where="tensor_parallel", got=self.tensor_parallel, expected=">= 1"
            )
        for field, (value, allowed) in choices.items():
            if value not in allowed:
                raise UsageError(f"unknown {field}", where=field, got=repr(value), expected=f"one of {allowed}")


class FileRecord(Protocol):
    """What an interrupted export has completed, and where completed files are noted: `l4q.journal.Journal`."""

    def finished(self, name: str) -> bool:
        """Whether this file is complete already."""

    def follow(self, part: Path, name: str) -> Advance:
        """Hash a file while it is being written: call the result with the end of what will not change any more."""

    def add(self, path: Path) -> None:
        """Note a complete file that is on the disk."""


class _NothingDone:
    """The record of an export that cannot be continued."""

    def finished(self, name: str) -> bool:
        """No file is."""
        return False

    def follow(self, part: Path, name: str) -> Advance:
        """Nobody asks for the hash."""
        return ignore

    def add(self, path: Path) -> None:
        """Nobody asks."""


NOTHING_DONE: FileRecord = _NothingDone()


class Exporter(Protocol):
    """What a format package offers; `exporters.driver.EXPORTERS` maps format names to such packages."""

    def plan(self, checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
        """Decide every tensor's encoding from the checkpoint's headers, writing nothing.

        Raises:
            UnsupportedError: The format cannot hold the checkpoint; the message lists what is in the way.
        """

    def write(
        self,
        checkpoint: L4QCheckpoint,
        plan: ExportPlan,
        folder: Path,
        options: ExportOptions,
        on_tensor: Callable[[str], None],
        record: FileRecord = NOTHING_DONE,
    ) -> None:
        """Write the planned files into an existing folder, calling `on_tensor` after each tensor.

        Weight files that `record` knows are there already and are kept; those completed are added to it.
        """

    def read_back(
        self, folder: Path, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Decode every quantized module of a written folder, or those of `only`, with code that is not ours.

        Yields (module, float32 [out, in]).
        """

    def usage(self) -> str:
        """Markdown for the model card: how to load the folder in its runtimes."""
