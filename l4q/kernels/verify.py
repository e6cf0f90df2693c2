"""Compare kernels with the oracle on small layers: the check before they are used, and the tests' judge."""

from __future__ import annotations

import torch

from l4q.base import base_rows
from l4q.config import QuantConfig
from l4q.init import init_qparams
from l4q.kernels.eager import EagerKernels
from l4q.kernels.problem import Gradients, Kernels, Problem, WeightGradients
from l4q.quant import GridParams, LoraUpdate, grid_params, row_blocks

# Of the largest entry. float32: sums of some hundred products in another order (measured: up to 5e-7). 16 bits: a
# matrix library may round dL/dW_q differently where the two sides ask for runs of rows of different lengths; measured:
# no difference.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CASES = (
    (QuantConfig(group_size=32, zero_point="integer"), torch.float32),
    (QuantConfig(group_size=-1), torch.bfloat16),
)


@torch.no_grad()
def difference(kernels: Kernels, device: str) -> str | None:
    """What the kernels compute differently from the eager ones on this device; None if nothing."""
    with torch.autocast(device, enabled=False):
        for quant, dtype in CASES:
            found = compare(kernels, *example(quant, dtype, device))
            if found is not None:
                return f"{found} for {quant.zero_point} zero-points in {dtype}"
    return None


def compare(kernels: Kernels, problem: Problem, x: torch.Tensor, grad_y: torch.Tensor) -> str | None:
    """The first thing that differs: a bit of W_q, or a gradient by more than TOLERANCE of its largest entry."""
    oracle = EagerKernels()
    if not same_bits(kernels.quantize(problem, x.dtype), oracle.quantize(problem, x.dtype)):
        return "W_q of the forward differs"
    if not same_bits(_all_codes(kernels, problem), _all_codes(oracle, problem)):
        return "a code differs"
    ours, theirs = kernels.gradients(problem, x, grad_y), oracle.gradients(problem, x, grad_y)
    if not same_bits(ours.quantized, theirs.quantized):
        return "W_q of the backward differs"
    for name in Gradients._fields[1:]:
        odd = _apart(name, getattr(ours, name), getattr(theirs, name), x.dtype)
        if odd is not None:
            return odd
    return _compare_full(kernels, oracle, problem, grad_y.T @ x)


def _compare_full(kernels: Kernels, oracle: Kernels, problem: Problem, grad_w: torch.Tensor) -> str | None:
    """The same for a weight that trains itself: dL/dW is dL/dW_q or 0, so it has its bits."""
    weight = torch.cat([base_rows(problem.weight, rows, torch.float32) for rows in row_blocks(problem.weight)])
    ours, theirs = (
        each.weight_gradients(weight, problem.params, problem.max_code, grad_w) for each in (kernels, oracle)
    )
    if not same_bits(ours.weight, theirs.weight):
        return "the gradient of W differs"
    for name in WeightGradients._fields[1:]:
        odd = _apart(f"{name}, where W trains,", getattr(ours, name), getattr(theirs, name), grad_w.dtype)
        if odd is not None:
            return odd
    return None


def _apart(name: str, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> str | None:
    largest, error = float(right.abs().max()), float((left - right).abs().max())
    if error <= TOLERANCE[dtype] * largest:
        return None
    return f"the gradient of {name} is off by {error:.3g}, its largest entry being {largest:.3g},"


def _all_codes(kernels: Kernels, problem: Problem) -> torch.Tensor:
    """Uint8 [out, in]."""
    return torch.cat([codes for _, codes in kernels.codes(problem)])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def example(
    quant: QuantConfig, dtype: torch.dtype, device: str = "cpu", *, shape: tuple[int, int] = (70, 96), tokens: int = 9
) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """A layer off its start, many of its weights clipped, with activations and dL/dy; always the same one.

    In every other row W lies on the borders between two codes, or next to them, where anything but an IEEE division and
    rounding half to even gives another code now and then.

    Args:
        quant: The grid.
        dtype: Of W0, the activations and dL/dy.
        device: Where the tensors are put.
        shape: [out, in].
        tokens: Rows of the activations.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")

    weight = 0.05 * normal(*shape)
    scales = init_qparams(weight, quant).scales
    params = grid_params(0.6 * scales, 0.5 * scales * normal(*scales.shape), quant)
    lora_b = 0.02 * normal(shape[0], 5)
    lora_b[1::2] = 0
    position = (
        normal(shape[0], scales.shape[1], shape[1] // scales.shape[1]).mul_(quant.max_code / 2).round_().add_(0.5)
    )
    border = (position * params.scales.unsqueeze(-1) + params.mins.unsqueeze(-1)).view(shape)
    weight[1::2] = border[1::2]
    weight[3::4] = torch.nextafter(border, normal(*shape))[3::4]
    problem = Problem(
        weight=weight.to(device, dtype),
        update=LoraUpdate(0.1 * normal(5, shape[1]).to(device), lora_b.to(device), 2.0),
        params=GridParams(*(values.to(device) for values in params)),
        max_code=quant.max_code,
    )
    return problem, normal(tokens, shape[1]).to(device, dtype), normal(tokens, shape[0]).to(device, dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
