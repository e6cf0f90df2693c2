"""Which block type holds a `QuantizedWeight` exactly, and its bytes in that type.

A type is judged by its own equation in float32: Q4_0 = d * (q - 8), Q4_1 = d * q + m, Q5_0 = d * (q - 16),
Q4_K = (d * sc) * q - (dmin * mn), Q3_K = (d * sc) * (q - 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.gguf.encode_k import TYPE_OF_GRID, encode_q3_k, encode_q4_k, off_superblocks, q4_k_numbers
from exporters.gguf.pack import BLOCK, BLOCK_BYTES, U8, pack_q4_0, pack_q4_1, pack_q5_0
from exporters.gguf.pack_k import SUPERBLOCK_BYTES
from exporters.plan import Fidelity, GgufType
from l4q.checkpoint import WeightInfo
from l4q.errors import UnsupportedError
from l4q.k_grids import SUPERBLOCK
from l4q.weight import GroupParameters, QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A quantized linear under judgement; its scales and zero-points are read only where exactness depends on them."""

    name: str
    info: WeightInfo
    read: Callable[[], GroupParameters]

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Subject:
        """A weight that is in memory."""
        info = WeightInfo(
            out_features=weight.out_features,
            in_features=weight.in_features,
            bits=weight.bits,
            group_size=weight.group_size,
            zero_point=weight.zero_point,
            k_grid=weight.k_grid,
        )
        return cls(name=weight.name, info=info, read=lambda: weight)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How one quantized linear is stored."""

    name: str
    fidelity: Fidelity
    reason: str


def choose_encoding(subject: Subject, requested: GgufType) -> Encoding:
    """The block type for a weight: the requested one, or for "auto" the smallest that is exact.

    "auto" takes K types for weights on the K grids only: they round activations more coarsely than Q4_0 and its kin.

    Raises:
        UnsupportedError: The requested type cannot hold the scales or zero-points of this weight at all.
    """
    grid = subject.info.k_grid
    if grid is not None and requested not in (TYPE_OF_GRID[grid], "auto", "F32"):
        raise UnsupportedError(
            f"{requested} has one fp16 scale per block; the scales of {grid} are fp16 numbers times integers",
            where=subject.name,
            expected=f"{TYPE_OF_GRID[grid]}, or F32",
            remedy="use --gguf-type auto",
        )
    if requested != "auto":
        return _JUDGES[requested](subject)
    if grid is not None:
        return _JUDGES[TYPE_OF_GRID[grid]](subject)
    if subject.info.zero_point == "float":
        return _judge_q4_1(subject)
    if fits_q4_0(subject):
        return _judge_q4_0(subject)
    inexact = block_mins(subject.read())[1]
    if not inexact:
        return _judge_q4_1(subject)
    reason = f"not Q4_1: scale * zero is not an fp16 number in {inexact} of {subject.read().scales.size} groups"
    return Encoding(name="Q5_0", fidelity=Fidelity.EXACT, reason=reason)


def encode(weight: QuantizedWeight, encoding: str) -> npt.NDArray[np.generic]:
    """The tensor's data in file order: uint8 rows of blocks, or float32 values for "F32"."""
    return _ENCODERS[encoding](weight)


