"""Short training runs with chosen kernels, and how far their integers are apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
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
