"""What tools.bench_train measures: methods, and cases by device."""

from __future__ import annotations

from dataclasses import dataclass

from l4q.config import KernelChoice

METHODS = ("l4q", "lora", "qat-lora-naive", "qat-full")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and batch that all methods are measured on."""

    name: str
    model: str
    """A key of SHAPES (random weights), or a folder under build/assets."""
    batch: int
    length: int
    """Tokens per sequence."""
    steps: int
    """Timed steps per process, after one that is not timed."""
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    kernels: KernelChoice = "auto"
    """Of L4Q's layers."""


CASES: dict[str, tuple[Case, ...]] = {
    "quick": (Case(name="tiny", model="tiny", batch=1, length=512, steps=2),),
    "cpu": (Case(name="smollm2", model="smollm2", batch=1, length=1024, steps=2),),
    "cuda": tuple(
        Case(
            name=f"{model}{' + checkpointing' if checkpointing else ''}",
            model=model,
            batch=1,
            length=2048,
            steps=5,
            device="cuda",
            dtype="bfloat16",
            checkpointing=checkpointing,
        )
        for model in ("1b", "7b")
        for checkpointing in (True, False)
    ),
}
