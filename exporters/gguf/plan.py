"""What the GGUF file will hold, decided from headers (and scales where exactness depends on them)."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import PurePosixPath
from typing import Final

from exporters.gguf.encode import Subject, choose_encoding, encoded_nbytes
from exporters.gguf.metadata import model_metadata, rope_freqs
from exporters.gguf.names import architecture_of, gguf_names
from exporters.gguf.pack import BLOCK
from exporters.gguf.vocab import read_vocabulary
from exporters.plan import ExportOptions, ExportPlan, Fidelity, GgufType, PlannedTensor, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError

ROPE_FREQS: Final = "rope_freqs.weight"
"""Target of the RoPE divisors, which come from config.json rather than from a tensor."""

DENSE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Decide every tensor's block type; nothing is written.

    Raises:
        UnsupportedError: The architecture is unknown, a tensor has no GGUF name, a row does not fill 32-weight blocks,
            or the requested type cannot hold the zero-points; the message lists every module in the way.
        UsageError: The tokenizer is damaged.
    """
    architecture = architecture_of(checkpoint.architecture)
    model_metadata(architecture, checkpoint.config)
    if options.gguf_type != "F32":
        _check_blocks(checkpoint)
    sources = [*checkpoint.dense_names, *(f"{module}.weight" for module in checkpoint.modules)]
    targets = gguf_names(architecture, int(checkpoint.config["num_hidden_layers"]), sources)
    dense = [_plan_dense(checkpoint, name, targets[name]) for name in checkpoint.dense_names]
    quantized = [
        _plan_quantized(checkpoint, module, targets[f"{module}.weight"], options.gguf_type)
        for module in checkpoint.modules
    ]
    tensors = (*_plan_rope(checkpoint), *dense, *quantized)
    vocabulary = read_vocabulary(checkpoint.path, int(checkpoint.config["vocab_size"]))
    return ExportPlan(
        format="gguf",
        tensors=tensors,
        runtimes=(RuntimeSupport(runtime="llama.cpp", loads=True),),
        notes=(f"file: {file_name(checkpoint, tensors)}", *vocabulary.notes),
    )


def file_name(checkpoint: L4QCheckpoint, tensors: tuple[PlannedTensor, ...]) -> str:
    """`<model>-<TYPE>.gguf`, the model named by its config or else by its folder."""
    return f"{model_name(checkpoint)}-{main_encoding(tensors)}.gguf"


def model_name(checkpoint: L4QCheckpoint) -> str:
    """The model's name without a path: config.json's _name_or_path, or the checkpoint folder."""
    configured = str(checkpoint.config.get("_name_or_path") or "").replace("\\", "/")
    return PurePosixPath(configured).name or checkpoint.path.resolve().name or "model"


def main_encoding(tensors: tuple[PlannedTensor, ...]) -> str:
    """The encoding of most quantized bytes, which labels the file."""
    weight: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.quantized:
            weight[tensor.encoding] += tensor.nbytes
    return weight.most_common(1)[0][0]


def _check_blocks(checkpoint: L4QCheckpoint) -> None:
    infos = {module: checkpoint.info(module) for module in checkpoint.modules}
    offending = [
        f"{module} (in_features {info.in_features}, group_size {info.group_size})"
        for module, info in infos.items()
        if info.in_features % BLOCK or info.group_size % BLOCK
    ]
    if offending:
        raise UnsupportedError(
            f"{len(offending)} module(s) do not fill GGUF's blocks of {BLOCK} columns",
            where="; ".join(offending),
            expected=f"in_features and group_size that are multiples of {BLOCK}",
            remedy="train with such a group size, leave the modules it does not divide dense, or use --gguf-type F32",
        )


def _plan_quantized(checkpoint: L4QCheckpoint, module: str, target: str, requested: GgufType) -> PlannedTensor:
    info = checkpoint.info(module)
    read = functools.cache(lambda: checkpoint.quantized(module))
    encoding = choose_encoding(Subject(name=module, info=info, read=read), requested)
    shape = (info.out_features, info.in_features)
    return PlannedTensor(
        name=module,
        target=target,
        encoding=encoding.name,
        shape=shape,
        nbytes=encoded_nbytes(shape, encoding.name),
        fidelity=encoding.fidelity,
        reason=encoding.reason,
        quantized=True,
    )


def _plan_dense(checkpoint: L4QCheckpoint, name: str, target: str) -> PlannedTensor:
    shape, stored = checkpoint.dense_shape(name), checkpoint.dense_dtype(name)
    if stored not in DENSE_BYTES:
        raise UnsupportedError(
            "dense tensor of a dtype GGUF cannot hold",
            where=name,
            got=stored,
            expected=f"one of {tuple(DENSE_BYTES)}",
        )
    # llama.cpp's elementwise kernels take norms and biases in F32 only.
    encoding = "F32" if len(shape) == 1 else stored
    size = DENSE_BYTES[encoding]
    for length in shape:
        size *= length
    return PlannedTensor(
        name=name,
        target=target,
        encoding=encoding,
        shape=shape,
        nbytes=size,
        fidelity=Fidelity.EXACT,
        reason="stored dtype" if encoding == stored else f"{stored} widened",
        quantized=False,
    )


def _plan_rope(checkpoint: L4QCheckpoint) -> list[PlannedTensor]:
    divisors = rope_freqs(checkpoint.config)
    if divisors is None:
        return []
    return [
        PlannedTensor(
            name="config.json rope parameters",
            target=ROPE_FREQS,
            encoding="F32",
            shape=divisors.shape,
            nbytes=divisors.nbytes,
            fidelity=Fidelity.EXACT,
            reason="RoPE type llama3",
            quantized=False,
        )
    ]
