"""What weights say of what they refuse, word for word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from l4q.config import QuantConfig
from l4q.errors import L4QError
from l4q.packed_weight import PackedWeight
from l4q.weight import GroupParameters, QuantizedWeight
from runtime_tests.error_texts import f16, message, u8
from runtime_tests.random_models import random_weight

DAMAGED = "the file is damaged or was not written by l4q; write the checkpoint again"
INTEGER = random_weight((2, 64), QuantConfig(zero_point="integer", group_size=32), 0)
FLOAT = random_weight((2, 64), QuantConfig(zero_point="float", group_size=32), 0)
Q4_K = random_weight((2, 256), QuantConfig(zero_point="float", group_size=32, scale_grid="q4_k"), 0)
Q3_K = random_weight((2, 256), QuantConfig(bits=3, group_size=16, scale_grid="q3_k"), 0)


def weight(field: str, got: str, expected: str) -> str:
    """The message of a weight named w."""
    return message(f"invalid quantized weight: {field}", f"w.{field}", got, expected, DAMAGED)


def changed(base: QuantizedWeight, **changes: Any) -> Callable[[], object]:
    """A weight named w with other fields."""
    return lambda: replace(base, **{"name": "w", **changes})


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "bits": (changed(INTEGER, bits=5), weight("bits", "5", "one of (2, 3, 4)")),
    "codes dtype": (
        changed(INTEGER, codes=INTEGER.codes.astype(np.int8)),
        weight("codes", "int8 (2, 64)", "uint8 [out_features, in_features]"),
    ),
    "codes ndim": (
        changed(INTEGER, codes=INTEGER.codes[0]),
        weight("codes", "uint8 (64,)", "uint8 [out_features, in_features]"),
    ),
    "codes none": (
        changed(INTEGER, codes=u8(0, 64)),
        weight("codes", "uint8 (0, 64)", "uint8 [out_features, in_features]"),
    ),
    "codes range": (changed(INTEGER, codes=u8(2, 64, value=16)), weight("codes", "[16, 16]", "[0, 15]")),
    "group size": (changed(INTEGER, group_size=48), weight("group_size", "48", "a divisor of in_features 64")),
    "group size 0": (changed(INTEGER, group_size=0), weight("group_size", "0", "a divisor of in_features 64")),
    "both": (changed(INTEGER, mins=f16(2, 2)), weight("zeros and mins", "both", "at most one of them")),
    "scales dtype": (
        changed(INTEGER, scales=np.ones((2, 2), np.float32)),
        weight("scales", "float32 (2, 2)", "float16 (2, 2)"),
    ),
    "scales shape": (changed(INTEGER, scales=f16(2, 3)), weight("scales", "float16 (2, 3)", "float16 (2, 2)")),
    "scales nan": (
        changed(INTEGER, scales=f16(2, 2, value=float("nan"))),
        weight("scales", "4 NaN or infinite values", "finite values"),
    ),
    "scales zero": (changed(INTEGER, scales=f16(2, 2, value=0)), weight("scales", "0.0", "positive values")),
    "zeros 0": (changed(INTEGER, zeros=u8(2, 2, value=0)), weight("zeros", "[0, 0]", "[1, 15]")),
    "zeros 16": (changed(INTEGER, zeros=u8(2, 2, value=16)), weight("zeros", "[16, 16]", "[1, 15]")),
    "zeros dtype": (changed(INTEGER, zeros=np.ones((2, 2), np.int8)), weight("zeros", "int8 (2, 2)", "uint8 (2, 2)")),
    "zeros shape": (changed(INTEGER, zeros=u8(2, 1)), weight("zeros", "uint8 (2, 1)", "uint8 (2, 2)")),
    "mins dtype": (
        changed(FLOAT, mins=np.ones((2, 2), np.float32)),
        weight("mins", "float32 (2, 2)", "float16 (2, 2)"),
    ),
    "mins inf": (
        changed(FLOAT, mins=f16(2, 2, value=float("inf"))),
        weight("mins", "4 NaN or infinite values", "finite values"),
    ),
    "mins shape": (changed(FLOAT, mins=f16(1, 2)), weight("mins", "float16 (1, 2)", "float16 (2, 2)")),
    "sub mins alone": (
        changed(FLOAT, sub_mins=u8(2, 2)),
        weight("sub_mins", "sub_mins without sub_scales and mins, or the reverse", "all three or none"),
    ),
    "no sub mins": (
        changed(Q4_K, sub_mins=None),
        weight("sub_mins", "sub_mins without sub_scales and mins, or the reverse", "all three or none"),
    ),
    "sub_mins without mins": (
        changed(Q4_K, mins=None),
        weight("sub_mins", "sub_mins without sub_scales and mins, or the reverse", "all three or none"),
    ),
    "k mins": (
        changed(Q4_K, mins=f16(2, 1, value=2.0**-24)),
        weight("mins", "values above 0", "values <= 0 on a K grid"),
    ),
    "k grid group": (
        changed(Q4_K, group_size=64),
        weight(
            "sub_scales",
            "4 bits in groups of 64, in_features 256",
            "4 bits in groups of 32; 3 bits in groups of 16; in_features a multiple of 256",
        ),
    ),
    "k grid bits": (
        changed(Q4_K, bits=2, codes=u8(2, 256)),
        weight(
            "sub_scales",
            "2 bits in groups of 32, in_features 256",
            "4 bits in groups of 32; 3 bits in groups of 16; in_features a multiple of 256",
        ),
    ),
    "k grid columns": (
        changed(Q4_K, codes=u8(2, 128), sub_scales=u8(2, 4), sub_mins=u8(2, 4)),
        weight(
            "sub_scales",
            "4 bits in groups of 32, in_features 128",
            "4 bits in groups of 32; 3 bits in groups of 16; in_features a multiple of 256",
        ),
    ),
    "k zero point": (
        changed(Q3_K, mins=f16(2, 1, value=-1), sub_mins=u8(2, 16)),
        weight("zero_point", "float", "one of ('none',) on this K grid"),
    ),
    "k sub_scales 0": (changed(Q4_K, sub_scales=u8(2, 8, value=0)), weight("sub_scales", "[0, 0]", "[1, 63]")),
    "k sub_scales 64": (changed(Q4_K, sub_scales=u8(2, 8, value=64)), weight("sub_scales", "[64, 64]", "[1, 63]")),
    "k3 sub_scales 32": (changed(Q3_K, sub_scales=u8(2, 16, value=32)), weight("sub_scales", "[32, 32]", "[1, 31]")),
    "k sub_scales dtype": (
        changed(Q4_K, sub_scales=np.ones((2, 8), np.int8)),
        weight("sub_scales", "int8 (2, 8)", "uint8 (2, 8)"),
    ),
    "k sub_mins 64": (changed(Q4_K, sub_mins=u8(2, 8, value=64)), weight("sub_mins", "[64, 64]", "[0, 63]")),
    "k sub_mins shape": (changed(Q4_K, sub_mins=u8(2, 4)), weight("sub_mins", "uint8 (2, 4)", "uint8 (2, 8)")),
    "k scales shape": (changed(Q4_K, scales=f16(2, 8)), weight("scales", "float16 (2, 8)", "float16 (2, 1)")),
    "no name": (
        changed(INTEGER, bits=5, name=""),
        message("invalid quantized weight: bits", where="bits", got="5", expected="one of (2, 3, 4)", do=DAMAGED),
    ),
    "parameters": (
        lambda: GroupParameters(scales=f16(2, 2), bits=5, group_size=32, name="w"),
        weight("bits", "5", "one of (2, 3, 4)"),
    ),
    "packed": (
        lambda: replace(PackedWeight.of(INTEGER), packed=u8(2, 31), name="w"),
        weight("codes", "uint8 (2, 31)", "uint8 (2, 32)"),
    ),
    "packed dtype": (
        lambda: replace(PackedWeight.of(INTEGER), packed=np.zeros((2, 32), np.int8), name="w"),
        weight("codes", "int8 (2, 32)", "uint8 (2, 32)"),
    ),
    "float zeros": (
        lambda: replace(FLOAT, name="w").integer_zeros(),
        message(
            "a float zero-point has no integer form",
            where="w",
            expected="zero_point none or integer",
            do="export to GGUF Q4_1, or train with --zero-point integer",
        ),
    ),
    "float zeros no name": (
        FLOAT.integer_zeros,
        message(
            "a float zero-point has no integer form",
            expected="zero_point none or integer",
            do="export to GGUF Q4_1, or train with --zero-point integer",
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals_say_everything(case: str) -> None:
    """What, where, what was found, what was expected, what to do: the whole text."""
    action, expected = CASES[case]
    with pytest.raises(L4QError) as caught:
        action()
    assert str(caught.value) == expected


def test_the_ends_of_the_ranges_are_taken() -> None:
    """The least and the greatest of every field."""
    for bits in (2, 3, 4):
        top = (1 << bits) - 1
        for code, zero in ((0, 1), (top, top)):
            changed(INTEGER, bits=bits, codes=u8(2, 64, value=code), zeros=u8(2, 2, value=zero))()
    for value in (2.0**-24, 65504.0):
        changed(FLOAT, scales=f16(2, 2, value=value), mins=f16(2, 2, value=-value))()
        changed(FLOAT, mins=f16(2, 2, value=value))()
    for sub_scale, sub_min, least in ((1, 0, 0.0), (63, 63, -65504.0)):
        sub_scales, sub_mins = u8(2, 8, value=sub_scale), u8(2, 8, value=sub_min)
        changed(Q4_K, sub_scales=sub_scales, sub_mins=sub_mins, mins=f16(2, 1, value=least))()
    changed(Q3_K, sub_scales=u8(2, 16, value=31))()
