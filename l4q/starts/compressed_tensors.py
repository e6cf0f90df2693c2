"""compressed-tensors folders, format "pack-quantized", integer groups or channels.

weight_packed int32 [N, ceil(K * b / 32)] along K, weight_scale [N, G], weight_shape [2], and for asymmetric groups
weight_zero_point int32 [ceil(N * b / 32), G] along N. Stored values are unsigned: value[n, k] = (q - z) * scale[n, g],
z = 2**(b-1) if symmetric. 3-bit words are dense, as compressed-tensors >= 0.18 and vLLM have them.
"""

from __future__ import annotations

from typing import Any

import torch

from l4q.errors import UnsupportedError, UsageError
from l4q.starts.folder import check_divides, group_order, need
from l4q.starts.grid import GRID_BITS, LinearGrid
from l4q.starts.patterns import matches_pattern
from l4q.starts.stream import unpack_words

FORMAT = "compressed-tensors"
MARK = "weight_packed"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PACKED = "pack-quantized"
STRATEGIES = ("group", "channel")


def check(section: dict[str, Any], where: str) -> None:
    """Refuse other formats, float types and quantized activations.

    Raises:
        UnsupportedError: The message lists what is in the way.
    """
    groups: dict[str, Any] = section.get("config_groups") or {}
    formats = {section.get("format"), *(group.get("format") for group in groups.values())} - {None}
    odd = [f"format {name}" for name in sorted(formats - {PACKED})]
    for name, group in groups.items():
        weights = group.get("weights") or {}
        found = (weights.get("type", "int"), weights.get("strategy"), weights.get("num_bits"))
        if found[0] != "int" or found[1] not in STRATEGIES or found[2] not in GRID_BITS:
            odd.append(f"{name}: type {found[0]}, strategy {found[1]}, num_bits {found[2]}")
        if group.get("input_activations"):
            odd.append(f"{name}: quantized activations")
    if odd or not groups:
        raise UnsupportedError(
            "unsupported compressed-tensors variant",
            where=where,
            got="; ".join(odd) or "no config_groups",
            expected=f"format {PACKED}, type int, strategy {' or '.join(STRATEGIES)}, num_bits in {GRID_BITS}",
        )


def decode(module: str, parts: dict[str, torch.Tensor], section: dict[str, Any], where: str) -> LinearGrid:
    """The grid of one module.

    Raises:
        UsageError: Tensors are missing, damaged or contradict the config.
    """
    weights = scheme(module, section, where)
    bits, symmetric = int(weights["num_bits"]), bool(weights.get("symmetric", True))
    need(parts, ("weight_packed", "weight_scale", *(() if symmetric else ("weight_zero_point",))), where)
    rows, groups = parts["weight_scale"].shape
    held = parts["weight_packed"].shape[1] * 32 // bits
    columns = int(parts["weight_shape"][1]) if "weight_shape" in parts else held
    check_divides(columns, groups, where)
    order = group_order(parts.get("weight_g_idx"), columns, groups, where)
    codes = unpack_words(parts["weight_packed"], columns, bits, f"{where}.weight_packed")  # [N, K]
    zeros: torch.Tensor | None = None
    if not symmetric:
        points = parts["weight_zero_point"].T.contiguous()  # [G, words]
        zeros = unpack_words(points, rows, bits, f"{where}.weight_zero_point").T.contiguous()
    return LinearGrid.build(codes, parts["weight_scale"], zeros, bits=bits, where=where, order=order)


def scheme(module: str, section: dict[str, Any], where: str) -> dict[str, Any]:
    """The `weights` section that applies to a module: a target that names it wins over the class "Linear".

    Raises:
        UsageError: No group targets it.
    """
    general: dict[str, Any] | None = None
    for group in section["config_groups"].values():
        for target in group.get("targets", ()):
            named = matches_pattern(target[3:], module, where) if target.startswith("re:") else module == target
            if named:
                return dict(group["weights"])
            if target == "Linear":
                general = general or dict(group["weights"])
    if general is None:
        raise UsageError(
            "no config group targets a quantized module",
            where=where,
            got=[group.get("targets") for group in section["config_groups"].values()],
            expected='a target "Linear", the module\'s name, or a "re:" pattern that matches it',
        )
    return general
