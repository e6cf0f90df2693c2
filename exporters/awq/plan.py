"""What an AWQ export will hold, which sizes stand in the way, and which runtimes load the result."""

from __future__ import annotations

from exporters.awq.pack import BITS, PER_WORD
from exporters.container import NIBBLES, container_bits, container_notes, describe, why_exact
from exporters.hf_plan import (
    HEAD,
    VLLM_FAST_GROUPS,
    dense_notes,
    dtype_warnings,
    group_sizes,
    listing,
    padded_head,
    plan_dense,
    refuse_float,
    refuse_mixed_groups,
    refuse_siblings,
    vllm_problems,
)
from exporters.k_grid import refuse_k_grid
from exporters.plan import ExportOptions, ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from exporters.tensor_parallel import split_notes
from l4q.checkpoint import L4QCheckpoint, WeightInfo
from l4q.errors import UnsupportedError

LABEL = "AWQ"
# gptqmodel 7.7.0, nn_modules/qlinear/gemm_awq.py, SUPPORTS_GROUP_SIZE
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128)


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Plan qweight, qzeros and scales per quantized linear and a cast per dense tensor.

    Raises:
        UnsupportedError: A module's grid or size does not fit the format; the message lists all of them.
    """
    refuse_k_grid(checkpoint, LABEL)
    refuse_float(checkpoint, LABEL)
    width = container_bits(checkpoint, options, NIBBLES)
    refuse_mixed_groups(checkpoint, LABEL)
    refuse_siblings(checkpoint, LABEL)
    _refuse_sizes(checkpoint)
    group_size = group_sizes(checkpoint)[0]
    quantized = [_plan_module(module, checkpoint.info(module), width) for module in checkpoint.modules]
    dense = plan_dense(checkpoint, options)
    notes = [*dense_notes(dense, options), *container_notes(checkpoint, width)]
    if group_size not in VLLM_FAST_GROUPS:
        notes.append(f"On a GPU vLLM's fastest kernels take group sizes {VLLM_FAST_GROUPS}; {group_size} runs slower.")
    problem = padded_head(checkpoint) or vllm_problems(checkpoint, options)
    vllm = RuntimeSupport(runtime="vLLM", loads=not problem, reason=problem)
    notes += split_notes(checkpoint, options, vllm, shares_row_scales=False)
    obstacle = "" if group_size in GPTQMODEL_GROUP_SIZES else f"gptqmodel's AWQ takes groups of {GPTQMODEL_GROUP_SIZES}"
    if HEAD in checkpoint.modules:
        obstacle = "its AWQ loader keeps the output head dense"
    through = obstacle or "through gptqmodel"
    return ExportPlan(
        format="awq",
        tensors=(*quantized, *dense),
        runtimes=(
            vllm,
            RuntimeSupport(runtime="transformers", loads=not obstacle, reason=through),
        ),
        notes=tuple(notes),
        warnings=dtype_warnings(options),
    )


def module_nbytes(info: WeightInfo) -> int:
    """Bytes of qweight, qzeros and scales (fp16) of one linear."""
    fields = info.out_features * (info.in_features + info.groups)
    return fields * BITS // 8 + 2 * info.out_features * info.groups


def _plan_module(module: str, info: WeightInfo, width: int) -> PlannedTensor:
    return PlannedTensor(
        name=module,
        target=f"{module}.{{qweight,qzeros,scales}}",
        encoding=f"{describe(info.bits, width)} group {info.group_size}",
        shape=(info.out_features, info.in_features),
        nbytes=module_nbytes(info),
        fidelity=Fidelity.EXACT,
        reason=why_exact(info.bits, width),
        quantized=True,
    )


def _refuse_sizes(checkpoint: L4QCheckpoint) -> None:
    infos = {module: checkpoint.info(module) for module in checkpoint.modules}
    odd = [f"{module} [{i.out_features}, {i.in_features}]" for module, i in infos.items() if i.out_features % PER_WORD]
    if odd:
        raise UnsupportedError(
            f"AWQ packs {PER_WORD} output rows into a word",
            where=listing(odd),
            expected=f"out_features that are multiples of {PER_WORD}",
            remedy="leave these modules dense when training, or export to compressed-tensors, gguf or onnx",
        )
