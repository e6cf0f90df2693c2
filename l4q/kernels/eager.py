"""The oracle: plain torch operations, in runs of rows that stay in a CPU core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from l4q.base import follow_
from l4q.kernels.problem import Gradients, Problem, WeightGradients, cast_update
from l4q.quant import GridParams, code_blocks, fake_quantize, merge_lora, position_, row_blocks


class EagerKernels:
    """`l4q.quant`'s functions and the gradients of eqs 19-30, each operation a pass of its own; any float dtype."""

    name = "eager"

    def quantize(self, problem: Problem, dtype: torch.dtype) -> torch.Tensor:
        """W_q [out, in] in `dtype`."""
        return fake_quantize(*problem, dtype)

    def codes(self, problem: Problem) -> Iterator[tuple[slice, torch.Tensor]]:
        """Codes of each run of rows, uint8 [rows, in]."""
        return code_blocks(*problem)

    def gradients(self, problem: Problem, x: torch.Tensor, grad_y: torch.Tensor) -> Gradients:
        """Gradients of A, B, s and m; eqs 19 and 21 with m = b + Q_N * s.

        W, w, q and dL/dW_q exist for one run of rows at a time.
        """
        weight, (scales, mins, _) = problem.weight, problem.params
        update = cast_update(problem.update, scales.dtype)
        quantized = torch.empty(weight.shape, dtype=grad_y.dtype, device=x.device)
        grad_a, grad_b = torch.zeros_like(update.a), torch.empty_like(update.b)
        grad_s, grad_m = torch.empty_like(scales), torch.empty_like(mins)
        for rows in row_blocks(weight):
            merged = merge_lora(weight, update, rows, scales.dtype)
            grad_w = (grad_y[:, rows].T @ x).to(scales.dtype)  # dL/dW_q, eq 22
            grad_s[rows], grad_m[rows], grad_in = _differentiate(
                merged, scales[rows], mins[rows], problem.max_code, grad_w, quantized[rows]
            )
            follow_(weight, rows, grad_in, grad_s, grad_m)
            grad_a.addmm_(update.b[rows].T, grad_in)  # eq 29, scaled below
            torch.mm(grad_in, update.a.T, out=grad_b[rows])  # eq 30
        return Gradients(quantized, grad_a.mul_(update.scaling), grad_b.mul_(update.scaling), grad_s, grad_m)

    def weight_gradients(
        self, weight: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor
    ) -> WeightGradients:
        """Gradients of W, s and m; as in `gradients` up to eqs 29 and 30."""
        scales, mins, _ = params
        found = WeightGradients(torch.empty_like(weight), torch.empty_like(scales), torch.empty_like(mins))
        for rows in row_blocks(weight):
            taken = grad_w[rows].to(scales.dtype, copy=True)
            found.scales[rows], found.mins[rows], found.weight[rows] = _differentiate(
                weight[rows].clone(), scales[rows], mins[rows], max_code, taken, None
            )
        return found


def _differentiate(
    merged: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor,
    max_code: int,
    grad_w: torch.Tensor,
    quantized: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dL/ds, dL/dm, dL/dW) of a run of rows; writes W_q to `quantized` and overwrites the two it is given [rows, in].

    Inside the clamp dW_q/ds = q - w and dW_q/dm = 0; outside dW_q/ds = q (0 or max_code) and dW_q/dm = 1.
    """
    position = position_(merged, scales, mins)
    codes = position.clamp(0, max_code)
    outside = codes != position  # complement of the straight-through mask on the unrounded w (eq 17)
    codes.round_()
    if quantized is not None:
        quantized.copy_((codes * scales.unsqueeze(-1)).add_(mins.unsqueeze(-1)).view(quantized.shape))
    grad_w = grad_w.view_as(position)
    grad_s = grad_w.mul(codes.sub_(position.masked_fill_(outside, 0))).sum(-1)
    grad_m = (grad_w * outside).sum(-1)
    return grad_s, grad_m, grad_w.masked_fill_(outside, 0).view(merged.shape)
