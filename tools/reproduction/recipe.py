"""What a run of the comparison is made of: the recipe every cell shares, and the cells."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from l4q.config import Init
from l4q.errors import UsageError
from l4q.reconstruct import ReconstructOptions

_L4Q = ("l4q-none", "l4q-integer", "l4q-float")
READ_BY = {
    "init": _L4Q,
    "reconstruct_epochs": _L4Q,
    "reconstruct_settle": _L4Q,
    "distill": _L4Q,
    "moving_lr": ("l4q-float",),
    "scale_lr": (*_L4Q, "qat-lora"),
    "offset_lr": (*_L4Q, "qat-lora"),
}
"""Settings that only some methods read."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Model, data and optimizer settings that all methods get alike.

    Raises:
        UsageError: A value is out of range.
    """

    model: str
    """Folder under build/assets."""
    group_size: int
    """Columns per scale; layers it does not divide stay dense and unadapted in every method."""
    length: int
    """Tokens per sequence."""
    batch: int
    """Sequences per step."""
    steps: int
    """Optimizer steps."""
    eval_window: int
    """Tokens per held-out window."""
    eval_windows: int
    """Windows from the middle of each held-out text."""
    calibration: int
    """Training sequences that GPTQ and the "calibrated" and "reconstructed" starts see: drawn before the first step's,
    and not trained on."""
    lr: float = 1e-3
    """Peak learning rate of LoRA's A and B in every method."""
    scale_lr: float | None = None
    """Peak learning rate of trained scales (L4Q, QAT-LoRA); None: l4q's default, lr / 20."""
    offset_lr: float | None = None
    """Peak learning rate of trained offsets (L4Q, QAT-LoRA); None: l4q's default, lr / 20."""
    rank: int = 8
    alpha: float = 16.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    init: Init = "l4q"
    """How the L4Q rows start."""
    reconstruct_epochs: int = 2
    """Passes over the calibration sequences per block with init "reconstructed"."""
    reconstruct_settle: float = 0.0
    """How far its W0 is drawn towards its codes."""
    distill: float = 0.0
    """Share of the L4Q rows' loss that is the divergence from the 16-bit model (`l4q.distill`)."""
    moving_lr: tuple[float, float] | None = None
    """If given, W0 of the L4Q rows that read it moves with its grid (`l4q.base.MovingBase`), whose s and b have these
    peak rates."""
    amp: bool = False
    """Train every method under torch.autocast: weights and grids in float32, products in bfloat16."""
    benchmark_items: int = 0
    """Questions per multiple-choice benchmark; 0 leaves benchmarks out."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("group_size", "batch", "steps", "eval_windows", "calibration", "rank"):
            if getattr(self, name) < 1:
                raise UsageError("a recipe value is out of range", where=name, got=getattr(self, name), expected=">= 1")
        if min(self.length, self.eval_window) < 2:
            raise UsageError("sequences of one token have nothing to predict", got=self.length, expected=">= 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; equal recipes give equal dictionaries."""
        return asdict(self)

    def moving(self, method: str) -> tuple[float, float] | None:
        """`moving_lr` if the method reads it."""
        return self.moving_lr if method in READ_BY["moving_lr"] else None

    def key(self, method: str) -> str:
        """Short hash that a result of `method` must carry to count as done.

        Settings that the method does not read are left out, so that changing them does not ask for it again.
        """
        values = {name: value for name, value in self.to_dict().items() if method in READ_BY.get(name, (method,))}
        if values.get("moving_lr") is None:  # what had no such setting has not changed
            values.pop("moving_lr", None)
        if values.get("init") == "reconstructed":
            values["reconstruct"] = asdict(ReconstructOptions())
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


MODELS: dict[str, Recipe] = {
    # hidden 128, so groups of 32; down_proj's 341 inputs stay dense
    "glassllm": Recipe(
        model="glassllm",
        group_size=32,
        length=128,
        batch=8,
        steps=60,
        eval_window=128,
        eval_windows=64,
        calibration=64,
        lr=1e-2,  # the better of 3e-3 and 1e-2 for 16-bit LoRA (seed 0, 100 steps)
        scale_lr=2e-4,
        offset_lr=2e-3,
        init="reconstructed",
    ),
    "smollm2": Recipe(
        model="smollm2",
        group_size=64,
        length=512,
        batch=2,
        steps=40,
        eval_window=512,
        eval_windows=12,
        calibration=128,
        lr=1e-3,
        scale_lr=5e-4,
        offset_lr=5e-5,
        init="reconstructed",
        reconstruct_settle=1.0,
        moving_lr=(6e-5, 2.5e-4),
        amp=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a method at one bit width with one seed."""

    method: str
    bits: int | None
    """None: the training does not depend on bits, and the cell reports all of them."""
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix."""
        width = "all" if self.bits is None else f"{self.bits}bit"
        return f"{self.method}-{width}-seed{self.seed}"


def plan_cells(methods: tuple[str, ...], bits: tuple[int, ...], seeds: tuple[int, ...]) -> list[Cell]:
    """All cells in the order they run: seed by seed, so that a run that is cut short still compares methods.

    Raises:
        UsageError: An unknown method.
    """
    from tools.reproduction.methods import METHODS

    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError("unknown method", got=unknown, expected=sorted(METHODS))
    cells = []
    for number, seed in enumerate(seeds):
        for method in methods:
            spec = METHODS[method]
            if spec.seeded or number == 0:
                widths: tuple[int | None, ...] = bits if spec.per_bits else (None,)
                cells += [Cell(method=method, bits=width, seed=seed) for width in widths]
    return cells
