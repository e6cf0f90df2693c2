"""Whole texts of errors, and the arrays that bring them about."""

from __future__ import annotations

from typing import Any

import numpy as np


def u8(*shape: int, value: int = 1) -> Any:
    """An array of one value."""
    return np.full(shape, value, np.uint8)


def f16(*shape: int, value: float = 1.0) -> Any:
    """An array of one value."""
    return np.full(shape, value, np.float16)


def message(what: str, where: str = "", got: str = "", expected: str = "", do: str = "") -> str:
    """An error's whole text."""
    parts = {"where": where, "got": got, "expected": expected, "do": do}
    return "\n  ".join([what, *(f"{key}: {value}" for key, value in parts.items() if value)])
