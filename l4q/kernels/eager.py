"""The oracle: plain torch operations, in runs of rows that stay in a CPU core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from l4q.kernels.problem import Gradients, Problem, cast_update
from l4q.quant import code_blocks, fake_quantize, merge_lora, position_, row_blocks


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

        Inside the clamp dW_q/ds = q - w and dW_q/dm = 0; outside dW_q/ds = q (0 or max_code) and dW_q/dm = 1.
        W, w, q and dL/dW_q exist for one run of rows at a time.
        """
        weight, (scales, mins, _) = problem.weight, problem.params
        update = cast_update(problem.update, scales.dtype)
        quantized = torch.empty(weight.shape, dtype=grad_y.dtype, device=x.device)
        grad_a, grad_b = torch.zeros_like(update.a), torch.empty_like(update.b)
        grad_s, grad_m = torch.empty_like(scales), torch.empty_like(mins)
        for rows in row_blocks(weight):
            s, m = scales[rows].unsqueeze(-1), mins[rows].unsqueeze(-1)  # [rows, groups, 1]
            position = position_(merge_lora(weight, update, rows, scales.dtype), scales[rows], mins[rows])
            codes = position.clamp(0, problem.max_code)
            outside = codes != position  # complement of the straight-through mask on the unrounded w (eq 17)
            codes.round_()
            quantized[rows] = (codes * s).add_(m).view(-1, weight.shape[1])
            grad_w = (grad_y[:, rows].T @ x).to(scales.dtype).view_as(position)  # dL/dW_q, eq 22
            grad_s[rows] = grad_w.mul(codes.sub_(position.masked_fill_(outside, 0))).sum(-1)
            grad_m[rows] = (grad_w * outside).sum(-1)
            grad_in = grad_w.masked_fill_(outside, 0).view(-1, weight.shape[1])
            grad_a.addmm_(update.b[rows].T, grad_in)  # eq 29, scaled below
            torch.mm(grad_in, update.a.T, out=grad_b[rows])  # eq 30
        return Gradients(quantized, grad_a.mul_(update.scaling), grad_b.mul_(update.scaling), grad_s, grad_m)
