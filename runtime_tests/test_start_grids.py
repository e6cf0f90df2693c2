"""Grids of starts: what a checkpoint's grid holds of them, and in which words it says that it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from l4q.config import QuantConfig
from l4q.errors import UsageError
from l4q.init import Start
from l4q.quant import SCALE_MAX, SCALE_MIN, grid_params
from l4q.starts.grid import LinearGrid
from l4q.starts.match import match_grid

CODES = torch.arange(256, dtype=torch.uint8).view(4, 64) % 16
ASKED = "4 bits, group size 32, zero-point integer was asked for"


def grid(
    scales: float | list[float] = 0.5, *, zeros: int | None = None, mins: float | None = None, bits: int = 4
) -> LinearGrid:
    """A grid of two groups per row of 64, of one zero-point or min."""
    spread = torch.tensor([scales, scales] if isinstance(scales, float) else scales).expand(4, 2)
    points = None if zeros is None else torch.full((4, 2), zeros)
    least = None if mins is None else torch.full((4, 2), mins)
    return LinearGrid.build(CODES, spread, points, mins=least, bits=bits, where="w")


REFUSED = [
    (grid(bits=8, zeros=7), {}, f"{ASKED} and the start has 8 bits, which no grid holds"),
    (
        grid(),
        {"bits": 3},
        "3 bits, group size 32, zero-point integer was asked for; --bits 4 --group-size 32 --zero-point none "
        "--scale-grid fp16 would reproduce the start bit for bit",
    ),
    (
        grid(mins=-4.0),
        {},
        f"{ASKED}; --bits 4 --group-size 32 --zero-point float --scale-grid fp16 would reproduce the start bit for bit",
    ),
    (
        grid([0.5, 0.25]),
        {"group_size": -1},
        "4 bits, group size -1, zero-point integer was asked for; --bits 4 --group-size 32 --zero-point none "
        "--scale-grid fp16 would reproduce the start bit for bit",
    ),
    (
        grid(2 * SCALE_MAX),
        {},
        f"a scale is no fp16 number in [{SCALE_MIN:.3g}, {SCALE_MAX:g}], so that no grid holds it",
    ),
    (grid(0.1), {}, f"a scale is no fp16 number in [{SCALE_MIN:.3g}, {SCALE_MAX:g}], so that no grid holds it"),
    (
        grid(1 + 2.0**-10),
        {"scale_grid": "fp16_s7"},
        "scale_grid fp16_s7 does not hold the start's scales; --scale-grid fp16 would",
    ),
    (grid(zeros=0), {}, "a zero-point is not in [1, 15]"),
    (grid(mins=0.1), {"zero_point": "float"}, "a zero-point is not an fp16 number"),
]


@pytest.mark.parametrize(("start", "asked", "reason"), REFUSED)
def test_why_a_grid_does_not_hold_a_start(start: LinearGrid, asked: dict[str, Any], reason: str) -> None:
    """One sentence, with the options that would."""
    quant = QuantConfig(**{"group_size": 32, "zero_point": "integer", "scale_grid": "fp16", **asked})
    assert match_grid(start, quant) == reason


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("start", [grid(), grid(zeros=3), grid(mins=-1.5)])
def test_a_start_that_is_held_comes_back(start: LinearGrid, size: int) -> None:
    """Scales and zero-points that training begins with are the start's, in its groups or larger ones that are alike."""
    quant = QuantConfig(group_size=size, zero_point="float", scale_grid="fp16")
    held = match_grid(start, quant)
    assert isinstance(held, Start)
    params = grid_params(held.scales, held.offsets, quant)
    groups = 2 if size == 32 else 1
    assert torch.equal(params.scales, start.scales[:, :groups])
    mins = start.mins if start.mins is not None else -start.points() * start.scales
    assert torch.equal(params.mins, mins[:, :groups])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bits": 9}, "bits"),
    ({"scales": torch.ones(4)}, "scales"),
    ({"scales": torch.ones(4, 3)}, "scales"),
    ({"scales": torch.ones(3, 2)}, "scales"),
    ({"scales": torch.ones(4, 2, dtype=torch.int32)}, "scales"),
    ({"scales": torch.full((4, 2), float("nan"))}, "scales"),
    ({"zeros": torch.ones(4, 1, dtype=torch.int32)}, "zero-points"),
    ({"zeros": torch.full((4, 2), 16)}, "zero-points"),
    ({"zeros": torch.full((4, 2), -1)}, "zero-points"),
    ({"mins": torch.ones(2, 2)}, "mins"),
    ({"mins": torch.full((4, 2), float("inf"))}, "mins"),
]


@pytest.mark.parametrize(("changes", "what"), BAD)
def test_what_is_no_grid_is_named(changes: dict[str, Any], what: str) -> None:
    """The part that is wrong, and where."""
    parts: dict[str, Any] = {"scales": torch.ones(4, 2), "zeros": None, "bits": 4, "where": "file: w", **changes}
    with pytest.raises(UsageError, match=rf"(?s){re.escape(what)}.*file: w"):
        LinearGrid.build(CODES, parts.pop("scales"), parts.pop("zeros"), **parts)


def test_groups_become_finer_and_coarser() -> None:
    """Finer always, coarser where the joined ones are alike, and never across a group's edge."""
    two = grid([0.5, 0.25])
    fine = two.regroup(16)
    assert fine is not None
    assert fine.scales[0].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert torch.equal(fine.dequantize(), two.dequantize())
    back = fine.regroup(32)
    assert back is not None
    assert torch.equal(back.scales, two.scales)
    assert two.regroup(64) is None
    assert two.regroup(48) is None
    assert two.regroup(128) is None
