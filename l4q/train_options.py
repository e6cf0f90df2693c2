"""The options of a training run, as frozen dataclasses that the command line only fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from l4q.config import BaseStorage, GridLearning, Init, KernelChoice, LoraConfig, QuantConfig, check_init
from l4q.errors import UsageError
from l4q.rules import Override

TrainDtype = Literal["float32", "bfloat16"]
Amp = Literal["none", "bfloat16"]
OptimState = Literal["float32", "bfloat16", "8bit"]
Reporter = Literal["none", "tensorboard", "wandb"]

# A step size s is one number for a whole group of weights, so it wants smaller steps than LoRA's entries.
SCALE_LR_RATIO = 1 / 20
MOST_COUNT = 10**9
MOST_EPOCHS = 10**6
MOST_SEED = 1 << 32
"""NumPy's generators take 32 bits."""


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW with one learning rate per kind of parameter, linear warm-up, then cosine decay to zero.

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 1e-3
    """Peak learning rate of A and B."""
    scale_lr: float | None = None
    """Peak learning rate of the scales s, in weight units; None: lr / 20."""
    offset_lr: float | None = None
    """Peak learning rate of the offsets b, in weight units; None: lr / 20."""
    weight_decay: float = 0.01
    """Acts on A and B only: decaying s or b would pull the grid towards zero."""
    warmup_ratio: float = 0.1
    """Share of all steps spent warming up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this total norm; 0 = no clipping."""
    state: OptimState = "float32"
    """How AdamW's moments are kept: "bfloat16" halves them, "8bit" needs bitsandbytes."""

    def __post_init__(self) -> None:
        """Fill in the derived learning rates and check ranges."""
        for name in ("scale_lr", "offset_lr"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.lr * SCALE_LR_RATIO)
        for name in ("lr", "scale_lr", "offset_lr", "weight_decay", "max_grad_norm"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number >= 0")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "a share in [0, 1)")
        require(self.state in get_args(OptimState), "optim_state", self.state, f"one of {get_args(OptimState)}")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Held-out perplexity before, at the start of, and after training."""

    text: Path | None = None
    """UTF-8 text file; None = no evaluation."""
    window: int | None = None
    """Tokens per window; None: 512, or the model's context if that is shorter."""
    windows: int = 12
    """Number of windows, from the middle of the text."""
    every: int | None = None
    """Optimizer steps between measurements during training; None = only before and after."""

    def __post_init__(self) -> None:
        """Check ranges, and that there is something to measure."""
        require(1 <= self.windows <= MOST_COUNT, "eval_windows", self.windows, f"from 1 to {MOST_COUNT}")
        require(self.window is None or self.window >= 2, "eval_window", self.window, "at least 2 tokens")
        require(self.every is None or self.every >= 1, "eval_every", self.every, ">= 1")
        require(self.every is None or self.text is not None, "eval_every", self.every, "with an --eval-text to measure")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything `l4q.train.train` needs.

    Raises:
        UsageError: Options that contradict each other or are out of range.
    """

    model: str
    """Hugging Face model id or folder, pre-quantized by GPTQ, AWQ or compressed-tensors or not, or a GGUF file."""
    data: tuple[Path, ...]
    """Training files, see `l4q.data_records`."""
    out: Path
    """Run folder."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimOptions = field(default_factory=OptimOptions)
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    overrides: tuple[Override, ...] = ()
    """Other grids for the modules that a pattern matches; of several the first holds."""
    skip: tuple[str, ...] = ()
    """Patterns of target modules that stay dense."""
    quantize_head: bool = False
    """Quantize the output head too; refused where it is the embedding matrix."""
    init: Init | None = None
    """How scales and offsets start, see `l4q.init`; None: see `start_init`."""
    calibration: int | None = None
    """Training sequences that init "calibrated" and "reconstructed" look at; None: 16, and 128 for "reconstructed"."""
    reconstruct_epochs: int = 2
    """Passes over them per block with init "reconstructed"."""
    reconstruct_settle: float = 0.5
    """How far its W0 is drawn towards its codes, see `l4q.reconstruct`."""
    learning: GridLearning = field(default_factory=GridLearning)
    lora_warmup_steps: int = 0
    """First optimizer steps that train plain LoRA; then s and b start from the merged weights."""
    leave_dense: bool = False
    """Leave layers dense whose in_features the group size does not divide."""
    distill: float = 0.0
    """Share of the loss that is the divergence from the original model's predictions, see `l4q.distill`."""
    steps: int | None = None
    """Optimizer steps; None = go by epochs."""
    epochs: float | None = None
    """Passes over the data; None = one, unless steps is given."""
    batch_size: int = 1
    """Sequences per forward pass."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    max_length: int | None = None
    """Tokens per sequence; None: 1024, or the model's context if that is shorter."""
    seed: int = 0
    """Fixes LoRA's initial A, the order of the data and dropout."""
    dtype: TrainDtype = "float32"
    """Dtype of the frozen weights and the activations; A, B, s and b are always float32."""
    amp: Amp = "none"
    """"bfloat16": autocast, float32 weights and bfloat16 products; W0, A, B, s, b and the merge stay in float32."""
    base_storage: BaseStorage = "dense"
    """How the frozen W0 is kept: dense, in 8- or 4-bit blocks, or as a pre-quantized start's integers (`l4q.base`)."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    kernels: KernelChoice = "auto"
    """How layers compute W_q and its gradients, see `l4q.kernels`: "auto" picks the fastest of the device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; read it first. Not with fsdp; a checkpoint does not carry the code."""
    fsdp: bool = False
    """Shard the model over the processes of a launcher (FSDP2) instead of giving each a copy (DDP)."""
    save_every: int = 100
    """Optimizer steps between saved states; the last step is always saved."""
    keep_states: int = 2
    """Saved states to keep, newest first."""
    resume: bool = False
    """Continue the run in `out`, or start it if there is none."""
    overwrite: bool = False
    """Delete the run in `out` first."""
    report_to: tuple[str, ...] = ()
    """Where the figures of every step also go: "tensorboard" (RUN/tensorboard), "wandb" (Weights & Biases)."""

    def __post_init__(self) -> None:
        """Fill in what depends on other options, and check ranges and contradictions."""
        if self.calibration is None:
            object.__setattr__(self, "calibration", 128 if self.init == "reconstructed" else 16)
        require(bool(self.data), "data", "no file", "at least one training file")
        require(self.steps is None or self.epochs is None, "steps", "both steps and epochs", "one of the two")
        require(not (self.resume and self.overwrite), "resume", "both resume and overwrite", "one of the two")
        require(self.epochs is None or 0 < self.epochs <= MOST_EPOCHS, "epochs", self.epochs, "> 0, at most 1e6")
        for name in ("distill", "reconstruct_settle"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share from 0 to 1")
        require(0 <= self.seed < MOST_SEED, "seed", self.seed, f">= 0 and below {MOST_SEED}")
        require(self.dtype in get_args(TrainDtype), "dtype", self.dtype, f"one of {get_args(TrainDtype)}")
        require(self.amp in get_args(Amp), "amp", self.amp, f"one of {get_args(Amp)}")
        fits = self.amp == "none" or self.dtype == "float32"  # bfloat16 weights need no autocast
        require(fits, "amp", f"{self.amp} with dtype {self.dtype}", "amp none, or dtype float32")
        storages = get_args(BaseStorage)
        require(self.base_storage in storages, "base_storage", self.base_storage, f"one of {storages}")
        kernels = get_args(KernelChoice)
        require(self.kernels in kernels, "kernels", self.kernels, f"one of {kernels}")
        reporters = get_args(Reporter)[1:]
        require(set(self.report_to) <= set(reporters), "report_to", self.report_to, f"some of {reporters}")
        for name in ("batch_size", "grad_accum", "save_every", "keep_states", "calibration", "reconstruct_epochs"):
            require(1 <= getattr(self, name) <= MOST_COUNT, name, getattr(self, name), f"from 1 to {MOST_COUNT}")
        require(self.steps is None or 1 <= self.steps <= MOST_COUNT, "steps", self.steps, f"from 1 to {MOST_COUNT}")
        require(not (self.fsdp and self.trust_remote_code), "trust_remote_code", "with fsdp", "one process, or DDP")
        require(
            not (self.fsdp and self.init in ("calibrated", "reconstructed")),
            "init",
            f"{self.init} with fsdp",
            "another initialisation, as this one needs the whole model in every process",
        )
        require(
            not (self.distill and self.init == "reconstructed"),
            "distill",
            "with init reconstructed",
            "one of the two: reconstruction replaces W0, which would be the teacher",
        )
        require(
            not self.learning.move_base or self.init == "reconstructed",
            "move_base",
            f"with init {self.start_init}",
            "init reconstructed, whose W0 was found together with its grid",
        )
        for grid in (self.quant, *(override.apply(self.quant) for override in self.overrides)):
            check_init(self.start_init, grid)
        warmup, longest = self.lora_warmup_steps, float("inf") if self.steps is None else self.steps
        require(0 <= warmup < longest, "lora_warmup_steps", warmup, "at least 0 and fewer than the run's steps")

    @property
    def start_init(self) -> Init:
        """The initialisation: the one given, else "calibrated", or "l4q" with fsdp, where no process has the model."""
        return self.init or ("l4q" if self.fsdp else "calibrated")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: object = None) -> TrainOptions:
        """The options that `to_dict` made plain; options a run's version did not have yet get their defaults.

        Raises:
            UsageError: An option is unknown or required ones are missing.
        """
        rest = dict(values)
        known = {item.name for item in fields(cls)}
        odd = sorted(rest.keys() - known) or sorted({"model", "data", "out"} - rest.keys())
        if odd:
            raise UsageError(
                "the recorded options are not those of this version",
                where=where,
                got=sorted(rest),
                expected=f"without unknown and with all required ones; odd: {odd}",
                remedy="use the version of l4q that the run's config.json names",
            )
        made: dict[str, Any] = {
            name: kind(**_typed(rest.pop(name))) for name, kind in _SECTIONS.items() if name in rest
        }
        return cls(**made, **_typed(rest))

    def identity(self) -> dict[str, Any]:
        """The options that decide the trained weights; the data is identified by its hash instead."""
        return {key: value for key, value in self.to_dict().items() if key not in _INCIDENTAL}


_SECTIONS = {
    "quant": QuantConfig,
    "lora": LoraConfig,
    "optim": OptimOptions,
    "evaluation": EvalOptions,
    "learning": GridLearning,
}
# option -> its type, where that is not the JSON one
_TYPES: dict[str, Callable[[Any], Any]] = {
    "data": lambda paths: tuple(map(Path, paths)),
    "out": Path,
    "text": lambda path: None if path is None else Path(path),
    "target_modules": tuple,
    "skip": tuple,
    "report_to": tuple,
    "overrides": lambda overrides: tuple(Override(**override) for override in overrides),
}
_INCIDENTAL = (
    "data",
    "out",
    "evaluation",
    "save_every",
    "keep_states",
    "resume",
    "overwrite",
    "fsdp",
    "kernels",
    "report_to",
    "trust_remote_code",
)


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Refuse an option value.

    Raises:
        UsageError: `condition` is false.
    """
    if not condition:
        raise UsageError("an option has an unsupported value", where=option, got=got, expected=expected)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _TYPES[key](value) if key in _TYPES else value for key, value in values.items()}
