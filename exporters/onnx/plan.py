"""What the ONNX export will write, from the checkpoint's headers alone."""

from __future__ import annotations

from exporters.k_grid import refuse_k_grid
from exporters.onnx.optimized import optimized_note
from exporters.onnx.pack import choose_block
from exporters.onnx.source import GraphSource, choose_source
from exporters.plan import ExportOptions, ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError

WIDENED = ("F32", "F16", "BF16")
"""Stored dtypes that float32 holds exactly."""

GRAPH_PACKAGES = {
    "built": ("onnx", "onnx-ir"),
    "exported": ("onnx", "onnx-ir", "onnxscript", "torch", "transformers"),
}
"""Packages that decide the bytes of a graph, by where it comes from."""

RUNTIMES = (
    RuntimeSupport(runtime="onnxruntime >= 1.24", loads=True, reason="opset 23; every linear fuses to MatMulNBits"),
    RuntimeSupport(
        runtime="onnxruntime-genai 0.18", loads=True, reason="takes the accuracy level from genai_config.json"
    ),
    RuntimeSupport(runtime="onnxruntime < 1.24", loads=False, reason="opset 23 is refused"),
)
ACCURACY_NOTES = {
    0: "accuracy level 0: float32 activations, the trained model's numbers",
    4: "accuracy level 4: int8 activations, faster where the CPU has int8 instructions, perplexity up by 0.2 to 1.3 %",
}
FLOAT_NOTE = "float zero-points cost one extra small product per linear over group sums of its input"
REASONS = {
    "none": "signed codes, no zero-point tensor",
    "integer": "codes and zero-points as trained",
    "float": "codes, plus one bias per group that meets the group sums of the input",
}


def plan(checkpoint: L4QCheckpoint, options: ExportOptions) -> ExportPlan:
    """Decide every tensor's encoding.

    Raises:
        UnsupportedError: The graph does not cover the architecture, a tensor or its dtype; all offenders are listed.
        UsageError: The requested block size does not fit a layer's groups.
    """
    source = choose_source(checkpoint, options.onnx_graph)
    _check_names(checkpoint, source)
    if options.onnx_scales == "float16":
        refuse_k_grid(checkpoint, "ONNX with --onnx-scales float16", remedy="use --onnx-scales float32")
    tensors = [_plan_linear(checkpoint, module, options) for module in checkpoint.modules]
    tensors += [_plan_dense(checkpoint, name) for name in checkpoint.dense_names]
    level = options.onnx_accuracy_level
    notes = [ACCURACY_NOTES.get(level, f"accuracy level {level}: float32 activations on x64")]
    if any(checkpoint.info(module).zero_point == "float" for module in checkpoint.modules):
        notes.append(FLOAT_NOTE)
    notes += source.notes
    if options.onnx_runtime_optimized:
        notes.append(optimized_note())
    packages = (*GRAPH_PACKAGES[source.kind], *(("onnxruntime",) if options.onnx_runtime_optimized else ()))
    return ExportPlan(format="onnx", tensors=tuple(tensors), runtimes=RUNTIMES, notes=tuple(notes), packages=packages)


def _check_names(checkpoint: L4QCheckpoint, source: GraphSource) -> None:
    """Every weight has a place in the graph and every place has its weight."""
    present = {f"{module}.weight" for module in checkpoint.modules} | set(checkpoint.dense_names)
    misplaced = [module for module in checkpoint.modules if module not in source.linears]
    problems = {
        "missing": sorted(source.required - present),
        "not part of this architecture": sorted(present - source.required - source.optional),
        "quantized but not a linear of the graph": misplaced,
        "dtype that float32 cannot hold": [
            f"{name} {checkpoint.dense_dtype(name)}"
            for name in checkpoint.dense_names
            if checkpoint.dense_dtype(name) not in WIDENED
        ],
    }
    found = {what: names for what, names in problems.items() if names}
    if found:
        raise UnsupportedError(
            "the checkpoint's tensors do not match the ONNX graph of its architecture",
            where=checkpoint.architecture,
            got="; ".join(f"{what}: {', '.join(names)}" for what, names in found.items()),
            expected="the tensors of the stock architecture",
            remedy="export to gguf or gptq, or extend exporters/onnx/family.py",
        )


def _plan_linear(checkpoint: L4QCheckpoint, module: str, options: ExportOptions) -> PlannedTensor:
    info = checkpoint.info(module)
    block = choose_block(
        in_features=info.in_features, group_size=info.group_size, requested=options.onnx_block_size, where=module
    )
    rows = -(-info.in_features // block)
    scale_bytes = 2 if options.onnx_scales == "float16" else 4
    nbytes = _packed_bytes(info.in_features * info.out_features) + scale_bytes * rows * info.out_features
    encoding = f"INT4 block {block}"
    if info.zero_point == "integer":
        nbytes += _packed_bytes(rows * info.out_features)
        encoding = f"UINT4 block {block}"
    elif info.zero_point == "float":
        nbytes += 4 * info.groups * info.out_features
        encoding = f"4-bit block {block} + group bias"
    reason = REASONS[info.zero_point]
    if info.bits < 4:
        reason += f"; {info.bits}-bit codes in 4-bit elements"
    return PlannedTensor(
        name=module,
        target=f"{module}.weight",
        encoding=encoding,
        shape=(info.out_features, info.in_features),
        nbytes=nbytes,
        fidelity=Fidelity.EXACT,
        reason=reason,
        quantized=True,
    )


def _plan_dense(checkpoint: L4QCheckpoint, name: str) -> PlannedTensor:
    shape = checkpoint.dense_shape(name)
    size = 1
    for dimension in shape:
        size *= dimension
    stored = checkpoint.dense_dtype(name)
    return PlannedTensor(
        name=name,
        target=name,
        encoding="FLOAT",
        shape=shape,
        nbytes=4 * size,
        fidelity=Fidelity.EXACT,
        reason="" if stored == "F32" else f"{stored} widened",
        quantized=False,
    )


def _packed_bytes(elements: int) -> int:
    return (elements + 1) // 2
