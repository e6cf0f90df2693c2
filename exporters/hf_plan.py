"""What the plans of GPTQ, AWQ and compressed-tensors share: dense casts, refusals, and what vLLM fuses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from exporters.plan import ExportOptions, Fidelity, PlannedTensor
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError
from l4q.rules import FUSED, split_siblings

# option dtype -> (safetensors word, bytes per value)
DENSE = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
# (stored, written) pairs in which every stored value keeps its exact value
EXACT_CASTS = {("F16", "F32"), ("BF16", "F32")}

# vllm 0.32, kernels/linear/mixed_precision/cpu.py: sizes of the fused layer
VLLM_MULTIPLE = 32
# vllm 0.32: group sizes of its fast CUDA kernels (Machete, Marlin), layers/quantization/utils/marlin_utils.py
VLLM_FAST_GROUPS = (-1, 32, 64, 128)
HEAD = "lm_head"
"""The output head."""
HEAD_MULTIPLE = 64
"""vLLM pads the rows of embedding and output head to it."""


def plan_dense(checkpoint: L4QCheckpoint, options: ExportOptions) -> list[PlannedTensor]:
    """Every unquantized tensor, cast to the serving dtype."""
    return [_plan_dense(checkpoint, name, options) for name in checkpoint.dense_names]


def _plan_dense(checkpoint: L4QCheckpoint, name: str, options: ExportOptions) -> PlannedTensor:
    stored, shape = checkpoint.dense_dtype(name), checkpoint.dense_shape(name)
    written, size = DENSE[options.dtype]
    exact = stored == written or (stored, written) in EXACT_CASTS
    return PlannedTensor(
        name=name,
        target=name,
        encoding=written,
        shape=shape,
        nbytes=size * int(np.prod(shape)),
        fidelity=Fidelity.EXACT if exact else Fidelity.ROUNDED,
        reason="" if exact else f"{stored} rounded to {written}, the dtype the runtimes compute in",
        quantized=False,
    )


def dense_notes(dense: list[PlannedTensor], options: ExportOptions) -> tuple[str, ...]:
    """What the serving dtype does to dense tensors and scales."""
    notes = []
    rounded = [tensor for tensor in dense if tensor.fidelity is Fidelity.ROUNDED]
    if rounded:
        kinds = sorted({re.sub(r"\d+", "*", tensor.name) for tensor in rounded})
        notes.append(
            f"{len(rounded)} dense tensors are rounded to {options.dtype}, the dtype the runtimes compute in: "
            f"{', '.join(kinds)}. The quantized linears are not affected."
        )
    return tuple(notes)


def dtype_warnings(options: ExportOptions) -> tuple[str, ...]:
    """What vLLM does to quantized linears in the serving dtype (vllm 0.32, kernels/linear/mixed_precision/cpu.py)."""
    if options.dtype != "bfloat16":
        return ()
    return (
        "vLLM casts the fp16 scales to bfloat16, 8 significant bits, when it serves in that dtype; float16 keeps them.",
        "In bfloat16 on CPUs with AMX, vLLM also rounds activations to int8 unless VLLM_CPU_INT4_W4A8=0 is set.",
    )


def refuse_float(checkpoint: L4QCheckpoint, label: str) -> None:
    """Refuse float zero-points, which need a field these formats do not have.

    Raises:
        UnsupportedError: A module has zero_point float.
    """
    modules = [module for module in checkpoint.modules if checkpoint.info(module).zero_point == "float"]
    if modules:
        raise UnsupportedError(
            f"{label} stores integer zero-points; a float zero-point does not fit",
            where=f"{len(modules)} modules, first {modules[0]}",
            got="zero_point float",
            expected="zero_point none or integer",
            remedy="export to gguf (Q4_1 holds it exactly), or freeze again onto zero_point integer",
        )


def refuse_siblings(checkpoint: L4QCheckpoint, label: str) -> None:
    """Refuse what vLLM's fused layers cannot mix: group sizes, and quantized with dense members.

    Raises:
        UnsupportedError: A fused layer has such members; the message lists all of them.
    """
    sizes: dict[str, int | None] = dict.fromkeys(skipped_linears(checkpoint))
    sizes |= {module: checkpoint.info(module).stated_group_size for module in checkpoint.modules}
    split = split_siblings(sizes)
    if split:
        raise UnsupportedError(
            f"vLLM fuses q, k and v, and gate and up, so {label} needs one group size for the members of each",
            where=listing(split),
            got="different group sizes, or members left dense",
            expected="one --override or --skip pattern for all members, such as *.self_attn.[qkv]_proj",
            remedy="train with such patterns, or export to gguf or onnx, which mix freely",
        )


def group_sizes(checkpoint: L4QCheckpoint) -> tuple[int, ...]:
    """The group sizes of all modules as recorded (-1: one group per row), the most frequent first."""
    counted = Counter(checkpoint.info(module).stated_group_size for module in checkpoint.modules)
    return tuple(size for size, _ in counted.most_common())


def refuse_mixed_groups(checkpoint: L4QCheckpoint, label: str) -> None:
    """Refuse more than one group size, for formats whose config has one field for all modules.

    Raises:
        UnsupportedError: A module is off the most frequent group size; the message lists all of them.
    """
    common = group_sizes(checkpoint)[0]
    infos = {module: checkpoint.info(module) for module in checkpoint.modules}
    odd = [
        f"{module}: group {info.group_size} of {info.in_features}"
        for module, info in infos.items()
        if info.stated_group_size != common
    ]
    if odd:
        raise UnsupportedError(
            f"{label}'s config holds one group size",
            where=listing(odd),
            expected=f"group_size {common} everywhere",
            remedy="train with one group size, or export to gptq (symmetric), compressed-tensors, gguf or onnx",
        )


def is_symmetric(checkpoint: L4QCheckpoint) -> bool:
    """True if every zero-point is the midpoint by construction, GPTQ's `sym`."""
    return all(checkpoint.info(module).zero_point == "none" for module in checkpoint.modules)


