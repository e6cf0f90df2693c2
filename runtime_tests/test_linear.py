"""L4QLinear's gradients and memory, against autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from l4q.base import dense_base
from l4q.config import LoraConfig, QuantConfig
from l4q.linear import L4QFunction, L4QLinear
from l4q.quant import StraightThrough, snap_scales

BITS = (2, 3, 4)
KINDS = ("none", "integer", "float")


def clipped_layer(bits: int, kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> L4QLinear:
    """A 24 x 64 layer, two groups a row, about a quarter of the weights clipped, b and B not zero."""
    torch.manual_seed(seed)
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind)  # type: ignore[arg-type]
    layer = L4QLinear.from_linear(nn.Linear(64, 24, bias=False, dtype=dtype), quant, LoraConfig(rank=3, alpha=2.0))
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.02)
        layer.scales.mul_(0.55 + 0.15 * torch.rand_like(layer.scales))
        if kind != "none":
            layer.offsets.copy_(0.8 * torch.randn_like(layer.offsets) * layer.scales)
    return layer


def reference_weight(layer: L4QLinear) -> torch.Tensor:
    """The paper's equations 7-10 written with clamp and straight-through rounding; autograd differentiates them."""
    quant = layer.quant
    low, high = -(2 ** (quant.bits - 1)), 2 ** (quant.bits - 1) - 1
    scales = StraightThrough.apply(layer.scales, snap_scales(layer.scales, quant.scale_grid))
    if quant.zero_point == "none":
        offsets = torch.zeros_like(scales)
    elif quant.zero_point == "integer":
        steps = layer.offsets / scales
        snapped = steps.detach().round().clamp(-high, -low - 1)
        offsets = StraightThrough.apply(steps, snapped) * scales
    else:
        mins = layer.offsets + low * scales
        offsets = StraightThrough.apply(mins, mins.detach().half().to(mins.dtype)) - low * scales
    merged = dense_base(layer.weight) + layer.lora.scaling * layer.lora_B @ layer.lora_A
    grouped = merged.view(*scales.shape, -1)
    position = (grouped - offsets.unsqueeze(-1)) / scales.unsqueeze(-1)
    clamped = position.clamp(low, high)
    codes = StraightThrough.apply(clamped, clamped.detach().round())
    return (codes * scales.unsqueeze(-1) + offsets.unsqueeze(-1)).view_as(layer.weight)


