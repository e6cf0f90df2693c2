"""What packers say of what they refuse, word for word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from exporters.awq.pack import pack_awq
from exporters.compressed_tensors.pack import unpack_codes, unpack_zeros
from exporters.gguf import pack, pack_k
from exporters.onnx.pack import _group_bias as group_bias
from exporters.onnx.pack import choose_block, unpack_uint4
from l4q.config import QuantConfig
from l4q.errors import L4QError
from runtime_tests.error_texts import f16, message, u8
from runtime_tests.random_models import random_weight

INTEGER = random_weight((2, 64), QuantConfig(zero_point="integer", group_size=32), 0)

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "awq": (
        lambda: pack_awq(u8(2, 12)),
        message("a packed axis must fill whole words", got="12 values", expected="multiple of 8"),
    ),
    "ct codes": (
        lambda: unpack_codes(np.zeros((2, 2), np.int32), 4, 17),
        message("packed words are cut off", got="16 values", expected="at least 17"),
    ),
    "ct zeros": (
        lambda: unpack_zeros(np.zeros((2, 2), np.int32), 3, 33),
        message("packed words are cut off", got="21 values", expected="at least 33"),
    ),
    "gguf blocks": (
        lambda: pack.pack_q4_0(u8(2, 33), f16(2, 1)),
        message("codes do not fill blocks", got="(2, 33)", expected="[rows, a multiple of 32]"),
    ),
    "gguf ndim": (
        lambda: pack.pack_q4_0(u8(32), f16(2, 1)),
        message("codes do not fill blocks", got="(32,)", expected="[rows, a multiple of 32]"),
    ),
    "gguf range": (
        lambda: pack.pack_q4_0(u8(2, 32, value=16), f16(2, 1)),
        message("code out of range", got="16", expected="values below 16"),
    ),
    "gguf range5": (
        lambda: pack.pack_q5_0(u8(2, 32, value=32), f16(2, 1)),
        message("code out of range", got="32", expected="values below 32"),
    ),
    "gguf range1": (
        lambda: pack.pack_q4_1(u8(2, 32, value=16), f16(2, 1), f16(2, 1)),
        message("code out of range", got="16", expected="values below 16"),
    ),
    "gguf scales": (
        lambda: pack.pack_q4_0(u8(2, 96), f16(2, 2)),
        message(
            "group parameters do not match the codes",
            got="float16 (2, 2)",
            expected="float16 [2, a divisor of 3 blocks]",
        ),
    ),
    "gguf scales rows": (
        lambda: pack.pack_q4_0(u8(2, 96), f16(1, 3)),
        message(
            "group parameters do not match the codes",
            got="float16 (1, 3)",
            expected="float16 [2, a divisor of 3 blocks]",
        ),
    ),
    "gguf scales dtype": (
        lambda: pack.pack_q4_0(u8(2, 96), np.ones((2, 3), np.float32)),
        message(
            "group parameters do not match the codes",
            got="float32 (2, 3)",
            expected="float16 [2, a divisor of 3 blocks]",
        ),
    ),
    "gguf scales ndim": (
        lambda: pack.pack_q4_0(u8(2, 96), f16(2)),
        message(
            "group parameters do not match the codes", got="float16 (2,)", expected="float16 [2, a divisor of 3 blocks]"
        ),
    ),
    "gguf split": (
        lambda: pack.unpack_q4_0(u8(2, 19)),
        message("not whole blocks", got="(2, 19)", expected="[rows, a multiple of 18 bytes]"),
    ),
    "gguf split ndim": (
        lambda: pack.unpack_q4_1(u8(20)),
        message("not whole blocks", got="(20,)", expected="[rows, a multiple of 20 bytes]"),
    ),
    "k blocks": (
        lambda: pack_k.pack_q3_k(u8(2, 255), f16(2, 1), u8(2, 16)),
        message("codes do not fill superblocks", got="uint8 (2, 255)", expected="uint8 [rows, a multiple of 256]"),
    ),
    "k blocks dtype": (
        lambda: pack_k.pack_q3_k(np.ones((2, 256), np.int8), f16(2, 1), u8(2, 16)),
        message("codes do not fill superblocks", got="int8 (2, 256)", expected="uint8 [rows, a multiple of 256]"),
    ),
    "k blocks ndim": (
        lambda: pack_k.pack_q3_k(u8(256), f16(2, 1), u8(2, 16)),
        message("codes do not fill superblocks", got="uint8 (256,)", expected="uint8 [rows, a multiple of 256]"),
    ),
    "k range": (
        lambda: pack_k.pack_q3_k(u8(2, 256, value=8), f16(2, 1), u8(2, 16)),
        message("code out of range", got="8", expected="values below 8"),
    ),
    "k range4": (
        lambda: pack_k.pack_q4_k(u8(2, 256, value=16), f16(2, 1), u8(2, 8), f16(2, 1), u8(2, 8)),
        message("code out of range", got="16", expected="values below 16"),
    ),
    "k integers shape": (
        lambda: pack_k.pack_q3_k(u8(2, 256), f16(2, 1), u8(2, 8)),
        message("group integers do not match the codes", got="uint8 (2, 8)", expected="uint8 (2, 16)"),
    ),
    "k integers dtype": (
        lambda: pack_k.pack_q3_k(u8(2, 256), f16(2, 1), np.ones((2, 16), np.int8)),
        message("group integers do not match the codes", got="int8 (2, 16)", expected="uint8 (2, 16)"),
    ),
    "k integers range": (
        lambda: pack_k.pack_q3_k(u8(2, 256), f16(2, 1), u8(2, 16, value=32)),
        message("group integer out of range", got="32", expected="values below 32"),
    ),
    "k4 integers": (
        lambda: pack_k.pack_q4_k(u8(2, 256), f16(2, 1), u8(2, 8, value=64), f16(2, 1), u8(2, 8)),
        message("group integer out of range", got="64", expected="values below 64"),
    ),
    "k4 mins integers": (
        lambda: pack_k.pack_q4_k(u8(2, 256), f16(2, 1), u8(2, 8), f16(2, 1), u8(2, 8, value=64)),
        message("group integer out of range", got="64", expected="values below 64"),
    ),
    "k4 mins shape": (
        lambda: pack_k.pack_q4_k(u8(2, 256), f16(2, 1), u8(2, 8), f16(2, 1), u8(2, 16)),
        message("group integers do not match the codes", got="uint8 (2, 16)", expected="uint8 (2, 8)"),
    ),
    "k halves": (
        lambda: pack_k.pack_q3_k(u8(2, 256), f16(2, 2), u8(2, 16)),
        message("superblock numbers do not match the codes", got="float16 (2, 2)", expected="float16 (2, 1)"),
    ),
    "k halves dtype": (
        lambda: pack_k.pack_q3_k(u8(2, 256), np.ones((2, 1), np.float32), u8(2, 16)),
        message("superblock numbers do not match the codes", got="float32 (2, 1)", expected="float16 (2, 1)"),
    ),
    "k split": (
        lambda: pack_k.unpack_q4_k(u8(2, 145)),
        message("not whole superblocks", got="(2, 145)", expected="[rows, a multiple of 144 bytes]"),
    ),
    "k split ndim": (
        lambda: pack_k.unpack_q3_k(u8(110)),
        message("not whole superblocks", got="(110,)", expected="[rows, a multiple of 110 bytes]"),
    ),
    "onnx length": (
        lambda: unpack_uint4(u8(3), (7,)),
        message("packed 4-bit array has the wrong length", got="3", expected="4 bytes"),
    ),
    "onnx requested": (
        lambda: choose_block(in_features=128, group_size=64, requested=24, where="w"),
        message(
            "unusable ONNX block size",
            where="onnx_block_size",
            got="24",
            expected="a power of two from 16 to 256",
            do="leave it out, or choose a divisor of the group size 64",
        ),
    ),
    "onnx divides": (
        lambda: choose_block(in_features=128, group_size=64, requested=128, where="w"),
        message(
            "the ONNX block size does not divide the group size",
            where="w",
            got="block 128, group_size 64",
            expected="a power of two from 16 to 64",
            do="leave onnx_block_size out to use the largest block that fits",
        ),
    ),
    "onnx group": (
        lambda: choose_block(in_features=48, group_size=24, requested=None, where="w"),
        message(
            "the group size has no block that ONNX Runtime fuses",
            where="w",
            got="group_size 24",
            expected="a multiple of 16, or one group per row",
            do="train with a group size that is a multiple of 32",
        ),
    ),
    "onnx bias": (
        lambda: group_bias(replace(INTEGER, name="w"), 8),
        message("only a float zero-point has a group bias", where="w", got="integer"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals_say_everything(case: str) -> None:
    """What, where, what was found, what was expected, what to do: the whole text."""
    action, expected = CASES[case]
    with pytest.raises(L4QError) as caught:
        action()
    assert str(caught.value) == expected
