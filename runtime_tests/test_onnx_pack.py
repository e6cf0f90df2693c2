"""ONNX packing against onnx's own reference evaluator, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from exporters.onnx.pack import (
    block_rows,
    choose_block,
    float_center,
    int4_bits,
    pack_linear,
    pack_uint4,
    unpack_uint4,
)
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.weight import QuantizedWeight
from runtime_tests.onnx_models import corrupted, random_weight

ZERO_POINTS = ("none", "integer", "float")


def decode(weight: QuantizedWeight, block: int) -> np.ndarray:
    """Pack, then let onnx read the raw bytes and dequantize: float32 [out, in]."""
    packed = pack_linear(weight, block)
    kind = TensorProto.INT4 if packed.signed else TensorProto.UINT4
    rows, columns = weight.in_features, weight.out_features
    tensors = [
        helper.make_tensor("w", kind, (rows, columns), packed.weight.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, packed.scales.shape, packed.scales.tobytes(), raw=True),
    ]
    if packed.zeros is not None:
        tensors.append(helper.make_tensor("z", kind, packed.scales.shape, packed.zeros.tobytes(), raw=True))
    node = helper.make_node("DequantizeLinear", [t.name for t in tensors], ["y"], axis=0, block_size=block)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, columns))
    graph = helper.make_graph([node], "dequantize", [], [output], initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    (values,) = map(np.asarray, ReferenceEvaluator(model).run(None, {}))
    if packed.group_bias is not None:
        values = values + np.repeat(packed.group_bias, weight.group_size, axis=0)
    return values.T


def equal_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Same float32 bytes; +0 and -0 differ."""
    assert left.dtype == right.dtype == np.float32
    return np.array_equal(np.ascontiguousarray(left).view(np.uint32), np.ascontiguousarray(right).view(np.uint32))


@given(st.lists(st.integers(0, 15), max_size=70))
def test_pack_uint4_round_trips(values: list[int]) -> None:
    """Unpacking undoes packing for every code and every length, odd ones included."""
    array = np.array(values, dtype=np.uint8)
    assert np.array_equal(unpack_uint4(pack_uint4(array), array.shape), array)


def test_pack_uint4_golden_bytes() -> None:
    """Low nibble first over the flattened array: rows of odd length share a byte, the last high nibble is 0."""
    codes = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 15]], dtype=np.uint8)
    assert pack_uint4(codes).tobytes() == bytes([0x21, 0x43, 0x65, 0x87, 0x0F])


def test_unpack_uint4_refuses_a_wrong_length() -> None:
    """A byte count that does not belong to the shape is an error with both numbers."""
    with pytest.raises(UsageError, match=r"(?s)got: 3.*expected: 2 bytes"):
        unpack_uint4(np.zeros(3, dtype=np.uint8), (2, 2))


def test_int4_bits_golden() -> None:
    """Codes become two's complement nibbles around the middle of their own range."""
    codes = np.array([0, 1, 7, 8, 15], dtype=np.uint8)
    assert int4_bits(codes, 4).tolist() == [0x8, 0x9, 0xF, 0x0, 0x7]
    assert int4_bits(np.array([0, 3, 4, 7], dtype=np.uint8), 3).tolist() == [0xC, 0xF, 0x0, 0x3]


def test_pack_linear_golden_bytes() -> None:
    """A 2 x 32 weight: transposed to [K, N], so neighbouring nibbles are neighbouring rows of the checkpoint."""
    codes = np.stack([np.arange(32) % 16, np.full(32, 15)]).astype(np.uint8)  # [out 2, in 32]
    weight = QuantizedWeight(
        codes=codes,
        scales=np.array([[0.5], [0.25]], dtype=np.float16),
        zeros=np.array([[3], [12]], dtype=np.uint8),
        bits=4,
        group_size=32,
    )
    packed = pack_linear(weight, 16)
    assert packed.weight.tobytes() == bytes(0xF0 | k % 16 for k in range(32))
    assert packed.scales.tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert packed.zeros is not None
    assert packed.zeros.tobytes() == bytes([0xC3, 0xC3])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 48, 64, 96, 160]),
    bits=st.sampled_from([2, 3, 4]),
    zero_point=st.sampled_from(ZERO_POINTS),
    fine=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_packed_bytes_decode_to_the_weight(
    rows: int, groups: int, group_size: int, bits: int, zero_point: str, fine: bool, seed: int
) -> None:
    """The reference evaluator reads back exactly what the checkpoint dequantizes to, on every grid and block size."""
    quant = QuantConfig.from_dict({"bits": bits, "group_size": 32, "zero_point": zero_point})
    weight = random_weight((rows, groups * group_size), quant, seed, group_size=group_size)
    block = choose_block(
        in_features=weight.in_features, group_size=group_size, requested=16 if fine else None, where="w"
    )
    assert equal_bits(decode(weight, block), weight.dequantize())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("columns", [7, 24, 341, 576])
