"""Weights that train through the quantizer: torch's own differentiation of the definition judges the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from l4q.compensate import Compensated
from l4q.config import QuantConfig
from l4q.full_linear import FullLinear
from l4q.init import init_qparams
from l4q.quant import grid_params


def layer(kind: Any, *, bits: int = 3) -> FullLinear:
    """[48, 64] in groups of 32, its grid too narrow, so that some of the weights are clipped."""
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 64, generator=generator)
    start = init_qparams(weight, quant)
    return FullLinear(Compensated(weight, start._replace(scales=start.scales * 0.6)), None, quant)


def defined(module: FullLinear, x: torch.Tensor, *, mask: bool = True) -> torch.Tensor:
    """The output by the definition, each operation recorded by autograd; round() alone passes gradients through."""
    params = grid_params(module.scales, module.offsets, module.quant)
    s, m = params.scales.repeat_interleave(32, 1), params.mins.repeat_interleave(32, 1)
    position = (module.weight - m) / s
    if mask:
        position = position.clamp(0, module.quant.max_code)
    rounded = position + (position.detach().clamp(0, module.quant.max_code).round() - position.detach())
    return F.linear(x, rounded * s + m)


def gradients(module: FullLinear, output: torch.Tensor) -> list[torch.Tensor]:
    """Of a loss that is no sum."""
    parameters = [each for each in module.parameters() if each.requires_grad]
    return list(torch.autograd.grad(output.square().mean(), parameters))


def near(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether all are equal but for the order of sums."""
    pairs = zip(left, right, strict=True)
    return all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_the_definition(kind: Any, bits: int) -> None:
    """Of W, s and b; without the mask of what is clipped they are others."""
    module, x = layer(kind, bits=bits), torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    given, wanted = module(x), defined(module, x)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    ours = gradients(module, given)
    assert len(ours) == (2 if kind == "none" else 3)
    assert near(ours, gradients(module, wanted))
    assert not near(ours, gradients(module, defined(module, x, mask=False)))


def test_under_autocast_it_multiplies_as_a_linear_layer_does() -> None:
    """In bfloat16, with the bits of the quantized weight rounded once; a float32 input gives bfloat16 as well."""
    module, x = layer("integer"), torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given, wanted = module(x), F.linear(x, module.quantized())
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, wanted)
    assert not torch.equal(given.float(), module(x))


def test_a_kept_weight_is_the_one_that_is_multiplied() -> None:
    """While it is kept, changes of W do nothing; afterwards they do."""
    module, x = layer("none"), torch.eye(64)
    with torch.no_grad():
        module.kept = module.quantized()
        before = module(x)
        module.weight.neg_()
        assert torch.equal(module(x), before)
        module.kept = None
        assert not torch.equal(module(x), before)
