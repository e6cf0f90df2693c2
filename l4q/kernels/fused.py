"""What compiled kernels share: torch merges and multiplies matrices, one pass does everything elementwise.

The passes work on a run of rows whose merged weight lies in one scratch buffer, which they overwrite with dL/dW. On
the CPU a run holds several of the eager kernels' blocks: B @ A is multiplied in exactly those blocks, because a matrix
product of another shape may round to other bits, while the product with the activations wants larger ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import torch

from l4q.base import BaseWeight, follow_
from l4q.kernels.problem import Gradients, Problem, WeightGradients, cast_update
from l4q.quant import GridParams, row_blocks

RUN_ELEMENTS = 1 << 20
"""Weights per run on the CPU: 4 MiB of float32, which the third-level cache holds."""


class Passes(Protocol):
    """The compiled passes over a run of rows; scales and mins are [rows, groups] float32."""

    @property
    def name(self) -> str:
        """The kernels' name."""
        ...

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """Write W_q of `merged` [rows, in] float32 to `out` [rows, in] of any float dtype."""
        ...

    def codes(self, merged: torch.Tensor, params: GridParams, max_code: int) -> torch.Tensor:
        """The codes of `merged` [rows, in] float32, which may be overwritten: uint8 [rows, in]."""
        ...

    def differentiate(
        self, merged: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write W_q to `out`, overwrite `merged` with dL/dW, return dL/ds and dL/dm [rows, groups].

        `grad_w` is dL/dW_q [rows, in] of any float dtype.
        """
        ...


class FusedKernels:
    """`Passes` as `Kernels`."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.name = passes.name

    def quantize(self, problem: Problem, dtype: torch.dtype) -> torch.Tensor:
        """W_q [out, in] in `dtype`."""
        out = torch.empty(problem.weight.shape, dtype=dtype, device=problem.weight.device)
        for rows, merged in merged_runs(problem):
            self.passes.quantize(merged, _part(problem.params, rows), problem.max_code, out[rows])
        return out

    def codes(self, problem: Problem) -> Iterator[tuple[slice, torch.Tensor]]:
        """Codes of each run of rows, uint8 [rows, in]."""
        for rows, merged in merged_runs(problem):
            yield rows, self.passes.codes(merged, _part(problem.params, rows), problem.max_code)

    def gradients(self, problem: Problem, x: torch.Tensor, grad_y: torch.Tensor) -> Gradients:
        """Gradients of A, B, s and m, see `EagerKernels.gradients`."""
        scales, mins, _ = problem.params
        update = cast_update(problem.update, scales.dtype)
        quantized = torch.empty(problem.weight.shape, dtype=grad_y.dtype, device=x.device)
        grad_a, grad_b = torch.zeros_like(update.a), torch.empty_like(update.b)
        grad_s, grad_m = torch.empty_like(scales), torch.empty_like(mins)
        for rows, merged in merged_runs(problem):
            grad_w = grad_y[:, rows].T @ x  # dL/dW_q, eq 22
            grad_s[rows], grad_m[rows] = self.passes.differentiate(
                merged, _part(problem.params, rows), problem.max_code, grad_w, quantized[rows]
            )
            follow_(problem.weight, rows, merged, grad_s, grad_m)
            grad_a.addmm_(update.b[rows].T, merged)  # eq 29, scaled below
            torch.mm(merged, update.a.T, out=grad_b[rows])  # eq 30
        return Gradients(quantized, grad_a.mul_(update.scaling), grad_b.mul_(update.scaling), grad_s, grad_m)

    def weight_gradients(
        self, weight: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor
    ) -> WeightGradients:
        """Gradients of W, s and m, see `EagerKernels.weight_gradients`."""
        found = WeightGradients(weight.clone(), torch.empty_like(params.scales), torch.empty_like(params.mins))
        for run in _runs(weight):
            rows = slice(run[0].start, run[-1].stop)
            part = grad_w[rows]
            size = part.numel()
            unused = _scratch(size, params.scales).view(part.dtype)[:size].view_as(part)  # W_q: nobody asks for it here
            found.scales[rows], found.mins[rows] = self.passes.differentiate(
                found.weight[rows], _part(params, rows), max_code, part, unused
            )
        return found


def merged_runs(problem: Problem) -> Iterator[tuple[slice, torch.Tensor]]:
    """W = W0 + scaling * B A of each run of rows, [rows, in] in the dtype of the scales, equal to `merge_lora`'s bits.

    The tensor may be overwritten; it is valid until the next run is asked for, of this problem or of another.
    """
    scales = problem.params.scales
    update = cast_update(problem.update, scales.dtype)
    columns = problem.weight.shape[1]
    for run in _runs(problem.weight):
        start, stop = run[0].start, run[-1].stop
        merged = _scratch((stop - start) * columns, scales).view(-1, columns)
        for rows in run:
            target = merged[rows.start - start : rows.stop - start]
            target.copy_(_rows(problem.weight, rows)).addmm_(update.b[rows], update.a, alpha=update.scaling)
        yield slice(start, stop), merged


_kept = threading.local()


def _scratch(size: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory of a dtype and device; on the CPU a thread's last one again, if it is large enough.

    The C library would hand megabytes back to the system after every layer and fault them in again page by page. On a
    GPU torch's allocator keeps them, and shares them with the rest of the step.
    """
    if like.device.type != "cpu" or size > 2 * RUN_ELEMENTS:
        return torch.empty(size, dtype=like.dtype, device=like.device)
    kept: torch.Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < size or kept.dtype != like.dtype:
        kept = _kept.memory = torch.empty(size, dtype=like.dtype)
    return kept[:size]


def _rows(weight: BaseWeight, rows: slice) -> torch.Tensor:
    return weight[rows] if isinstance(weight, torch.Tensor) else weight.rows(rows)


def _runs(weight: BaseWeight) -> Iterator[list[slice]]:
    """`row_blocks` joined until a run holds RUN_ELEMENTS; every run but the last has the same length."""
    run: list[slice] = []
    for rows in row_blocks(weight):
        run.append(rows)
        if (rows.stop - run[0].start) * weight.shape[1] >= RUN_ELEMENTS:
            yield run
            run = []
    if run:
        yield run


def _part(params: GridParams, rows: slice) -> GridParams:
    return GridParams(*(values[rows] for values in params))
