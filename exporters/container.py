"""Fields for codes: dense, or wider ones, in which int3 and int2 checkpoints reach runtimes with int4 kernels only.

The weight stays what it is, (q - z) * s. A symmetric code moves up with its midpoint, q + 2**(width-1) - 2**(bits-1);
with integer zero-points q and z are stored as they are. The disk holds `width` bits per code, and the plan says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from exporters.plan import ExportOptions
from exporters.words import run_length
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError
from l4q.packed_weight import PackedWeight

# GPTQ's and compressed-tensors' words (exporters/words.py) take any of these; AWQ's interleaved nibbles only 4.
CONTAINER_BITS = (2, 3, 4)
NIBBLES = (4,)
DEFAULT_CONTAINER = 4
FLOAT16_MAX = 65504.0


def container_bits(checkpoint: L4QCheckpoint, options: ExportOptions, widths: tuple[int, ...] = CONTAINER_BITS) -> int:
    """Bits per stored code: `options.container_bits`, or 4, the width that vLLM on a CPU has a kernel for.

    Raises:
        UnsupportedError: The format does not write that width (`widths` are those it writes), or a code does not fit.
    """
    width = DEFAULT_CONTAINER if options.container_bits is None else options.container_bits
    if width not in widths:
        raise UnsupportedError(
            "codes of this width cannot be written",
            where="container_bits",
            got=width,
            expected=f"one of {list(widths)}",
            remedy="leave --container-bits out: codes of 2 and 3 bits are held exactly by 4-bit fields",
        )
    wide = sorted(
        {checkpoint.info(module).bits for module in checkpoint.modules if checkpoint.info(module).bits > width}
    )
    if wide:
        raise UnsupportedError(
            "the codes do not fit the container",
            where="container_bits",
            got=f"bits {wide}",
            expected=f"at most {width}",
            remedy="leave --container-bits out, or train with fewer --bits",
        )
    return width


def widen_packed(weight: PackedWeight, width: int) -> PackedWeight:
    """The same weight with codes of `width` bits, at least its own: `dequantize` gives the same float32 bits.

    Raises:
        UnsupportedError: The weight has float mins, or values beyond the float16 its kernels compute in.
    """
    _refuse_overflow(weight)
    if weight.bits == width:
        return weight
    shift = (1 << (width - 1)) - (1 << (weight.bits - 1)) if weight.zero_point == "none" else 0
    return replace(weight, packed=weight.fields(width, shift), bits=width)


def _refuse_overflow(weight: PackedWeight) -> None:
    """vLLM's and GPTQModel's kernels dequantize to float16: a weight beyond 65504 is infinite there, and logits NaN."""
    zeros = weight.integer_zeros()
    widest = (
        weight.scales.view(np.int16).max().view(np.float16)
    )  # positive numbers stand in the order of their patterns
    if float(widest) * ((1 << weight.bits) - 1) <= FLOAT16_MAX:
        return
    zeros = zeros.astype(np.float32)
    largest = float((weight.scales.astype(np.float32) * np.maximum(zeros, (1 << weight.bits) - 1 - zeros)).max())
    if largest > FLOAT16_MAX:
        raise UnsupportedError(
            "a weight can exceed float16, in which the int4 kernels of vLLM and GPTQModel compute",
            where=weight.name,
            got=f"scale times code reaches {largest:g}",
            expected=f"at most {FLOAT16_MAX:g}",
            remedy="such scales are damage or divergence: train again, or export to gguf or onnx, which compute in "
            "float32",
        )


def describe(bits: int, width: int) -> str:
    """Words for a plan's encoding: "int4", or "int3 in 4-bit fields"."""
    return f"int{bits}" if bits == width else f"int{bits} in {width}-bit fields"


def why_exact(bits: int, width: int) -> str:
    """A plan's reason for calling such a tensor exact."""
    if bits == width:
        return "codes, zero-points and fp16 scales are stored as they are"
    return f"{width}-bit fields hold every {bits}-bit code; fp16 scales are stored as they are"


def container_notes(checkpoint: L4QCheckpoint, width: int) -> tuple[str, ...]:
    """The price of fields wider than the codes, and of fields that are not 4 bits wide; else nothing."""
    found = {checkpoint.info(module).bits for module in checkpoint.modules}
    narrow, notes = sorted(found - {width}), []
    if narrow:
        bits = "- and ".join(str(value) for value in narrow)
        notes.append(
            f"{bits}-bit codes are stored in {width}-bit fields: exact, but {width} bits on disk and in memory."
        )
    if width != DEFAULT_CONTAINER:
        values, words = run_length(width)
        notes.append(
            f"{width}-bit fields are dense: {values} codes in {words} word{'s' * (words > 1)}, {width} bits per code "
            "on disk. Without --container-bits the fields have 4 bits, for which vLLM has kernels everywhere."
        )
    return tuple(notes)