def test_rows_of_any_length_decode_exactly(columns: int, zero_point: str) -> None:
    """One group per row needs no divisor: the last block may be short."""
    quant = QuantConfig.from_dict({"bits": 4, "group_size": -1, "zero_point": zero_point})
    weight = random_weight((5, columns), quant, seed=columns)
    for requested in (None, 16, 256):
        block = choose_block(in_features=columns, group_size=columns, requested=requested, where="w")
        assert equal_bits(decode(weight, block), weight.dequantize())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("fault", ["nibble", "scale", "row swap"])
def test_a_corrupted_weight_is_detected(fault: str, zero_point: str) -> None:
    """The bit-for-bit comparison fails for one flipped code bit, one wrong scale and two swapped rows."""
    quant = QuantConfig.from_dict({"bits": 4, "group_size": 32, "zero_point": zero_point})
    weight = random_weight((6, 64), quant, seed=1)
    assert not equal_bits(decode(corrupted(weight)[fault], 32), weight.dequantize())


def test_a_shifted_zero_point_is_detected() -> None:
    """One zero-point off by one changes the decoded group."""
    weight = random_weight((6, 64), QuantConfig(bits=4, group_size=32, zero_point="integer"), seed=1)
    assert weight.zeros is not None
    zeros = weight.zeros.copy()
    zeros[2, 1] = zeros[2, 1] - 1 if zeros[2, 1] > 1 else 2
    wrong = QuantizedWeight(codes=weight.codes, scales=weight.scales, zeros=zeros, bits=4, group_size=32)
    assert not equal_bits(decode(wrong, 32), weight.dequantize())


def test_float_weights_fall_back_to_code_zero_when_the_middle_would_round() -> None:
    """Where min + 8 * scale needs more than 24 bits, codes stay unsigned and the bias is the min itself: exact."""
    weight = QuantizedWeight(
        codes=np.arange(32, dtype=np.uint8).reshape(1, 32) % 16,
        scales=np.array([[6e-8]], dtype=np.float16),
        mins=np.array([[-1001.5]], dtype=np.float16),
        bits=4,
        group_size=32,
    )
    assert float_center(weight) == 0
    assert equal_bits(decode(weight, 32), weight.dequantize())


@pytest.mark.parametrize(
    ("group_size", "expected"), [(32, 32), (48, 16), (64, 64), (80, 16), (96, 32), (256, 256), (1024, 256)]
)
def test_block_is_the_largest_power_of_two_in_the_group(group_size: int, expected: int) -> None:
    """Blocks divide the group and stay between 16 and 256."""
    assert choose_block(in_features=4 * group_size, group_size=group_size, requested=None, where="w") == expected


@pytest.mark.parametrize("requested", [8, 24, 512, 0, -32])
def test_block_sizes_that_never_fuse_are_refused(requested: int) -> None:
    """Only powers of two from 16 to 256 reach MatMulNBits."""
    with pytest.raises(UsageError, match="a power of two from 16 to 256"):
        choose_block(in_features=128, group_size=64, requested=requested, where="w")


def test_a_block_that_does_not_divide_is_refused() -> None:
    """The error names the module, both sizes and what would fit."""
    with pytest.raises(UsageError, match=r"(?s)does not divide.*mlp\.up.*block 128, group_size 64.*from 16 to 64"):
        choose_block(in_features=128, group_size=64, requested=128, where="mlp.up")


def test_groups_no_block_divides_are_refused() -> None:
    """A group of 24 columns cannot be written so that it fuses."""
    with pytest.raises(UnsupportedError, match=r"(?s)the group size has no block that ONNX Runtime fuses.*size 24"):
        choose_block(in_features=48, group_size=24, requested=None, where="w")


def test_block_rows_repeats_and_transposes() -> None:
    """Two groups of 64 as blocks of 32: each group's value twice, [out, groups] to [blocks, out]."""
    groups = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.uint8)
    rows = block_rows(groups, in_features=128, block=32)
    assert rows.tolist() == [[1, 3, 5], [1, 3, 5], [2, 4, 6], [2, 4, 6]]
