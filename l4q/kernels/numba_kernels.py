"""CPU kernels compiled by Numba: one pass over the merged weight per direction.

Nothing here is compiled with fast-math but the two sums, so that divisions are IEEE divisions, no multiplication and
addition become one rounding, and codes equal torch's bit for bit. Rows are split over as many threads as torch uses;
the kernels release the interpreter's lock, so Python threads do (an OpenMP of Numba's own beside torch's would break
processes that fork).

bfloat16 is read and written as its 16 bits, the upper half of a float32. Other dtypes than it and float32 go through a
float32 copy of the run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import torch

from l4q.quant import GridParams

numba: Any = import_module("numba")  # has no types

SMALL = 1 << 15
"""Weights below which a second thread costs more than it saves."""


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba.njit, kept on disk between processes where the source's folder or the user's cache can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any]
        try:
            compiled = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no writable place for the cache
            compiled = numba.njit(nogil=True, **options)(function)
        return compiled

    return decorate


@_compiled(fastmath={"reassoc", "nsz"})
def _product_sum(left: Any, right: Any) -> Any:
    """Sum of left * right in whatever order the vector units like; the only inexact freedom in this file."""
    total = np.float32(0.0)
    for i in range(left.shape[0]):
        total += left[i] * right[i]
    return total


@_compiled()
def _rounded(value: Any) -> Any:
    """The upper 16 bits of a float32 rounded to nearest even, as torch rounds to bfloat16."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled()
def _widened(value: Any) -> Any:
    """A bfloat16's bits as float32."""
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@_compiled()
def _clamped(position: Any, max_code: Any) -> Any:
    """clamp(w, 0, max_code), which a NaN passes unchanged as it does in torch."""
    low = np.float32(0.0) if position < np.float32(0.0) else position
    return max_code if low > max_code else low


@_compiled()
def _quantize_row(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any) -> None:
    """One row's W_q, float32: weights [groups, size], scales and mins [groups]."""
    for group in range(merged.shape[0]):
        s, m = scales[group], mins[group]
        for i in range(merged.shape[1]):
            out[group, i] = np.rint(_clamped((merged[group, i] - m) / s, max_code)) * s + m


@_compiled()
def _differentiate_row(merged: Any, scales: Any, mins: Any, max_code: Any, grad: Any, out: Any, sums: Any) -> None:
    """One row's W_q to `out`, dL/dW over `merged`, dL/ds and dL/dm to `sums` [groups, 2].

    Inside the clamp dW_q/dW = 1, dW_q/ds = q - w and dW_q/dm = 0; outside 0, q and 1.
    """
    zero, one = np.float32(0.0), np.float32(1.0)
    slope, outside = np.empty(merged.shape[1], np.float32), np.empty(merged.shape[1], np.float32)
    for group in range(merged.shape[0]):
        s, m = scales[group], mins[group]
        for i in range(merged.shape[1]):
            position = (merged[group, i] - m) / s
            clamped = _clamped(position, max_code)
            code = np.rint(clamped)
            inside = clamped == position
            out[group, i] = code * s + m
            slope[i] = code - (position if inside else zero)
            outside[i] = zero if inside else one
            merged[group, i] = grad[group, i] if inside else zero
        sums[group, 0] = _product_sum(grad[group], slope)
        sums[group, 1] = _product_sum(grad[group], outside)


@_compiled()
def _round_row(values: Any, out: Any) -> None:
    """Float32 [groups, size] to bfloat16 bits."""
    for group in range(values.shape[0]):
        for i in range(values.shape[1]):
            out[group, i] = _rounded(values[group, i])


@_compiled()
def _widen_row(bits: Any, out: Any) -> None:
    """The bits of bfloat16 [groups, size] to float32."""
    for group in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            out[group, i] = _widened(bits[group, i])


@_compiled()
def quantize_float32(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any) -> None:
    """W_q of merged [rows, groups, size], with scales and mins [rows, groups]."""
    for row in range(merged.shape[0]):
        _quantize_row(merged[row], scales[row], mins[row], max_code, out[row])


@_compiled()
def quantize_bfloat16(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any) -> None:
    """As `quantize_float32`, with `out` the bits of bfloat16."""
    values = np.empty(merged.shape[1:], np.float32)
    for row in range(merged.shape[0]):
        _quantize_row(merged[row], scales[row], mins[row], max_code, values)
        _round_row(values, out[row])


