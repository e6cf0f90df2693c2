"""Which GGUF type a weight gets and what the plan says of it: names, fidelity, reasons and refusals word for word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest

from exporters.gguf.encode import Encoding, Subject, block_mins, choose_encoding, encode, encoded_nbytes, fits_q4_0
from exporters.gguf.encode_k import off_superblocks, q4_k_numbers
from exporters.plan import Fidelity
from l4q.checkpoint import WeightInfo
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError
from l4q.weight import QuantizedWeight
from runtime_tests.error_texts import f16, message, u8
from runtime_tests.random_models import random_weight

NONE = random_weight((2, 512), QuantConfig(group_size=256), 0)
TWO = random_weight((2, 512), QuantConfig(bits=2, group_size=256), 0)
SHORT = random_weight((2, 64), QuantConfig(group_size=32), 0)
INTEGER = replace(random_weight((2, 512), QuantConfig(zero_point="integer", group_size=256), 0), scales=f16(2, 2))
THREE = random_weight((2, 512), QuantConfig(bits=3, zero_point="integer", group_size=64), 0)
FLOAT = random_weight((2, 512), QuantConfig(zero_point="float", group_size=256), 0)
Q4_K = random_weight((2, 256), QuantConfig(zero_point="float", group_size=32, scale_grid="q4_k"), 0)
Q4_K_NONE = random_weight((2, 256), QuantConfig(zero_point="none", group_size=32, scale_grid="q4_k"), 0)
Q3_K = random_weight((2, 256), QuantConfig(bits=3, group_size=16, scale_grid="q3_k"), 0)
MIRRORED = replace(INTEGER, zeros=u8(2, 2, value=7))
EIGHT = replace(INTEGER, zeros=u8(2, 2, value=8))
# 1.0009765625 * 15 needs 12 significant bits; 8190 * 9 is beyond fp16
ROUNDED = replace(INTEGER, scales=f16(2, 2, value=1 + 2.0**-10), zeros=u8(2, 2, value=15))
HUGE = replace(INTEGER, scales=f16(2, 2, value=8190), zeros=u8(2, 2, value=9))

EXACT, INEXACT = Fidelity.EXACT, Fidelity.ROUNDED
MIRROR = "stored code is q - z + 8; for z = 7 it is 15 - q, and d = -scale"


def judged(weight: QuantizedWeight, requested: Any) -> Encoding:
    """The planner's decision on a weight named w."""
    return choose_encoding(Subject.of(replace(weight, name="w")), requested)


CHOICES = [
    (NONE, "auto", "Q4_0", EXACT, "stored code is q - z + 8"),
    (THREE, "auto", "Q4_0", EXACT, "stored code is q - z + 8"),
    (EIGHT, "auto", "Q4_0", EXACT, MIRROR),
    (MIRRORED, "Q4_0", "Q4_0", EXACT, MIRROR),
    (INTEGER, "auto", "Q4_1", EXACT, "every scale * zero is an fp16 number"),
    (NONE, "Q4_1", "Q4_1", EXACT, "every scale * zero is an fp16 number"),
    (FLOAT, "auto", "Q4_1", EXACT, "d = scale, m = the trained min"),
    (FLOAT, "Q4_1", "Q4_1", EXACT, "d = scale, m = the trained min"),
    (ROUNDED, "Q4_1", "Q4_1", INEXACT, "scale * zero is not an fp16 number in 4 of 4 groups"),
    (ROUNDED, "auto", "Q5_0", EXACT, "not Q4_1: scale * zero is not an fp16 number in 4 of 4 groups"),
    (HUGE, "auto", "Q5_0", EXACT, "not Q4_1: scale * zero is not an fp16 number in 4 of 4 groups"),
    (INTEGER, "Q5_0", "Q5_0", EXACT, "stored code is q - z + 16"),
    (Q4_K, "auto", "Q4_K", EXACT, "scales and mins as trained"),
    (Q4_K, "Q4_K", "Q4_K", EXACT, "scales and mins as trained"),
    (Q4_K_NONE, "auto", "Q4_K", EXACT, "dmin = 8 d, mn = sc"),
    (INTEGER, "Q4_K", "Q4_K", EXACT, "dmin = d, mn = z"),
    (Q3_K, "auto", "Q3_K", EXACT, "d and sc as trained"),
    (TWO, "Q3_K", "Q3_K", EXACT, "d and sc as trained"),
    (TWO, "auto", "Q4_0", EXACT, "stored code is q - z + 8"),
    (Q3_K, "F32", "F32", EXACT, "dequantized on request"),
    (FLOAT, "F32", "F32", EXACT, "dequantized on request"),
]


