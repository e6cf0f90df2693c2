"""Which runtimes load what was found, with the reason where one does not."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.driver import EXPORTERS, make_plan
from exporters.inspect.facts import Grids
from exporters.plan import ExportOptions, RuntimeSupport
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError

ASYMMETRIC_GPTQ = "its GPTQ loader refuses asymmetric weights; compressed-tensors or AWQ hold them"
DENSE_GPTQ = "refuses GPTQ of 2 or 3 bits"
NOT_4_BITS = "needs a GPU at {} bits; on CPU its kernels take 4"
QDQ_OPSET = 21
"""First opset with int4 types and blocked DequantizeLinear."""


def of_checkpoint(checkpoint: L4QCheckpoint) -> tuple[RuntimeSupport, ...]:
    """torch at once, and every export format as its own plan says."""
    found = [RuntimeSupport(runtime="transformers", loads=True, reason="after import l4q; dequantized, for evaluation")]
    for name in EXPORTERS:
        label = f"l4q-export --to {name}"
        try:
            plan = make_plan(checkpoint, name, ExportOptions())
        except L4QError as error:
            found.append(RuntimeSupport(runtime=label, loads=False, reason=error.what))
            continue
        encodings = ", ".join(sorted({tensor.encoding for tensor in plan.quantized}))
        served = ", ".join(runtime.runtime for runtime in plan.runtimes if runtime.loads) or "none"
        found.append(RuntimeSupport(runtime=label, loads=True, reason=f"exact, as {encodings}; runs in {served}"))
    return tuple(found)


def of_folder(method: str, grids: Grids) -> tuple[RuntimeSupport, ...]:
    """vLLM and transformers for a folder of safetensors."""
    if method == "safetensors":
        return (
            RuntimeSupport(runtime="transformers", loads=True),
            RuntimeSupport(runtime="vLLM", loads=True),
            RuntimeSupport(runtime="l4q-train", loads=True, reason="as a start"),
        )
    if method not in _NEEDS:
        unknown = f"no reader here for quant_method {method}"
        return (
            RuntimeSupport(runtime="transformers", loads=True, reason="if it knows the method: not examined"),
            RuntimeSupport(runtime="l4q-train", loads=False, reason=unknown),
        )
    odd = sorted(set(grids.bits) - {4})
    problem = NOT_4_BITS.format(", ".join(map(str, odd))) if odd else ""
    if method == "gptq" and set(odd) & {2, 3}:
        problem = DENSE_GPTQ
    if method == "gptq" and set(grids.kinds) - {"none"}:
        problem = ASYMMETRIC_GPTQ
    undecoded = "a module is on no grid l4q reads" if grids.undecoded else ""
    return (
        RuntimeSupport(runtime="vLLM", loads=not problem, reason=problem),
        RuntimeSupport(runtime="transformers", loads=True, reason=_NEEDS[method]),
        RuntimeSupport(runtime="l4q-train", loads=not grids.undecoded, reason=undecoded or "as a start"),
    )


_NEEDS = {
    "gptq": "with gptqmodel installed",
    "awq": "with gptqmodel installed",
    "compressed-tensors": "with compressed-tensors installed",
}


def of_gguf(architecture: str) -> tuple[RuntimeSupport, ...]:
    """llama.cpp, and what reads GGUF through it or beside it."""
    from exporters.gguf.families import ARCHITECTURES

    known = architecture in {row.name for row in ARCHITECTURES.values()}
    reason = "" if known else f"if its version knows the architecture {architecture or '(none named)'}"
    return (
        RuntimeSupport(runtime="llama.cpp", loads=True, reason=reason),
        RuntimeSupport(runtime="transformers", loads=True, reason="dequantized, through gguf_file"),
    )


def of_onnx(opsets: Mapping[str, int], operators: Mapping[str, int]) -> tuple[RuntimeSupport, ...]:
    """ONNX Runtime, and whether other ONNX runtimes can."""
    own = sorted({name for name in operators if name.startswith("com.microsoft")})
    opset = opsets.get("ai.onnx", 0)
    others = f"uses ONNX Runtime's own {', '.join(own[:3])}" if own else f"that knows opset {opset}"
    since = "1.24" if opset >= 23 else "1.20" if opset >= QDQ_OPSET else "any"
    return (
        RuntimeSupport(
            runtime="ONNX Runtime", loads=True, reason=f"version {since}" + (" or later" * (since != "any"))
        ),
        RuntimeSupport(runtime="another ONNX runtime", loads=not own, reason=others),
    )
