"""What the GGUF file will hold, decided from headers (and scales where exactness depends on them)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import PurePosixPath
from typing import Final

from exporters.gguf.encode import Subject, choose_encoding, encoded_nbytes
from exporters.gguf.families import notes
from exporters.gguf.metadata import model_metadata, rope_tensors
from exporters.gguf.model_config import rope_parameters
from exporters.gguf.names import architecture_of, gguf_names, stack_targets
from exporters.gguf.pack import BLOCK
from exporters.gguf.vocab import read_vocabulary
from exporters.plan import ExportOptions, ExportPlan, Fidelity, GgufEmbeddings, GgufType, PlannedTensor, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError
from l4q.k_grids import SUPERBLOCK

ROPE_SOURCE: Final = "config.json rope parameters"
"""Name of the RoPE divisors, which come from config.json rather than from a tensor."""

DENSE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}

Q8_0_BYTES: Final = 34
"""Bytes of a Q8_0 block: an fp16 scale and 32 signed codes."""

EMBEDDINGS: Final = ("token_embd.weight", "output.weight")
"""Targets that --gguf-embeddings governs, as far as they are dense."""


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
    stacks = {name: stack_targets(architecture, name) for name in checkpoint.dense_names}
    plain = [name for name in checkpoint.dense_names if not stacks[name]]
    sources = [*plain, *(f"{module}.weight" for module in checkpoint.modules)]
    targets = gguf_names(architecture, int(checkpoint.config["num_hidden_layers"]), sources)
    dense = [
        _plan_dense(checkpoint, name, target, options.gguf_embeddings, parts=max(1, len(stacks[name])))
        for name in checkpoint.dense_names
        for target in stacks[name] or (targets[name],)
    ]
    quantized = [
        _plan_quantized(checkpoint, module, targets[f"{module}.weight"], options.gguf_type)
        for module in checkpoint.modules
    ]
    tensors = (*_plan_rope(checkpoint), *dense, *quantized)
    vocabulary = read_vocabulary(checkpoint.path, int(checkpoint.config["vocab_size"]))
    return ExportPlan(
        format="gguf",
        tensors=tensors,
        packages=("gguf",),
        runtimes=(RuntimeSupport(runtime="llama.cpp", loads=True),),
        notes=(
            f"file: {file_name(checkpoint, tensors)}",
            *_k_grid_notes(checkpoint),
            *notes(architecture, checkpoint.config),
            *vocabulary.notes,
        ),
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
        if info.in_features % BLOCK or (info.group_size % BLOCK and info.k_grid is None)
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
    read = functools.cache(lambda: checkpoint.parameters(module))
    encoding = choose_encoding(Subject(name=module, info=info, read=read), requested)
    off = _off_k_grid(checkpoint, module)
    shape = (info.out_features, info.in_features)
    return PlannedTensor(
        name=module,
        target=target,
        encoding=encoding.name,
        shape=shape,
        nbytes=encoded_nbytes(shape, encoding.name),
        fidelity=encoding.fidelity,
        reason=f"{encoding.reason}; {off}" if off else encoding.reason,
        quantized=True,
    )


def _off_k_grid(checkpoint: L4QCheckpoint, module: str) -> str:
    """Why a module of a checkpoint on a K grid is not on it, or ""."""
    info = checkpoint.info(module)
    if checkpoint.quant.for_layer(info.in_features) == checkpoint.quant:
        return ""
    return f"trained on the fp16 grid, as in_features {info.in_features} is no multiple of {SUPERBLOCK}"


def _k_grid_notes(checkpoint: L4QCheckpoint) -> list[str]:
    off = [module for module in checkpoint.modules if _off_k_grid(checkpoint, module)]
    if not off:
        return []
    sizes = sorted({checkpoint.info(module).in_features for module in off})
    return [
        f"{len(off)} of {len(checkpoint.modules)} quantized tensors are off the K grid, as their in_features {sizes} "
        f"are no multiples of {SUPERBLOCK}"
    ]


def _plan_dense(
    checkpoint: L4QCheckpoint, name: str, target: str, embeddings: GgufEmbeddings, parts: int
) -> PlannedTensor:
    """One of `parts` equal slices of a dense tensor's rows (more than one only for stacked experts)."""
    shape, stored = checkpoint.dense_shape(name), checkpoint.dense_dtype(name)
    if stored not in DENSE_BYTES:
        raise UnsupportedError(
            "dense tensor of a dtype GGUF cannot hold",
            where=name,
            got=stored,
            expected=f"one of {tuple(DENSE_BYTES)}",
        )
    shape = (*shape[:-2], shape[-2] // parts, shape[-1]) if parts > 1 else shape
    # llama.cpp's elementwise kernels take norms and biases in F32 only.
    encoding = "F32" if len(shape) == 1 else stored
    fidelity, reason = Fidelity.EXACT, "stored dtype" if encoding == stored else f"{stored} widened"
    if target in EMBEDDINGS and embeddings != "stored" and embeddings.upper() != stored:
        encoding, fidelity = embeddings.upper(), Fidelity.ROUNDED
        reason = f"{stored} rounded on request (--gguf-embeddings {embeddings})"
        _check_embedding(name, shape, encoding)
    return PlannedTensor(
        name=name,
        target=target,
        encoding=encoding,
        shape=shape,
        nbytes=dense_nbytes(shape, encoding),
        fidelity=fidelity,
        reason=reason,
        quantized=False,
    )


def dense_nbytes(shape: tuple[int, ...], encoding: str) -> int:
    """Bytes of a dense tensor in the file."""
    size = math.prod(shape)
    return size // BLOCK * Q8_0_BYTES if encoding == "Q8_0" else size * DENSE_BYTES[encoding]


def _check_embedding(name: str, shape: tuple[int, ...], encoding: str) -> None:
    if encoding == "Q8_0" and shape[-1] % BLOCK:
        raise UnsupportedError(
            f"Q8_0 rows must fill blocks of {BLOCK} columns",
            where=name,
            got=f"{shape[-1]} columns",
            remedy="use --gguf-embeddings f16 or stored",
        )


def _plan_rope(checkpoint: L4QCheckpoint) -> list[PlannedTensor]:
    kind = rope_parameters(checkpoint.config)["rope_type"]
    return [
        PlannedTensor(
            name=ROPE_SOURCE,
            target=target,
            encoding="F32",
            shape=divisors.shape,
            nbytes=divisors.nbytes,
            fidelity=Fidelity.EXACT,
            reason=f"RoPE type {kind}",
            quantized=False,
        )
        for target, divisors in rope_tensors(checkpoint.config).items()
    ]
