"""What the Triton kernels do where there is no GPU: python -m runtime_tests.triton_checks CHECK [GLASSLLM FOLDER].

`interpret` (with TRITON_INTERPRET=1) compares them with the eager kernels in Triton's interpreter and trains with them;
`compile` has Triton compile them for NVIDIA GPUs and counts instructions. Each prints one JSON object. They are
processes of their own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from l4q.config import QuantConfig
from l4q.kernels import triton_kernels
from l4q.kernels.fused import FusedKernels
from l4q.kernels.triton_kernels import TritonPasses, tile_of, tl, triton
from l4q.kernels.verify import compare, example
from l4q.quant import GridParams
from runtime_tests.kernel_runs import SMALL_RUN, few_steps

VARIANTS = ((80, False), (90, True))
"""Compute capabilities 8.0 (A100) and 9.0 (H100), and whether W_q is bfloat16."""
COUNTED = ("div.rn.f32", "div.full.f32", "fma.rn.f32", "cvt.rn")
# One bit width per dtype; every kind of zero-point; a tile's columns that fit, do not fit, and take several steps.
DTYPES = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 2}
SHAPES = (((70, 96), 32), ((33, 96), 96), ((5, 1500), -1))


class Shifted(TritonPasses):
    """The twin: one code fewer."""

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """W_q with codes clamped too early."""
        super().quantize(merged, params, max_code - 1, out)


def interpret() -> dict[str, Any]:
    """Differences of right and of broken kernels, and the result of a short training run."""
    found: dict[str, Any] = {"run": few_steps(Path(sys.argv[2]), Path(sys.argv[3]), kernels="triton", **SMALL_RUN)}
    for passes in (TritonPasses(), Shifted()):
        odd = []
        for (dtype, bits), kind, (shape, group) in itertools.product(
            DTYPES.items(), ("none", "integer", "float"), SHAPES
        ):
            quant = QuantConfig(bits=bits, zero_point=kind, group_size=group)  # type: ignore[arg-type]
            difference = compare(FusedKernels(passes), *example(quant, dtype, shape=shape))
            if difference is not None:
                odd.append(difference)
        found[type(passes).__name__] = odd
    return found


def compile_for_gpus() -> dict[str, Any]:
    """Instructions in the PTX of the kernels, as shipped and with the two mistakes they avoid."""
    found = {}
    for architecture, bfloat16 in VARIANTS:
        for kernel in (triton_kernels.quantize_kernel, triton_kernels.differentiate_kernel):
            name = f"{kernel.fn.__name__} {architecture} {'bfloat16' if bfloat16 else 'float32'}"
            found[name] = _count(
                kernel, _signature(kernel, bfloat16), {"bfloat16": bfloat16, **tile_of(64)}, architecture
            )
    kernel = triton_kernels.quantize_kernel
    found["fused"] = _count(kernel, _signature(kernel, False), {"bfloat16": False, **tile_of(64)}, 90, fusion=True)
    found["plain division"] = _count(_plain, {"values": "*fp32", "rows": "constexpr"}, {"rows": 64}, 90)
    return found


@triton.jit
def _plain(values, rows: triton_kernels.constexpr):  # type: ignore[no-untyped-def]
    """The twin: Triton's `/`."""
    at = values + tl.arange(0, rows)
    tl.store(at, 3.0 / tl.load(at))


def _signature(kernel: Any, bfloat16: bool) -> dict[str, str]:
    types = {name: "*fp32" for name in ("merged", "scales", "mins", "grad_s", "grad_m")}
    types |= {"out": "*i16", "grad": "*bf16"} if bfloat16 else {"out": "*fp32", "grad": "*fp32"}
    types |= {"groups": "i32", "size": "i32", "max_code": "fp32"}
    return {name: types.get(name, "constexpr") for name in kernel.arg_names}


def _count(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], architecture: int, *, fusion: bool = False
) -> dict[str, int]:
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {**triton_kernels.OPTIONS, "enable_fp_fusion": fusion or triton_kernels.OPTIONS["enable_fp_fusion"]}
    compiled = triton.compile(source, target=target, options=options)
    return {name: compiled.asm["ptx"].count(name) for name in COUNTED} | {"cubin": len(compiled.asm["cubin"])}


def main() -> None:
    """Run the check that is named."""
    print(json.dumps({"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]](), default=str))


if __name__ == "__main__":
    main()
