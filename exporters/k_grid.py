"""Formats with one fp16 scale per group cannot hold the K grids, whose scales are fp16 numbers times integers."""

from __future__ import annotations

from exporters.hf_plan import listing
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError

REMEDY = "export to gguf (Q4_K, Q3_K) or onnx (float32 scales), or train with --scale-grid fp16"


def refuse_k_grid(checkpoint: L4QCheckpoint, label: str, *, remedy: str = REMEDY) -> None:
    """Refuse modules on a K grid for a format whose scales are fp16.

    Raises:
        UnsupportedError: There is one; the message lists them.
    """
    modules = [module for module in checkpoint.modules if checkpoint.info(module).k_grid]
    if modules:
        raise UnsupportedError(
            f"{label} stores fp16 scales; the scales of a K grid have up to 17 significant bits",
            where=listing(modules),
            got=f"scale_grid {checkpoint.info(modules[0]).k_grid}",
            expected="scale_grid fp16 or fp16_s7",
            remedy=remedy,
        )
