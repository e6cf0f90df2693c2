"""Shared by the tests of compressed-tensors and AWQ folders: write one, damage it, and say which modules differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exporters.driver import get_exporter, make_plan
from exporters.plan import ExportOptions, ExportPlan
from exporters.verify import verify
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import VerificationError

DAMAGED = "model.layers.0.self_attn.k_proj"

Damage = Callable[[Path], None]


def write_export(checkpoint: L4QCheckpoint, name: str, folder: Path, **options: Any) -> ExportPlan:
    """Plan and write into a new folder, without the driver's own verification."""
    choices = ExportOptions(**options)
    plan = make_plan(checkpoint, name, choices)
    folder.mkdir()
    get_exporter(name).write(checkpoint, plan, folder, choices, lambda tensor: None)
    return plan


def wrong_modules(checkpoint: L4QCheckpoint, name: str, folder: Path) -> list[str]:
    """What the foreign decoder says of a folder: differing modules, or its refusal."""
    try:
        return list(verify(checkpoint, get_exporter(name), folder).differing)
    except VerificationError as error:
        return [str(error)]


def edit_tensor(suffix: str, change: Callable[[torch.Tensor], None]) -> Damage:
    """Damage one tensor of DAMAGED in place."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors[f"{DAMAGED}.{suffix}"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_config(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Lie in the quantization config."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def section(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    return dict(config["quantization_config"])


def flip_nibble(words: torch.Tensor) -> None:
    """Change one code by one."""
    words[3, 5] ^= 1 << 12


def next_scale(scales: torch.Tensor) -> None:
    """Move one scale to its neighbour in fp16."""
    scales.view(torch.int16)[1, 1] += 1


def swap_rows(words: torch.Tensor) -> None:
    """Exchange two rows of the stored matrix."""
    words[[2, 9]] = words[[9, 2]]


def lower_zeros(words: torch.Tensor) -> None:
    """Store z - 1, GPTQ v1's convention, where z belongs; zero-points of at least 1 do not borrow."""
    words -= 0x11111111


def shift_half(words: torch.Tensor) -> None:
    """Store signed fields (value - 8 modulo 16) where unsigned ones belong."""
    words ^= -0x77777778


def support(plan: ExportPlan, runtime: str) -> tuple[bool, str]:
    """(loads, reason) of a runtime."""
    row = next(row for row in plan.runtimes if row.runtime == runtime)
    return row.loads, row.reason


def stored(folder: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a folder with one shard."""
    return load_file(folder / "model.safetensors")