@_compiled()
def codes_float32(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any) -> None:
    """The codes of merged [rows, groups, size] as uint8; that of a NaN is 0."""
    zero = np.float32(0.0)
    for row in range(merged.shape[0]):
        for group in range(merged.shape[1]):
            s, m = scales[row, group], mins[row, group]
            for i in range(merged.shape[2]):
                position = (merged[row, group, i] - m) / s
                position = position if position > zero else zero
                out[row, group, i] = np.uint8(np.rint(max_code if position > max_code else position))


@_compiled()
def differentiate_float32(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any, grad: Any, sums: Any) -> None:
    """W_q, dL/dW over `merged`, and `sums` [rows, groups, 2] from grad [rows, groups, size]."""
    for row in range(merged.shape[0]):
        _differentiate_row(merged[row], scales[row], mins[row], max_code, grad[row], out[row], sums[row])


@_compiled()
def differentiate_bfloat16(merged: Any, scales: Any, mins: Any, max_code: Any, out: Any, grad: Any, sums: Any) -> None:
    """As `differentiate_float32`, with `grad` and `out` the bits of bfloat16."""
    values, slopes = np.empty(merged.shape[1:], np.float32), np.empty(merged.shape[1:], np.float32)
    for row in range(merged.shape[0]):
        _widen_row(grad[row], slopes)
        _differentiate_row(merged[row], scales[row], mins[row], max_code, slopes, values, sums[row])
        _round_row(values, out[row])


class NumbaPasses:
    """`l4q.kernels.fused.Passes` on the CPU."""

    name = "numba"

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """Write W_q of `merged` [rows, in] float32 to `out`."""
        if out.dtype not in (torch.float32, torch.bfloat16):
            exact = torch.empty_like(merged)
            self.quantize(merged, params, max_code, exact)
            out.copy_(exact)
            return
        kernel = quantize_bfloat16 if out.dtype == torch.bfloat16 else quantize_float32
        _over_rows(kernel, _arrays(merged, params), max_code, (_grouped(out, params),))

    def codes(self, merged: torch.Tensor, params: GridParams, max_code: int) -> torch.Tensor:
        """The codes of `merged` [rows, in] float32, uint8 [rows, in]."""
        out = torch.empty(merged.shape, dtype=torch.uint8, device="cpu")
        _over_rows(codes_float32, _arrays(merged, params), max_code, (_grouped(out, params),))
        return out

    def differentiate(
        self, merged: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write W_q to `out`, overwrite `merged` with dL/dW, return dL/ds and dL/dm [rows, groups]."""
        if out.dtype not in (torch.float32, torch.bfloat16):
            exact = torch.empty_like(merged)
            found = self.differentiate(merged, params, max_code, grad_w.float(), exact)
            out.copy_(exact)
            return found
        kernel = differentiate_bfloat16 if out.dtype == torch.bfloat16 else differentiate_float32
        sums = torch.empty(*params.scales.shape, 2, dtype=torch.float32, device="cpu")
        others = (_grouped(out, params), _grouped(grad_w.to(out.dtype).contiguous(), params), sums.numpy())
        _over_rows(kernel, _arrays(merged, params), max_code, others)
        return sums[..., 0], sums[..., 1]


def _arrays(merged: torch.Tensor, params: GridParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scales, mins = (values.detach().contiguous().numpy() for values in (params.scales, params.mins))
    return _grouped(merged, params), scales, mins


def _grouped(weight: torch.Tensor, params: GridParams) -> np.ndarray:
    """[rows, in] as [rows, groups, size]; bfloat16 as its bits."""
    view = weight.detach().view(*params.scales.shape, -1)
    return (view.view(torch.uint16) if view.dtype == torch.bfloat16 else view).numpy()


def _over_rows(
    kernel: Callable[..., None],
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    max_code: int,
    others: tuple[np.ndarray, ...],
) -> None:
    """Call the kernel on equal shares of the rows, one in this thread and the others in the pool's."""
    rows = arrays[0].shape[0]
    threads = min(torch.get_num_threads(), rows, max(1, arrays[0].size // SMALL))
    limit = np.float32(max_code)

    def work(share: int) -> None:
        part = slice(rows * share // threads, rows * (share + 1) // threads)
        kernel(*(array[part] for array in arrays), limit, *(array[part] for array in others))

    waiting = [_pool().submit(work, share) for share in range(1, threads)]
    work(0)
    for future in waiting:
        future.result()


_threads: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    """The threads that help; they start when there is work for them."""
    global _threads
    with _lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="l4q-kernels")
        return _threads


def _forget_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _threads, _lock
    _threads, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