def skipped_linears(checkpoint: L4QCheckpoint) -> tuple[str, ...]:
    """Dense linears of the decoder blocks: readers that expect quantized tensors there must be told to skip them."""
    leaves = {module.rpartition(".")[2] for module in checkpoint.modules}
    stems = [name.removesuffix(".weight") for name in checkpoint.dense_names if name.endswith(".weight")]
    return tuple(
        stem
        for stem in stems
        if ".layers." in stem
        and (stem.rpartition(".")[2] in leaves or stem.endswith("_proj"))
        and len(checkpoint.dense_shape(f"{stem}.weight")) == 2
    )


def vllm_problems(checkpoint: L4QCheckpoint, options: ExportOptions) -> str:
    """Why vLLM's int4 kernels would not run this checkpoint in any layout, or ""."""
    if options.dtype == "float32":
        return "vLLM's int4 kernels compute in float16 or bfloat16; write --dtype float16"
    return listing(_odd_fused(checkpoint))


def padded_head(checkpoint: L4QCheckpoint) -> str:
    """Why vLLM cannot load a head packed along its rows (GPTQ, AWQ), or "".

    vllm 0.32, vocab_parallel_embedding.py: `weight_loader` fills the rows it adds only where rows are the first axis.
    """
    if HEAD not in checkpoint.modules or checkpoint.info(HEAD).out_features % HEAD_MULTIPLE == 0:
        return ""
    rows = checkpoint.info(HEAD).out_features
    return f"{HEAD} has {rows} rows, and vLLM's loader of this format takes multiples of {HEAD_MULTIPLE}"


def fused_members(checkpoint: L4QCheckpoint) -> dict[str, list[str]]:
    """Quantized modules by the layer vLLM fuses them into; an unfused module stands alone."""
    fused: dict[str, list[str]] = {}
    for module in checkpoint.modules:
        parent, dot, leaf = module.rpartition(".")
        fused.setdefault(f"{parent}{dot}{FUSED.get(leaf, leaf)}", []).append(module)
    return fused


def _odd_fused(checkpoint: L4QCheckpoint) -> list[str]:
    odd = []
    for layer, members in fused_members(checkpoint).items():
        rows = 0 if layer == HEAD else sum(checkpoint.info(member).out_features for member in members)
        columns = checkpoint.info(members[0]).in_features
        if rows % VLLM_MULTIPLE or columns % VLLM_MULTIPLE:
            odd.append(f"{layer} [{rows}, {columns}] is not in multiples of {VLLM_MULTIPLE}")
    return odd


def listing(items: Iterable[str], limit: int = 8) -> str:
    """The first items of a list for a message, and how many more there are."""
    listed = list(items)
    tail = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return "; ".join(listed[:limit]) + tail
