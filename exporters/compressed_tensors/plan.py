"""What a compressed-tensors export will hold, under which schemes, and which runtimes load the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exporters.container import DEFAULT_CONTAINER, container_bits, container_notes, describe, why_exact
from exporters.hf_plan import (
    HEAD,
    VLLM_FAST_GROUPS,
    dense_notes,
    dtype_warnings,
    fused_members,
    listing,
    plan_dense,
    refuse_float,
    refuse_siblings,
    skipped_linears,
    vllm_problems,
)
from exporters.k_grid import refuse_k_grid
from exporters.plan import ExportOptions, ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from exporters.tensor_parallel import split_notes
from exporters.words import WORD_BITS, run_length, word_count
from l4q.checkpoint import L4QCheckpoint, WeightInfo

LABEL = "compressed-tensors"
_TRANSFORMERS = "through compressed-tensors, which unpacks the weights: exact with dtype float32, else rounded"
SHAPE_BYTES = 16
"""weight_shape, int64 [2]."""


@dataclass(frozen=True)
class Scheme:
    """What one entry of config_groups says of its modules."""

    group_size: int
    """Columns per scale, or -1: strategy channel."""
    symmetric: bool

    def to_dict(self, bits: int) -> dict[str, Any]:
        """The `weights` section of a config group."""
        grouped = self.group_size != -1
        return {
            "num_bits": bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False,
        }


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Plan weight_packed, weight_scale, weight_shape and, if asymmetric, weight_zero_point per quantized linear.

    Raises:
        UnsupportedError: A module has float zero-points, or the container cannot be written.
    """
    refuse_k_grid(checkpoint, LABEL)
    refuse_float(checkpoint, LABEL)
    refuse_siblings(checkpoint, LABEL)
    width, found = container_bits(checkpoint, options), module_schemes(checkpoint)
    quantized = [_plan_module(module, checkpoint.info(module), width, found[module]) for module in checkpoint.modules]
    dense = plan_dense(checkpoint, options)
    notes = [*dense_notes(dense, options), *container_notes(checkpoint, width)]
    slow = sorted({scheme.group_size for scheme in schemes(checkpoint)} - set(VLLM_FAST_GROUPS))
    if slow:
        notes.append(
            f"On a GPU vLLM's fastest kernels take group sizes {VLLM_FAST_GROUPS}; {slow} runs on slower ones."
        )
    vllm = _vllm(checkpoint, options, width)
    notes += split_notes(checkpoint, options, vllm, shares_row_scales=True)
    return ExportPlan(
        format="compressed-tensors",
        tensors=(*quantized, *dense),
        runtimes=(vllm, _transformers(width)),
        notes=tuple(notes),
        warnings=(*dtype_warnings(options), *_width_warnings(width)),
    )


def module_schemes(checkpoint: L4QCheckpoint) -> dict[str, Scheme]:
    """The scheme of every module, in model order.

    Members of a layer that vLLM fuses share one: if one of them has zero-points, the others store their midpoint.
    """
    found: dict[str, Scheme] = {}
    for members in fused_members(checkpoint).values():
        infos = [checkpoint.info(member) for member in members]
        symmetric = all(info.zero_point == "none" for info in infos)
        found |= {m: Scheme(info.stated_group_size, symmetric) for m, info in zip(members, infos, strict=True)}
    return {module: found[module] for module in checkpoint.modules}


def schemes(checkpoint: L4QCheckpoint) -> dict[Scheme, list[str]]:
    """Modules by scheme, in model order."""
    found: dict[Scheme, list[str]] = {}
    for module, scheme in module_schemes(checkpoint).items():
        found.setdefault(scheme, []).append(module)
    return found


def quantization_config(checkpoint: L4QCheckpoint, options: ExportOptions) -> dict[str, Any]:
    """The quantization_config section that vLLM and transformers read.

    One scheme targets all linears; several name their modules. `ignore` holds what stays dense, by exact names.
    """
    width, found = container_bits(checkpoint, options), schemes(checkpoint)
    head = [HEAD] if HEAD in checkpoint.modules else []
    everything = ["Linear", *head]  # vLLM's class of the head is no Linear, so it goes by name
    groups = {
        f"group_{number}": {
            "targets": everything if len(found) == 1 else modules,
            "weights": scheme.to_dict(width),
            "input_activations": None,
            "output_activations": None,
        }
        for number, (scheme, modules) in enumerate(found.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([] if head else [HEAD]), *skipped_linears(checkpoint)],
    }


def module_nbytes(info: WeightInfo, width: int, scheme: Scheme) -> int:
    """Bytes of the three or four tensors of one linear."""
    packed = info.out_features * word_count(info.in_features, width) * 4
    zeros = 0 if scheme.symmetric else word_count(info.out_features, width) * 4 * info.groups
    return packed + zeros + 2 * info.out_features * info.groups + SHAPE_BYTES


def _plan_module(module: str, info: WeightInfo, width: int, scheme: Scheme) -> PlannedTensor:
    zeros = "" if scheme.symmetric else ",weight_zero_point"
    return PlannedTensor(
        name=module,
        target=f"{module}.{{weight_packed,weight_scale,weight_shape{zeros}}}",
        encoding=f"{describe(info.bits, width)} group {info.group_size}, {'asymmetric' if zeros else 'symmetric'}",
        shape=(info.out_features, info.in_features),
        nbytes=module_nbytes(info, width, scheme),
        fidelity=Fidelity.EXACT,
        reason=why_exact(info.bits, width),
        quantized=True,
    )


def _width_warnings(width: int) -> tuple[str, ...]:
    if WORD_BITS % width == 0:
        return ()
    return (f"compressed-tensors before 0.18 expects {width}-bit fields in other words and misreads these.",)


def _transformers(width: int) -> RuntimeSupport:
    needs = "" if WORD_BITS % width == 0 else f"; {width}-bit fields need compressed-tensors >= 0.18"
    return RuntimeSupport(runtime="transformers", loads=True, reason=_TRANSFORMERS + needs)


def _vllm(checkpoint: L4QCheckpoint, options: ExportOptions, width: int) -> RuntimeSupport:
    if width != DEFAULT_CONTAINER:
        reason = (
            f"vLLM has no CPU kernel for {width}-bit fields and refuses them there; its CUDA builds have one "
            "(Humming), which our tests have not run. Without --container-bits the fields have 4 bits"
        )
        return RuntimeSupport(runtime="vLLM", loads=False, reason=reason)
    reason = vllm_problems(checkpoint, options) or listing(_uneven(checkpoint))
    return RuntimeSupport(runtime="vLLM", loads=not reason, reason=reason)


def _uneven(checkpoint: L4QCheckpoint) -> list[str]:
    """Fused layers whose zero-points do not fill whole words per member."""
    per_run, _ = run_length(4)
    problems, found = [], module_schemes(checkpoint)
    for layer, members in fused_members(checkpoint).items():
        rows = [checkpoint.info(member).out_features for member in members]
        if not found[members[0]].symmetric and any(count % per_run for count in rows):
            problems.append(f"{layer}: zero-points of members with {rows} rows do not fill words of {per_run}")
    return problems
