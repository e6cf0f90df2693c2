"""AWQ folders (version "gemm"): qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N], 4 bits.

value[n, k] = (q[k, n] - z[g, n]) * scales[g, n]. Nibble j of word w holds column 8 w + NIBBLE_COLUMNS[j].
"""

from __future__ import annotations

from typing import Any

import torch

from l4q.errors import UnsupportedError, UsageError
from l4q.starts.folder import check_divides, need
from l4q.starts.grid import LinearGrid

FORMAT = "awq"
MARK = "qweight"
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def check(section: dict[str, Any], where: str) -> None:
    """Refuse other bits and the gemv layout.

    Raises:
        UnsupportedError: See above.
    """
    found = {"bits": section.get("bits", BITS), "version": str(section.get("version", "gemm")).lower()}
    if found != {"bits": BITS, "version": "gemm"}:
        raise UnsupportedError("unsupported AWQ variant", where=where, got=found, expected="bits 4, version gemm")


def decode(module: str, parts: dict[str, torch.Tensor], section: dict[str, Any], where: str) -> LinearGrid:
    """The grid of one module.

    Raises:
        UsageError: Tensors are missing, damaged or contradict the config.
    """
    asymmetric = bool(section.get("zero_point", True))
    need(parts, PARTS if asymmetric else ("qweight", "scales"), where)
    columns, (groups, rows) = parts["qweight"].shape[0], parts["scales"].shape
    check_divides(columns, groups, where)
    codes = _unpack(parts["qweight"], rows, f"{where}.qweight").T.contiguous()  # [N, K]
    zeros = _unpack(parts["qzeros"], rows, f"{where}.qzeros").T.contiguous() if "qzeros" in parts else None
    if not asymmetric and zeros is not None and bool((zeros != 1 << (BITS - 1)).any()):
        raise UsageError(
            "the config says zero_point: false, but the zero-points are not 8",
            where=f"{where}.qzeros",
            got=sorted(set(zeros.ravel().tolist())),
            expected=1 << (BITS - 1),
            remedy="correct zero_point in quantization_config, if you know how the file was made",
        )
    return LinearGrid.build(codes, parts["scales"].T.contiguous(), zeros, bits=BITS, where=where)


def _unpack(words: torch.Tensor, columns: int, where: str) -> torch.Tensor:
    """int32 [rows, columns / 8] to uint8 [rows, columns]."""
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] * 8 != columns:
        raise UsageError(
            "packed integers of the wrong size",
            where=where,
            got=f"{str(words.dtype).removeprefix('torch.')} {list(words.shape)}",
            expected=f"int32 [rows, {columns // 8}]",
            remedy="the file is damaged",
        )
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    nibbles = (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8)  # [rows, words, 8]
    ordered = torch.empty_like(nibbles)
    ordered[..., list(NIBBLE_COLUMNS)] = nibbles
    return ordered.flatten(1)