def encoded_nbytes(shape: tuple[int, int], encoding: str) -> int:
    """Bytes of a [rows, columns] tensor in an encoding."""
    rows, columns = shape
    if encoding in SUPERBLOCK_BYTES:
        return rows * (columns // SUPERBLOCK) * SUPERBLOCK_BYTES[encoding]
    return rows * columns * 4 if encoding == "F32" else rows * (columns // BLOCK) * BLOCK_BYTES[encoding]


def fits_q4_0(subject: Subject) -> bool:
    """Whether four-bit codes hold q - z: always up to 3 bits, at 4 bits for z = 8 and, with a negative scale, z = 7."""
    if subject.info.zero_point == "float":
        return False
    if subject.info.bits <= 3 or subject.info.zero_point == "none":
        return True
    return bool(np.isin(subject.read().integer_zeros(), (7, 8)).all())


def block_mins(weight: GroupParameters) -> tuple[npt.NDArray[np.float16], int]:
    """Q4_1's m per group, float16 [out, groups], and the number of groups where -z * s had to be rounded.

    The float32 product is exact (11 + 4 significant bits), so comparing it with its fp16 rounding decides.
    """
    if weight.mins is not None:
        return weight.mins, 0
    exact = -(weight.scales.astype(np.float32) * weight.integer_zeros().astype(np.float32))
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float16)
    return rounded, int(np.count_nonzero(rounded.astype(np.float32) != exact))


def _judge_q4_0(subject: Subject) -> Encoding:
    if not fits_q4_0(subject):
        raise UnsupportedError(
            "Q4_0 cannot hold these zero-points",
            where=subject.name,
            got=f"{subject.info.bits}-bit codes with {subject.info.zero_point} zero-points",
            expected="zero-points 7 and 8 only, or at most 3 bits with integer zero-points",
            remedy="use --gguf-type auto, which takes Q4_1 or Q5_0",
        )
    mirrored = subject.info.bits > 3 and subject.info.zero_point == "integer"
    reason = "stored code is q - z + 8" + ("; for z = 7 it is 15 - q, and d = -scale" if mirrored else "")
    return Encoding(name="Q4_0", fidelity=Fidelity.EXACT, reason=reason)


def _judge_q4_1(subject: Subject) -> Encoding:
    if subject.info.zero_point == "float":
        return Encoding(name="Q4_1", fidelity=Fidelity.EXACT, reason="d = scale, m = the trained min")
    mins, inexact = block_mins(subject.read())
    if not np.isfinite(mins).all():
        raise UnsupportedError(
            "Q4_1 cannot hold these zero-points: scale * zero overflows fp16",
            where=subject.name,
            remedy="use --gguf-type Q5_0",
        )
    if inexact:
        reason = f"scale * zero is not an fp16 number in {inexact} of {mins.size} groups"
        return Encoding(name="Q4_1", fidelity=Fidelity.ROUNDED, reason=reason)
    return Encoding(name="Q4_1", fidelity=Fidelity.EXACT, reason="every scale * zero is an fp16 number")


def _judge_q5_0(subject: Subject) -> Encoding:
    if subject.info.zero_point == "float":
        raise UnsupportedError(
            "Q5_0 has no min, so it cannot hold float zero-points",
            where=subject.name,
            remedy="use --gguf-type auto, which takes Q4_1",
        )
    return Encoding(name="Q5_0", fidelity=Fidelity.EXACT, reason="stored code is q - z + 16")


def _judge_q4_k(subject: Subject) -> Encoding:
    _require_superblocks(subject, "Q4_K")
    if not all(np.isfinite(part).all() for part in q4_k_numbers(subject.read())):
        raise UnsupportedError(
            "Q4_K cannot hold these scales: 2**(bits-1) * scale overflows fp16",
            where=subject.name,
            remedy="use --gguf-type auto, or F32 if they are on the K grid",
        )
    reasons = {"float": "scales and mins as trained", "integer": "dmin = d, mn = z", "none": "dmin = 8 d, mn = sc"}
    return Encoding(name="Q4_K", fidelity=Fidelity.EXACT, reason=reasons[subject.info.zero_point])


def _judge_q3_k(subject: Subject) -> Encoding:
    _require_superblocks(subject, "Q3_K")
    if subject.info.bits > 3 or subject.info.zero_point != "none":
        raise UnsupportedError(
            "Q3_K holds symmetric codes of at most 3 bits",
            where=subject.name,
            got=f"{subject.info.bits}-bit codes with zero-point {subject.info.zero_point}",
            remedy="use --gguf-type auto",
        )
    return Encoding(name="Q3_K", fidelity=Fidelity.EXACT, reason="d and sc as trained")


def _require_superblocks(subject: Subject, kind: str) -> None:
    problem = off_superblocks(subject.info)
    if problem:
        raise UnsupportedError(
            f"{kind} cannot hold these scales",
            where=subject.name,
            got=problem,
            expected="a K grid, or groups of whole superblocks",
            remedy="use --gguf-type auto",
        )


def _judge_f32(subject: Subject) -> Encoding:
    return Encoding(name="F32", fidelity=Fidelity.EXACT, reason="dequantized on request")


def _centred_codes(weight: QuantizedWeight, centre: int) -> U8:
    """Codes relative to `centre`: q - z + centre, uint8 [out, in]."""
    codes = weight.codes.reshape(weight.out_features, weight.groups, weight.group_size)  # [out, groups, group_size]
    # The uint8 wrap-around of centre - z cancels in the sum, whose true value is 0..31.
    shift = np.uint8(centre) - weight.integer_zeros()
    return (codes + shift[:, :, None]).reshape(weight.shape)


def _encode_q4_0(weight: QuantizedWeight) -> U8:
    codes, scales = _centred_codes(weight, 8), weight.scales
    if weight.bits > 3 and weight.zeros is not None:  # (q - 7) * s = ((15 - q) - 8) * -s
        mirrored = weight.zeros == 7
        codes = np.where(np.repeat(mirrored, weight.group_size, axis=1), np.uint8(16) - codes, codes)
        scales = np.where(mirrored, -scales, scales)
    return pack_q4_0(codes, scales)


def _encode_q4_1(weight: QuantizedWeight) -> U8:
    return pack_q4_1(weight.codes, weight.scales, block_mins(weight)[0])


def _encode_q5_0(weight: QuantizedWeight) -> U8:
    return pack_q5_0(_centred_codes(weight, 16), weight.scales)


def _encode_f32(weight: QuantizedWeight) -> npt.NDArray[np.float32]:
    return weight.dequantize()


_JUDGES: Final[dict[str, Callable[[Subject], Encoding]]] = {
    "Q4_0": _judge_q4_0,
    "Q4_1": _judge_q4_1,
    "Q5_0": _judge_q5_0,
    "Q4_K": _judge_q4_k,
    "Q3_K": _judge_q3_k,
    "F32": _judge_f32,
}

_ENCODERS: Final[dict[str, Callable[[QuantizedWeight], npt.NDArray[np.generic]]]] = {
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q4_K": encode_q4_k,
    "Q3_K": encode_q3_k,
    "F32": _encode_f32,
}
