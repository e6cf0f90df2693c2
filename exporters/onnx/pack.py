"""ONNX's 4-bit layout for one linear: `DequantizeLinear(weight, scales, zeros; axis=0, block_size)` feeding `MatMul`.

The checkpoint keeps [out_features, in_features] = [N, K]; the graph computes x [.., K] @ weight [K, N], so codes and
group parameters are transposed here and the graph needs no Transpose, which would keep ONNX Runtime from fusing the
pair into MatMulNBits and cost an order of magnitude in speed.

Per element, in float32 (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html, opset 23):

    weight[k, n] = (codes[k, n] - zeros[k // block, n]) * scales[k // block, n]

ONNX has no 3-bit type and no float zero-point. Codes of 3 (and 2) bits are stored in 4-bit elements unchanged in value.
A float zero-point becomes integer codes plus one small product over group sums of the activations:

    x @ w = x @ (s * (q - c)) + group_sums(x) @ (m + s * c),   c = 2**(bits-1), or 0 if m + s * c is not a float32
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporters.transpose import transposed, transposed_nibbles
from l4q.errors import UnsupportedError, UsageError
from l4q.packed_weight import PackedWeight
from l4q.weight import F32, U8, GroupParameters, QuantizedWeight

MIN_BLOCK = 16
MAX_BLOCK = 256
"""ONNX Runtime fuses blocks of 16 to 256 columns, powers of two only; before 1.27 it computed 512 silently wrong."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedParameters:
    """What gives the codes of one linear their values, as the ONNX file stores it.

    K = in_features, N = out_features, B = ceil(K / block).
    """

    signed: bool
    """True: codes are INT4 with zero-point 0. False: UINT4."""
    scales: F32
    """[B, N]."""
    zeros: U8 | None
    """Packed UINT4 zero-points of the logical array [B, N], or None for 0."""
    group_bias: F32 | None
    """[groups, N]: added per group sum of the activations (float zero-point only)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear(PackedParameters):
    """All arrays of one linear as the ONNX file stores them."""

    weight: U8
    """Packed codes of the logical array [K, N], (K * N + 1) // 2 bytes."""


