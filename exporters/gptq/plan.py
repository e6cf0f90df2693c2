"""What a GPTQ export will hold, which sizes stand in the way, and which runtimes load the result."""

from __future__ import annotations

from collections.abc import Iterable

from exporters.container import DEFAULT_CONTAINER, container_bits, container_notes, describe, why_exact
from exporters.hf_plan import (
    HEAD,
    VLLM_FAST_GROUPS,
    dense_notes,
    dtype_warnings,
    group_sizes,
    is_symmetric,
    listing,
    padded_head,
    plan_dense,
    refuse_float,
    refuse_siblings,
    vllm_problems,
)
from exporters.k_grid import refuse_k_grid
from exporters.plan import ExportOptions, ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from exporters.tensor_parallel import split_notes
from exporters.words import WORD_BITS, run_length
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.errors import UnsupportedError

LABEL = "GPTQ"
# gptqmodel 7.7.0, nn_modules/qlinear/torch.py, SUPPORTS_GROUP_SIZE
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Plan qweight, qzeros, scales and g_idx per quantized linear and a cast per dense tensor.

    Raises:
        UnsupportedError: A module's grid or size does not fit the format; the message lists all of them.
    """
    refuse_k_grid(checkpoint, LABEL)
    refuse_float(checkpoint, LABEL)
    width = container_bits(checkpoint, options)
    refuse_siblings(checkpoint, LABEL)
    _refuse_sizes(checkpoint, width)
    quantized = [_plan_module(module, checkpoint.info(module), width, options) for module in checkpoint.modules]
    dense = plan_dense(checkpoint, options)
    notes = [*dense_notes(dense, options), *container_notes(checkpoint, width)]
    vllm = _vllm(checkpoint, options, width)
    notes += split_notes(checkpoint, options, vllm, shares_row_scales=True)
    return ExportPlan(
        format="gptq",
        tensors=(*quantized, *dense),
        runtimes=(vllm, *_gptqmodel(checkpoint)),
        notes=tuple(notes),
        warnings=(*dtype_warnings(options), *_asymmetric_warnings(checkpoint, options)),
    )


def module_nbytes(info: WeightInfo, width: int = 4) -> int:
    """Bytes of qweight and qzeros (`width` bits a value), scales (fp16) and g_idx (int32) of one linear."""
    qweight = info.out_features * info.in_features * width // 8
    qzeros = info.out_features * info.groups * width // 8
    return qweight + qzeros + 2 * info.out_features * info.groups + 4 * info.in_features


def _plan_module(module: str, info: WeightInfo, width: int, options: ExportOptions) -> PlannedTensor:
    return PlannedTensor(
        name=module,
        target=f"{module}.{{qweight,qzeros,scales,g_idx}}",
        encoding=f"{describe(info.bits, width)} group {info.group_size}, zeros {options.gptq_format}",
        shape=(info.out_features, info.in_features),
        nbytes=module_nbytes(info, width),
        fidelity=Fidelity.EXACT,
        reason=why_exact(info.bits, width),
        quantized=True,
    )


def _refuse_sizes(checkpoint: L4QCheckpoint, width: int) -> None:
    per_run, _ = run_length(width)
    infos = {module: checkpoint.info(module) for module in checkpoint.modules}
    odd = [
        f"{module} [{info.out_features}, {info.in_features}]"
        for module, info in infos.items()
        if info.in_features % per_run or info.out_features % per_run
    ]
    if odd:
        raise UnsupportedError(
            f"GPTQ packs {width}-bit codes and zero-points into whole {WORD_BITS}-bit words",
            where=listing(odd),
            expected=f"in_features and out_features that are multiples of {per_run}",
            remedy="leave these modules dense when training, or export to gguf or onnx"
            + ("" if width == DEFAULT_CONTAINER else ", or leave --container-bits out"),
        )


def _vllm(checkpoint: L4QCheckpoint, options: ExportOptions, width: int) -> RuntimeSupport:
    if width != DEFAULT_CONTAINER:
        reason = f"vLLM refuses GPTQ of {width} bits; without --container-bits it is written in 4-bit fields"
    elif not is_symmetric(checkpoint):
        reason = "vLLM refuses GPTQ with sym: false; compressed-tensors holds integer zero-points exactly for it"
    elif slow := [size for size in group_sizes(checkpoint) if size not in VLLM_FAST_GROUPS]:
        reason = f"vLLM's GPTQ takes group sizes {VLLM_FAST_GROUPS}, this has {listing(map(str, slow))}"
    else:
        reason = padded_head(checkpoint) or vllm_problems(checkpoint, options)
    return RuntimeSupport(runtime="vLLM", loads=not reason, reason=reason)


def _asymmetric_warnings(checkpoint: L4QCheckpoint, options: ExportOptions) -> list[str]:
    """vllm 0.32, quantization/humming.py: qzeros go in as they are, checkpoint_format is not looked at."""
    if is_symmetric(checkpoint) or options.gptq_format != "gptq":
        return []
    return [
        "vLLM's --quantization humming reads the zero-points one too low, as it does not know the offset of "
        "checkpoint_format gptq; --gptq-format gptq_v2 has none."
    ]


def _gptqmodel(checkpoint: L4QCheckpoint) -> Iterable[RuntimeSupport]:
    odd = [size for size in group_sizes(checkpoint) if size not in GPTQMODEL_GROUP_SIZES]
    reason = f"its kernels take group sizes {GPTQMODEL_GROUP_SIZES}, this has {listing(map(str, odd))}" if odd else ""
    yield RuntimeSupport(runtime="GPTQModel", loads=not reason, reason=reason)
    # optimum, gptq/quantizer.py (at 0541873): one group size for all layers, linears of the blocks only
    if len(group_sizes(checkpoint)) > 1:
        reason = reason or "optimum reads no dynamic rules, so it takes one group size"
    if HEAD in checkpoint.modules:
        reason = reason or "optimum replaces linears of the blocks only, not the output head"
    yield RuntimeSupport(runtime="transformers", loads=not reason, reason=reason or "through optimum and gptqmodel")
