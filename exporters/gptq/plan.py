"""What a GPTQ export will hold, which sizes stand in the way, and which runtimes load the result."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from exporters.gptq.pack import WORD_BITS, run_length
from exporters.plan import ExportOptions, ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.errors import UnsupportedError

# The dense 3-bit layout is packed and tested (pack.py), but no released reader of it is available to judge an export.
EXPORTED_BITS = (4,)

# option dtype -> (safetensors word, bytes per value)
DENSE = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
# (stored, written) pairs in which every stored value keeps its exact value
EXACT_CASTS = {("F16", "F32"), ("BF16", "F32")}

# vllm 0.32: group sizes of layers/quantization/utils/marlin_utils.py, multiples of its CPU int4 kernel
VLLM_GROUP_SIZES = (-1, 32, 64, 128)
VLLM_MULTIPLE = 32
# vLLM concatenates these members along the output and needs one scheme for all of them.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
# gptqmodel 7.7.0, nn_modules/qlinear/torch.py, SUPPORTS_GROUP_SIZE
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Plan qweight, qzeros, scales and g_idx per quantized linear and a cast per dense tensor.

    Raises:
        UnsupportedError: A module's grid or size does not fit the format; the message lists all of them.
    """
    _refuse_float(checkpoint)
    _refuse_grids(checkpoint)
    _refuse_sizes(checkpoint)
    group_size = checkpoint.quant.group_size
    quantized = [_plan_module(module, checkpoint.info(module), options) for module in checkpoint.modules]
    dense = [_plan_dense(checkpoint, name, options) for name in checkpoint.dense_names]
    runtimes = (_vllm(checkpoint, options), *_gptqmodel(group_size))
    return ExportPlan(
        format="gptq", tensors=(*quantized, *dense), runtimes=runtimes, notes=_notes(checkpoint, dense, options)
    )


def is_symmetric(checkpoint: L4QCheckpoint) -> bool:
    """True if every zero-point is the midpoint by construction, GPTQ's `sym`."""
    return all(checkpoint.info(module).zero_point == "none" for module in checkpoint.modules)


def module_nbytes(info: WeightInfo) -> int:
    """Bytes of qweight, qzeros, scales (fp16) and g_idx (int32) of one linear."""
    qweight = info.out_features * info.in_features * info.bits // 8
    qzeros = info.out_features * info.groups * info.bits // 8
    return qweight + qzeros + 2 * info.out_features * info.groups + 4 * info.in_features


def skipped_linears(checkpoint: L4QCheckpoint) -> tuple[str, ...]:
    """Dense linears of the decoder blocks: readers that expect GPTQ there must be told to skip them."""
    leaves = {module.rpartition(".")[2] for module in checkpoint.modules}
    stems = [name.removesuffix(".weight") for name in checkpoint.dense_names if name.endswith(".weight")]
    return tuple(
        stem
        for stem in stems
        if ".layers." in stem
        and (stem.rpartition(".")[2] in leaves or stem.endswith("_proj"))
        and len(checkpoint.dense_shape(f"{stem}.weight")) == 2
    )


def _plan_module(module: str, info: WeightInfo, options: ExportOptions) -> PlannedTensor:
    return PlannedTensor(
        name=module,
        target=f"{module}.{{qweight,qzeros,scales,g_idx}}",
        encoding=f"int{info.bits} group {info.group_size}, zeros {options.gptq_format}",
        shape=(info.out_features, info.in_features),
        nbytes=module_nbytes(info),
        fidelity=Fidelity.EXACT,
        reason="codes, zero-points and fp16 scales are stored as they are",
        quantized=True,
    )


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


def _refuse_float(checkpoint: L4QCheckpoint) -> None:
    modules = [module for module in checkpoint.modules if checkpoint.info(module).zero_point == "float"]
    if modules:
        raise UnsupportedError(
            "GPTQ stores integer zero-points; a float zero-point does not fit",
            where=f"{len(modules)} modules, first {modules[0]}",
            got="zero_point float",
            expected="zero_point none or integer",
            remedy="export to gguf (Q4_1 holds it exactly), or freeze again onto zero_point integer",
        )


def _refuse_grids(checkpoint: L4QCheckpoint) -> None:
    quant, infos = checkpoint.quant, {module: checkpoint.info(module) for module in checkpoint.modules}
    if any(info.bits not in EXPORTED_BITS for info in infos.values()):
        raise UnsupportedError(
            "GPTQ export writes 4-bit codes only",
            got=f"bits {sorted({info.bits for info in infos.values()})}",
            expected=f"bits {list(EXPORTED_BITS)}",
            remedy="train with --bits 4, or export to gguf or onnx, whose 4-bit containers hold fewer bits exactly",
        )
    odd = [
        f"{module}: group {info.group_size} of {info.in_features}"
        for module, info in infos.items()
        if info.group_size != quant.resolve_group_size(info.in_features)
    ]
    if odd:
        raise UnsupportedError(
            "GPTQ's config holds one group size",
            where=_listing(odd),
            expected=f"group_size {quant.group_size} everywhere",
            remedy="freeze the checkpoint with one group size, or export to gguf or onnx",
        )


