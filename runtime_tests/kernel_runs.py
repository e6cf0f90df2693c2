"""Short training runs with chosen kernels, how far their integers are apart, and kernels with defects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.kernels.numba_kernels import NumbaPasses
from l4q.quant import GridParams
from l4q.train import train
from runtime_tests.train_runs import base_options

SMALL_RUN: dict[str, Any] = {
    "lora": LoraConfig(rank=4, target_modules=("*.q_proj", "*.down_proj")),
    "quant": QuantConfig(group_size=-1, zero_point="integer"),
    "steps": 3,
    "max_length": 32,
}
"""Changes for kernels that are interpreted."""


def few_steps(glassllm_dir: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The result of six optimizer steps on glassllm with changed options, see `l4q.train.train`."""
    folder.mkdir()
    options = base_options(glassllm_dir, folder)
    return train(replace(options, **{"steps": 6, "grad_accum": 1, **changes}))


def changed_codes(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Share of the codes that differ between two runs' checkpoints."""
    first, second = (L4QCheckpoint.open(result["checkpoint"]) for result in (left, right))
    counts = np.array(
        [
            ((ours := first.quantized(name).codes) != second.quantized(name).codes).sum() / ours.size
            for name in first.modules
        ]
    )
    return float(counts.mean())


class Broken(NumbaPasses):
    """Passes with one defect, of the kind that looks right at a glance."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """W_q with the defect."""
        if self.defect == "reciprocal":  # what a compiler makes of a division with fast-math
            inverse = 1 / params.scales.unsqueeze(-1)
            position = (merged.view(*params.scales.shape, -1) - params.mins.unsqueeze(-1)) * inverse
            codes = position.clamp(0, max_code).round()
            out.copy_((codes * params.scales.unsqueeze(-1) + params.mins.unsqueeze(-1)).view_as(out))
            return
        super().quantize(merged, params, max_code - (self.defect == "clamp"), out)

    def codes(self, merged: torch.Tensor, params: GridParams, max_code: int) -> torch.Tensor:
        """Codes with the defect."""
        found = super().codes(merged, params, max_code)
        if self.defect == "half up":  # ties go to the greater code, not to the even one
            position = (merged.view(*params.scales.shape, -1) - params.mins.unsqueeze(-1)) / params.scales.unsqueeze(-1)
            found = (position.clamp(0, max_code) + 0.5).floor().to(torch.uint8).view_as(found)
        return found

    def differentiate(
        self, merged: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients with the defect."""
        grad_s, grad_m = super().differentiate(merged, params, max_code, grad_w, out)
        if self.defect == "mask":  # the straight-through mask forgotten
            merged.copy_(grad_w)
        if self.defect == "group":  # one group's sum lost
            grad_m[3, 1] = 0
        return grad_s, grad_m
