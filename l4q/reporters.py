"""TensorBoard and Weights & Biases: whether the packages that the Trainer's callbacks need are there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from l4q.errors import UsageError

# reporter -> the modules of which its callback takes the first it finds
MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def require_reporters(names: Sequence[str]) -> None:
    """Check before anything is loaded, not at the first step.

    Raises:
        UsageError: A package is missing.
    """
    for name in names:
        if not any(find_spec(module) for module in MODULES[name]):
            raise UsageError(
                "a package that --report-to needs is not installed",
                where=f"--report-to {name}",
                expected=" or ".join(MODULES[name]),
                remedy=f"pip install {MODULES[name][0]}",
            )


def finish_reporters(names: Sequence[str]) -> None:
    """End the run at Weights & Biases now: at the process's end its last words would land on the command's stdout."""
    if "wandb" in names:
        import_module("wandb").finish()