def _refuse_sizes(checkpoint: L4QCheckpoint) -> None:
    odd = []
    for module in checkpoint.modules:
        info = checkpoint.info(module)
        per_run, _ = run_length(info.bits)
        if info.in_features % per_run or info.out_features % per_run:
            odd.append(f"{module} [{info.out_features}, {info.in_features}]")
    if odd:
        per_run, _ = run_length(checkpoint.quant.bits)
        raise UnsupportedError(
            f"GPTQ packs {checkpoint.quant.bits}-bit codes and zero-points into whole {WORD_BITS}-bit words",
            where=_listing(odd),
            expected=f"in_features and out_features that are multiples of {per_run}",
            remedy="leave these modules dense when training, or export to gguf or onnx",
        )


def _vllm(checkpoint: L4QCheckpoint, options: ExportOptions) -> RuntimeSupport:
    reason = ""
    if not is_symmetric(checkpoint):
        reason = "vLLM refuses GPTQ with sym: false; compressed-tensors holds integer zero-points exactly for it"
    elif checkpoint.quant.group_size not in VLLM_GROUP_SIZES:
        reason = f"vLLM's GPTQ takes group sizes {VLLM_GROUP_SIZES}, this is {checkpoint.quant.group_size}"
    elif options.dtype == "float32":
        reason = "vLLM's int4 kernels compute in float16 or bfloat16; write --dtype float16"
    else:
        problems = (*_mixed_fused(checkpoint), *_odd_fused(checkpoint))
        reason = _listing(problems) if problems else ""
    return RuntimeSupport(runtime="vLLM", loads=not reason, reason=reason)


def _gptqmodel(group_size: int) -> Iterable[RuntimeSupport]:
    fits = group_size in GPTQMODEL_GROUP_SIZES
    reason = "" if fits else f"its kernels take group sizes {GPTQMODEL_GROUP_SIZES}, this is {group_size}"
    yield RuntimeSupport(runtime="GPTQModel", loads=fits, reason=reason)
    yield RuntimeSupport(runtime="transformers", loads=fits, reason=reason or "through optimum and gptqmodel")


def _fused_members(checkpoint: L4QCheckpoint) -> dict[str, list[str]]:
    """Quantized modules by the layer vLLM fuses them into; an unfused module stands alone."""
    fused: dict[str, list[str]] = {}
    for module in checkpoint.modules:
        parent, _, leaf = module.rpartition(".")
        fused.setdefault(f"{parent}.{FUSED.get(leaf, leaf)}", []).append(module)
    return fused


def _mixed_fused(checkpoint: L4QCheckpoint) -> list[str]:
    skipped = {
        f"{stem.rpartition('.')[0]}.{FUSED.get(stem.rpartition('.')[2], '')}" for stem in skipped_linears(checkpoint)
    }
    return [f"{layer} is only partly quantized" for layer in _fused_members(checkpoint) if layer in skipped]


def _odd_fused(checkpoint: L4QCheckpoint) -> list[str]:
    odd = []
    for layer, members in _fused_members(checkpoint).items():
        rows = sum(checkpoint.info(member).out_features for member in members)
        columns = checkpoint.info(members[0]).in_features
        if rows % VLLM_MULTIPLE or columns % VLLM_MULTIPLE:
            odd.append(f"{layer} [{rows}, {columns}] is not in multiples of {VLLM_MULTIPLE}")
    return odd


def _notes(checkpoint: L4QCheckpoint, dense: list[PlannedTensor], options: ExportOptions) -> tuple[str, ...]:
    notes = []
    rounded = [tensor for tensor in dense if tensor.fidelity is Fidelity.ROUNDED]
    if rounded:
        kinds = sorted({re.sub(r"\d+", "*", tensor.name) for tensor in rounded})
        notes.append(
            f"{len(rounded)} dense tensors are rounded to {options.dtype}, the dtype the runtimes compute in: "
            f"{', '.join(kinds)}. The quantized linears are not affected."
        )
    if options.dtype == "bfloat16":
        notes.append("vLLM casts the fp16 scales to bfloat16 when it serves in that dtype; float16 keeps them.")
    if not is_symmetric(checkpoint):
        notes.append("Load it with GPTQModel or transformers: sym is false, which vLLM's GPTQ loader refuses.")
    return tuple(notes)


def _listing(items: Iterable[str], limit: int = 8) -> str:
    listed = list(items)
    tail = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return "; ".join(listed[:limit]) + tail
