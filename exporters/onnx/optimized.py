"""Beside model.onnx, the graph in ONNX Runtime's own operators, as it saved it: loads much faster, decodes faster.

exporters.onnx.contrib chooses operators that keep one cache buffer, ONNX Runtime turns each linear into MatMulNBits and
saves the graph, exporters.onnx.merge makes one kernel of the linears that read the same input. The trained integers are
relabelled each time, never computed.

The file holds contrib operators and belongs to the ONNX Runtime release and the execution provider that wrote it; its
metadata names both. Optimizations that depend on the machine's instruction set are left out. The accuracy level is part
of the operators and a session's option no longer changes it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import onnx

from exporters.onnx.contrib import use_contrib
from exporters.onnx.merge import INLINE_BYTES, merge_linears
from l4q.errors import VerificationError

OPTIMIZED_NAME = "model.ort-cpu.onnx"
OPTIMIZED_DATA = f"{OPTIMIZED_NAME}.data"
SOURCE_NAME, SAVED_DATA = "model.contrib.onnx", f"{OPTIMIZED_NAME}.saved"
"""What ONNX Runtime loads and the data it saves; neither stays."""
PROVIDER = "CPUExecutionProvider"
RUNTIME_KEY, PROVIDER_KEY = "l4q.onnxruntime", "l4q.execution_provider"
"""Keys of the metadata that say whom the file belongs to."""
ACCURACY_OPTION = "session.qdq_matmulnbits_accuracy_level"
"""ONNX Runtime's session option; its own default is 4."""
NOTE = (
    f"{OPTIMIZED_NAME} beside it is for onnxruntime {{version}} and {PROVIDER} only: the optimized graph that this "
    "release saved, with the accuracy level fixed, which loads faster in less memory and is what genai_config.json "
    "names; it takes as much disk again"
)


def optimized_note() -> str:
    """What the plan and the model card say.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    return NOTE.format(version=version("onnxruntime"))


def write_optimized(folder: Path, accuracy_level: int, linears: int) -> bool:
    """Load the graph in ONNX Runtime and save what became of it; the whole model is in memory meanwhile.

    Args:
        folder: Holds model.onnx and its data.
        accuracy_level: For the kernels in the saved graph.
        linears: Quantized linears of the model, each of which must have become one MatMulNBits.

    Returns:
        Whether past and present may be one buffer; see `exporters.onnx.contrib.use_contrib`.

    Raises:
        VerificationError: ONNX Runtime left a quantized linear unfused.
    """
    import onnxruntime as ort

    source = onnx.load(folder / "model.onnx", load_external_data=False)
    shares_buffer = use_contrib(source)
    onnx.save(source, folder / SOURCE_NAME)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that a saved graph suits this release and machine
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / OPTIMIZED_NAME)
    entries = {
        ACCURACY_OPTION: str(accuracy_level),
        "session.optimized_model_external_initializers_file_name": SAVED_DATA,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE_BYTES),
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(folder / SOURCE_NAME), options, providers=[PROVIDER])
    model = onnx.load(folder / OPTIMIZED_NAME, load_external_data=False)
    check_fused(model, linears)
    merge_linears(model, folder / OPTIMIZED_NAME, OPTIMIZED_DATA)
    for key, value in ((RUNTIME_KEY, ort.__version__), (PROVIDER_KEY, PROVIDER)):
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder / OPTIMIZED_NAME)
    for name in (SOURCE_NAME, SAVED_DATA):
        (folder / name).unlink()
    return shares_buffer


def check_fused(model: onnx.ModelProto, linears: int) -> None:
    """Count the kernels of an optimized graph.

    Raises:
        VerificationError: There is not one MatMulNBits per quantized linear, or a DequantizeLinear is left.
    """
    operators = [node.op_type for node in model.graph.node]
    fused, left = operators.count("MatMulNBits"), operators.count("DequantizeLinear")
    if fused != linears or left:
        raise VerificationError(
            "ONNX Runtime did not fuse every quantized linear",
            where=OPTIMIZED_NAME,
            got=f"{fused} MatMulNBits, {left} DequantizeLinear",
            expected=f"{linears} MatMulNBits, 0 DequantizeLinear",
            remedy="use onnxruntime 1.27 or newer, or leave --onnx-runtime-optimized out",
        )