def pack_uint4(values: U8) -> U8:
    """Pack values < 16 of any shape into bytes, flattened row-major, low nibble first.

        byte i = values.flat[2 * i] | values.flat[2 * i + 1] << 4

    An odd last element leaves the high nibble 0. Rows are not padded: a row of odd length shares a byte with the next.

    Returns:
        uint8 [(values.size + 1) // 2].
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | flat[1::2] << np.uint8(4)


def unpack_uint4(packed: U8, shape: tuple[int, ...]) -> U8:
    """Undo `pack_uint4`: uint8 values < 16 of the given shape.

    Raises:
        UsageError: The byte count does not belong to the shape.
    """
    size = int(np.prod(shape))
    if packed.size != (size + 1) // 2:
        raise UsageError(
            "packed 4-bit array has the wrong length", got=packed.size, expected=f"{(size + 1) // 2} bytes"
        )
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)  # [bytes, 2]
    return pairs.reshape(-1)[:size].reshape(shape)


def int4_bits(codes: U8, bits: int) -> U8:
    """Codes minus 2**(bits-1) as 4-bit two's complement, still one element a byte: ONNX's INT4 before packing."""
    return (codes - np.uint8(1 << (bits - 1))) & np.uint8(15)


def largest_block(columns: int) -> int:
    """The largest power of two that divides `columns`, at most `MAX_BLOCK`."""
    return min(columns & -columns, MAX_BLOCK)


def choose_block(*, in_features: int, group_size: int, requested: int | None, where: str) -> int:
    """Columns per DequantizeLinear block.

    A block must lie inside one group, so that repeating the group's scale is exact. When one group covers the whole
    row, every block size qualifies, the last block may be short, and rows of any length fit.

    Raises:
        UsageError: `requested` is no power of two in [16, 256], or does not divide the group.
        UnsupportedError: No block of at least 16 divides the group.
    """
    one_group = group_size == in_features
    if requested is not None:
        _check_requested(requested, group_size, one_group, where)
        return requested
    block = largest_block(group_size)
    if block >= MIN_BLOCK:
        return block
    if one_group:
        power_below = 1 << (in_features.bit_length() - 1)
        return max(MIN_BLOCK, min(power_below, MAX_BLOCK))
    raise UnsupportedError(
        "the group size has no block that ONNX Runtime fuses",
        where=where,
        got=f"group_size {group_size}",
        expected=f"a multiple of {MIN_BLOCK}, or one group per row",
        remedy="train with a group size that is a multiple of 32",
    )


def _check_requested(requested: int, group_size: int, one_group: bool, where: str) -> None:
    is_power = requested > 0 and requested & (requested - 1) == 0
    if not is_power or not MIN_BLOCK <= requested <= MAX_BLOCK:
        raise UsageError(
            "unusable ONNX block size",
            where="onnx_block_size",
            got=requested,
            expected=f"a power of two from {MIN_BLOCK} to {MAX_BLOCK}",
            remedy=f"leave it out, or choose a divisor of the group size {group_size}",
        )
    if group_size % requested and not one_group:
        raise UsageError(
            "the ONNX block size does not divide the group size",
            where=where,
            got=f"block {requested}, group_size {group_size}",
            expected=f"a power of two from {MIN_BLOCK} to {largest_block(group_size)}",
            remedy="leave onnx_block_size out to use the largest block that fits",
        )


def block_rows(groups: npt.NDArray[np.generic], *, in_features: int, block: int) -> npt.NDArray[np.generic]:
    """Spread one value per group over the group's blocks and transpose: [N, groups] to [ceil(K / block), N]."""
    rows = -(-in_features // block)
    # Groups are whole blocks, except a single group, whose last block may be short; -(-a // b) covers both.
    repeats = -(-rows // groups.shape[1])
    return np.repeat(transposed(groups), repeats, axis=0)


def float_center(weight: GroupParameters) -> int:
    """The code c subtracted from a float-zero-point weight: 2**(bits-1), or 0 where m + s * c would round in float32.

    With c in the middle the codes are signed and small, which suits int8 activations; with 0 the bias is m itself.
    """
    middle = 1 << (weight.bits - 1)
    exact = _group_bias(weight, middle)
    return middle if np.array_equal(exact.astype(np.float32).astype(np.float64), exact) else 0


def _group_bias(weight: GroupParameters, center: int) -> npt.NDArray[np.float64]:
    mins = weight.group_mins()
    if mins is None:
        raise UsageError("only a float zero-point has a group bias", where=weight.name, got=weight.zero_point)
    return mins.astype(np.float64) + weight.group_scales().astype(np.float64) * center  # [N, groups]


def pack_linear(weight: QuantizedWeight, block: int) -> PackedLinear:
    """Lay out one weight with `block` columns per scale; exact for every zero-point kind."""
    parameters = pack_parameters(weight, block)
    return PackedLinear(weight=pack_linear_codes(weight, signed=parameters.signed), **vars(parameters))


def pack_parameters(weight: GroupParameters, block: int) -> PackedParameters:
    """All of `pack_linear` but the codes."""
    scales = block_rows(weight.group_scales(), in_features=weight.in_features, block=block)
    zeros: U8 | None = None
    group_bias: F32 | None = None
    signed = weight.zero_point == "none"
    if weight.zeros is not None:
        zeros = pack_uint4(block_rows(weight.zeros, in_features=weight.in_features, block=block).astype(np.uint8))
    elif weight.mins is not None:
        center = float_center(weight)
        signed = center > 0
        group_bias = np.ascontiguousarray(_group_bias(weight, center).T.astype(np.float32))
    return PackedParameters(signed=signed, scales=scales.astype(np.float32), zeros=zeros, group_bias=group_bias)


def code_pieces(weight: PackedWeight, *, signed: bool) -> Iterator[npt.NDArray[np.generic]]:
    """The bytes of `PackedLinear.weight`, in order and in pieces.

    A 4-bit field with its highest bit turned over is the same number less 8, as two's complement has it; codes of fewer
    bits are raised first, so that their midpoint is 8 too.
    """
    if weight.out_features % 8:  # such rows of the transpose end inside a word
        yield pack_linear_codes(weight.unpack(), signed=signed)
        return
    fields = weight.fields(4, 8 - (1 << (weight.bits - 1)) if signed else 0)
    yield from transposed_nibbles(fields, weight.in_features, flip=8 if signed else 0)


def pack_linear_codes(weight: QuantizedWeight, *, signed: bool) -> U8:
    """The same bytes at once, code by code."""
    return pack_uint4((int4_bits(weight.codes, weight.bits) if signed else weight.codes).T)  # [K, N]
