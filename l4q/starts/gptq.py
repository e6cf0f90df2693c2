"""GPTQ folders: qweight int32 [K * b / 32, N], qzeros int32 [G, N * b / 32], scales [G, N], g_idx int32 [K].

value[n, k] = (q[k, n] - z[g, n]) * scales[g, n], g = k // group_size. Format "gptq" (v1) stores z - 1 modulo 2**b,
"gptq_v2" stores z. With `sym` true z is 2**(b-1) whatever qzeros says, as in vLLM; qzeros may then follow either
convention (some writers label v2 zero-points v1), but must be one of the two.
"""

from __future__ import annotations

from typing import Any

import torch

from l4q.errors import UnsupportedError, UsageError
from l4q.starts.folder import check_divides, group_order, need
from l4q.starts.grid import GRID_BITS, LinearGrid
from l4q.starts.patterns import matches_pattern
from l4q.starts.stream import unpack_words

FORMAT = "gptq"
MARK = "qweight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
# checkpoint_format -> what was subtracted from a zero-point before it was stored
SUBTRACTED = {"gptq": 1, "gptq_v2": 0}


def check(section: dict[str, Any], where: str) -> None:
    """Refuse other checkpoint formats.

    Raises:
        UnsupportedError: See above.
    """
    kind = section.get("checkpoint_format", "gptq")
    if kind not in SUBTRACTED:
        raise UnsupportedError(
            "unknown GPTQ checkpoint_format", where=where, got=kind, expected=f"one of {sorted(SUBTRACTED)}"
        )


def decode(module: str, parts: dict[str, torch.Tensor], section: dict[str, Any], where: str) -> LinearGrid:
    """The grid of one module.

    Raises:
        UsageError: Tensors are missing, damaged or contradict the config.
        UnsupportedError: A number of bits that is not read.
    """
    need(parts, ("qweight", "scales"), where)
    options = {**section, **_override(module, section, where)}
    bits, symmetric = options.get("bits", 0), options.get("sym", True)
    if type(symmetric) is not bool:
        raise UsageError("sym is neither true nor false", where=where, got=repr(symmetric), expected="true or false")
    if type(bits) is not int or bits not in GRID_BITS:
        raise UnsupportedError("unsupported bits", where=where, got=bits, expected=f"one of {GRID_BITS}")
    groups, rows = parts["scales"].shape
    columns = parts["g_idx"].shape[0] if "g_idx" in parts else parts["qweight"].shape[0] * 32 // bits
    check_divides(columns, groups, where)
    order = group_order(parts.get("g_idx"), columns, groups, where)
    codes = unpack_words(parts["qweight"].T.contiguous(), columns, bits, f"{where}.qweight")  # [N, K]
    zeros: torch.Tensor | None = None
    if "qzeros" in parts:
        stored = unpack_words(parts["qzeros"], rows, bits, f"{where}.qzeros").to(torch.int64)  # [G, N]
        if stored.shape[0] != groups:
            raise UsageError(
                "zero-points and scales have different groups",
                where=f"{where}.qzeros",
                got=stored.shape[0],
                expected=groups,
                remedy="the tensors are damaged or do not belong together",
            )
        offset = SUBTRACTED[section.get("checkpoint_format", "gptq")]
        zeros = None if symmetric else ((stored + offset) % (1 << bits)).T.contiguous()
        middle = 1 << (bits - 1)
        if symmetric and not any(bool((stored == z).all()) for z in (middle, middle - 1)):
            raise UsageError(
                "the config says sym: true, but the zero-points are not the midpoint",
                where=f"{where}.qzeros",
                got=sorted(set(stored.ravel().tolist())),
                expected=f"{middle - 1} (gptq) or {middle} (gptq_v2)",
                remedy="correct sym in quantization_config, if you know how the file was made",
            )
    elif not symmetric:
        need(parts, ("qzeros",), where)
    return LinearGrid.build(codes, parts["scales"].T.contiguous(), zeros, bits=bits, where=where, order=order)


def _override(module: str, section: dict[str, Any], where: str) -> dict[str, Any]:
    """GPTQModel's per-module options: {"+:regex": {...}}; the first pattern that matches wins."""
    for pattern, options in (section.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and matches_pattern(pattern.removeprefix("+:"), module, where):
            return dict(options)
    return {}