def gradients(layer: L4QLinear, x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Gradients of a fixed random projection of the output."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    (y * weights).sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 5, 64), (2, 3, 2, 64)])
def test_gradients_equal_autograd(bits: int, kind: str, shape: tuple[int, ...]) -> None:
    """Forward and all gradients equal autograd through clamp + straight-through rounding to 1e-12 in float64."""
    layer = clipped_layer(bits, kind)
    x = torch.randn(shape, dtype=torch.float64)
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda value: F.linear(value, reference_weight(layer)))
    assert torch.allclose(layer(x), F.linear(x, reference_weight(layer)), rtol=0, atol=1e-12)
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        assert float((gradient - theirs[name]).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("bits", BITS)
def test_a_quarter_is_clipped(bits: int) -> None:
    """The layer of these tests really exercises the clamp: 10 to 45 % of its weights are outside."""
    layer = clipped_layer(bits, "float")
    params = layer.grid()
    merged = dense_base(layer.weight) + layer.lora.scaling * layer.lora_B @ layer.lora_A
    position = (merged.view(24, 2, 32) - params.mins.unsqueeze(-1)) / params.scales.unsqueeze(-1)
    outside = ((position < 0) | (position > layer.quant.max_code)).double().mean()
    assert 0.10 < outside < 0.45


@pytest.mark.parametrize("bits", BITS)
def test_a_wrong_mask_is_noticed(bits: int) -> None:
    """The twin: gradients without the straight-through mask differ from autograd's, so the comparison can fail."""
    layer = clipped_layer(bits, "none")
    x = torch.randn(7, 64, dtype=torch.float64)
    right = gradients(layer, x, layer)["lora_A"]

    def unmasked(value: torch.Tensor) -> torch.Tensor:
        merged = dense_base(layer.weight) + layer.lora.scaling * layer.lora_B @ layer.lora_A
        return F.linear(value, StraightThrough.apply(merged, layer.quantized_weight()))

    wrong = gradients(layer, x, unmasked)["lora_A"]
    assert float((right - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_finite_differences_outside_the_range(bits: int) -> None:
    """Where every weight is clipped the function is smooth in s and m; central differences match (eqs 19 and 21)."""
    torch.manual_seed(1)
    weight = torch.where(torch.rand(6, 64, dtype=torch.float64) < 0.5, -9.0, 9.0)
    x = torch.randn(5, 64, dtype=torch.float64)
    scales = torch.rand(6, 2, dtype=torch.float64) * 0.1 + 0.1
    mins = -(2 ** (bits - 1)) * scales
    lora_a, lora_b = torch.zeros(1, 64, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    projection = torch.randn(5, 6, dtype=torch.float64)

    def value(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (L4QFunction.apply(x, weight, lora_a, lora_b, s, m, 1.0, 2**bits - 1) * projection).sum()

    s, m = scales.clone().requires_grad_(), mins.clone().requires_grad_()
    value(s, m).backward()
    step = 1e-6
    for parameter, gradient in ((scales, s.grad), (mins, m.grad)):
        assert gradient is not None
        numeric = torch.zeros_like(parameter)
        for index in np.ndindex(*parameter.shape):
            saved = parameter[index].item()
            ends = []
            for sign in (1, -1):
                parameter[index] = saved + sign * step
                ends.append(value(scales, mins).item())
            parameter[index] = saved
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        assert torch.allclose(gradient, numeric, rtol=1e-6, atol=1e-6)


def test_input_gradient_is_the_quantized_weight() -> None:
    """The function is linear in x, so finite differences in x give W_q itself, offsets included."""
    layer = clipped_layer(4, "integer")
    x = torch.randn(3, 64, dtype=torch.float64)
    gradient = gradients(layer, x, layer)["x"]
    weights = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(gradient, weights @ layer.quantized_weight(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", ["fp16", "fp16_s7"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_frozen_weight_is_the_forward_bit_for_bit(kind: str, bits: int, grid: str, group_size: int) -> None:
    """dequantize(freeze(layer)) == the weight the float32 forward multiplied with, for every grid."""
    torch.manual_seed(bits)
    quant = QuantConfig(bits=bits, group_size=group_size, zero_point=kind, scale_grid=grid)  # type: ignore[arg-type]
    # 341 columns exercise the padded rows of one-group layers; 2800 rows are several blocks
    linear = nn.Linear(341 if group_size == -1 else 96, 2800, bias=False)
    layer = L4QLinear.from_linear(linear, quant, LoraConfig(rank=5))
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.02)
        layer.scales.mul_(0.6 + 0.5 * torch.rand_like(layer.scales))
        if kind != "none":
            layer.offsets.copy_(torch.randn_like(layer.offsets) * layer.scales)
    forward = layer(torch.eye(layer.in_features)).T  # multiplying by 1 and adding zeros changes no bit
    frozen = layer.freeze().dequantize()
    assert np.array_equal(frozen.view(np.uint32), layer.quantized_weight().numpy().view(np.uint32))
    assert torch.equal(forward.detach(), torch.from_numpy(frozen))


def test_a_changed_code_is_noticed() -> None:
    """The twin: one code off by one breaks the bit comparison."""
    layer = clipped_layer(4, "integer", dtype=torch.float32)
    frozen = layer.freeze()
    frozen.codes[3, 5] ^= 1
    assert not np.array_equal(frozen.dequantize().view(np.uint32), layer.quantized_weight().numpy().view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_little(kind: str) -> None:
    """Autograd keeps at most a quarter of one dense weight for a 512 x 512 layer and 64 tokens."""
    quant = QuantConfig(zero_point=kind)  # type: ignore[arg-type]
    layer = L4QLinear.from_linear(nn.Linear(512, 512, bias=False), quant, LoraConfig(rank=4))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() != dense_base(layer.weight).data_ptr():  # W0 is resident anyway
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(64, 512, requires_grad=True))
    y.sum().backward()
    assert sum(kept.values()) <= 0.25 * 512 * 512 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    """A 16-bit base model trains: output and input gradient in its dtype, s, b, A and B in float32."""
    quant = QuantConfig(group_size=32, zero_point="float")
    layer = L4QLinear.from_linear(nn.Linear(64, 32, dtype=dtype), quant, LoraConfig(rank=2))
    x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    for name in ("lora_A", "lora_B", "scales", "offsets"):
        parameter = getattr(layer, name)
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