@pytest.mark.parametrize(("weight", "requested", "name", "fidelity", "reason"), CHOICES)
def test_choices(weight: QuantizedWeight, requested: str, name: str, fidelity: Fidelity, reason: str) -> None:
    """The whole of the plan's entry."""
    assert judged(weight, requested) == Encoding(name=name, fidelity=fidelity, reason=reason)


def test_choices_decode_to_the_weight() -> None:
    """gguf-py reads what is called exact as the weight itself; the one that rounds is off."""
    for weight, _, name, fidelity, _ in CHOICES:
        decoded = gguf.quants.dequantize(encode(weight, name), gguf.GGMLQuantizationType[name])
        assert np.array_equal(decoded, weight.dequantize()) == (fidelity is EXACT), name


OFF = ("in_features 64 is no multiple of 256", "a K grid, or groups of whole superblocks", "use --gguf-type auto")
SUPER = "groups of 64 columns are on the fp16 grid, not on a K grid or in multiples of 256"
REFUSALS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: judged(INTEGER, "Q4_0"),
        message(
            "Q4_0 cannot hold these zero-points", "w", "4-bit codes with integer zero-points",
            "zero-points 7 and 8 only, or at most 3 bits with integer zero-points",
            "use --gguf-type auto, which takes Q4_1 or Q5_0",
        ),
    ),
    (
        lambda: judged(HUGE, "Q4_1"),
        message("Q4_1 cannot hold these zero-points: scale * zero overflows fp16", "w", do="use --gguf-type Q5_0"),
    ),
    (
        lambda: judged(FLOAT, "Q5_0"),
        message(
            "Q5_0 has no min, so it cannot hold float zero-points", "w", do="use --gguf-type auto, which takes Q4_1"
        ),
    ),
    (lambda: judged(SHORT, "Q4_K"), message("Q4_K cannot hold these scales", "w", *OFF)),
    (lambda: judged(SHORT, "Q3_K"), message("Q3_K cannot hold these scales", "w", *OFF)),
    (lambda: judged(THREE, "Q4_K"), message("Q4_K cannot hold these scales", "w", SUPER, *OFF[1:])),
    (
        lambda: judged(replace(NONE, scales=f16(2, 2, value=8190)), "Q4_K"),
        message(
            "Q4_K cannot hold these scales: 2**(bits-1) * scale overflows fp16", "w",
            do="use --gguf-type auto, or F32 if they are on the K grid",
        ),
    ),
    (
        lambda: judged(NONE, "Q3_K"),
        message(
            "Q3_K holds symmetric codes of at most 3 bits", "w", "4-bit codes with zero-point none",
            do="use --gguf-type auto",
        ),
    ),
    (
        lambda: judged(random_weight((2, 256), QuantConfig(bits=3, zero_point="integer", group_size=256), 0), "Q3_K"),
        message(
            "Q3_K holds symmetric codes of at most 3 bits", "w", "3-bit codes with zero-point integer",
            do="use --gguf-type auto",
        ),
    ),
    (
        lambda: judged(Q4_K, "Q4_1"),
        message(
            "Q4_1 has one fp16 scale per block; the scales of q4_k are fp16 numbers times integers", "w",
            expected="Q4_K, or F32", do="use --gguf-type auto",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_refusals(case: int) -> None:
    """The whole message."""
    action, expected = REFUSALS[case]
    with pytest.raises(UnsupportedError) as caught:
        action()
    assert str(caught.value) == expected


def test_what_is_known_of_a_weight() -> None:
    """Name, sizes and grid, and the weight itself when it is asked for."""
    subject = Subject.of(replace(Q4_K, name="w"))
    expected = WeightInfo(out_features=2, in_features=256, bits=4, group_size=32, zero_point="float", k_grid="q4_k")
    assert (subject.name, subject.info) == ("w", expected)
    assert np.array_equal(subject.read().scales, Q4_K.scales)


def test_bytes_of_an_encoding() -> None:
    """What the plan counts is what is written; no row is cut."""
    cases = ((NONE, "Q4_0"), (INTEGER, "Q4_1"), (INTEGER, "Q5_0"), (NONE, "F32"), (Q4_K, "Q4_K"), (Q3_K, "Q3_K"))
    for weight, name in cases:
        counted = encoded_nbytes(weight.shape, name)
        assert type(counted) is int
        assert counted == encode(weight, name).nbytes


def test_zero_points_that_q4_0_holds() -> None:
    """All of 7 and 8, at 4 bits; anything but float mins below."""
    assert [fits_q4_0(Subject.of(weight)) for weight in (NONE, TWO, THREE, EIGHT, MIRRORED)] == [True] * 5
    for other in (6, 9):
        zeros = u8(2, 2, value=8)
        zeros[1, 1] = other
        assert not fits_q4_0(Subject.of(replace(INTEGER, zeros=zeros)))
    assert not fits_q4_0(Subject.of(FLOAT))
    assert type(fits_q4_0(Subject.of(EIGHT))) is bool
    three = random_weight((2, 512), QuantConfig(bits=3, zero_point="float", group_size=64), 0)
    assert not fits_q4_0(Subject.of(three))


def test_mins_of_groups() -> None:
    """-z * s rounded to fp16 once, and in how many groups it had to be."""
    scales = f16(2, 2)
    scales[1, 1] = 1 + 2.0**-10
    mins, inexact = block_mins(replace(INTEGER, scales=scales, zeros=u8(2, 2, value=15)))
    assert (mins.dtype.name, type(inexact), inexact) == ("float16", int, 1)
    assert mins.tolist() == [[-15, -15], [-15, -15.015625]]
    assert block_mins(FLOAT)[0] is FLOAT.mins
    assert block_mins(FLOAT)[1] == 0
    assert np.isneginf(block_mins(HUGE)[0]).all()


def info(**changes: Any) -> WeightInfo:
    """Facts of a layer."""
    kept: dict[str, Any] = {"bits": 4, "group_size": 256, "zero_point": "none", "k_grid": None}
    return WeightInfo(out_features=2, **{"in_features": 512, **kept, **changes})


def test_layers_off_the_superblocks() -> None:
    """Rows of whole superblocks, and one scale for each or a K grid."""
    assert off_superblocks(info()) == off_superblocks(info(group_size=512)) == ""
    assert off_superblocks(info(group_size=32, k_grid="q4_k")) == ""
    assert off_superblocks(info(in_features=384)) == "in_features 384 is no multiple of 256"
    assert off_superblocks(info(in_features=384, k_grid="q4_k")) == "in_features 384 is no multiple of 256"
    assert off_superblocks(info(group_size=64)) == SUPER


def test_superblock_numbers() -> None:
    """d, sc, dmin and mn of each kind of weight; groups of several superblocks repeat theirs."""
    wide = random_weight((2, 1024), QuantConfig(bits=3, group_size=512), 0)
    numbers = q4_k_numbers(wide)
    assert np.array_equal(numbers.scales, np.repeat(wide.scales, 2, axis=1))
    assert np.array_equal(numbers.mins, np.repeat(wide.scales, 2, axis=1) * np.float16(4))
    assert numbers.sub_scales.tolist() == numbers.sub_mins.tolist() == [[1] * 32] * 2
    assert [part.dtype.name for part in numbers] == ["float16", "uint8"] * 2
    own = q4_k_numbers(INTEGER)
    assert INTEGER.zeros is not None
    assert np.array_equal(own.mins, INTEGER.scales)
    assert np.array_equal(own.sub_mins, np.repeat(INTEGER.zeros, 8, axis=1))
    free = q4_k_numbers(FLOAT)
    assert FLOAT.mins is not None
    assert np.array_equal(free.mins, -FLOAT.mins)
    assert free.sub_mins.tolist() == free.sub_scales.tolist() == [[1] * 16] * 2
    trained = q4_k_numbers(Q4_K)
    assert (trained.sub_scales is Q4_K.sub_scales, trained.sub_mins is Q4_K.sub_mins) == (True, True)
    assert np.isinf(q4_k_numbers(replace(NONE, scales=f16(2, 2, value=8190))).mins).all()
