"""What every method works with: the model, the data, one training loop, and the measurement of what it deploys."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

from l4q.config import LoraConfig
from l4q.distill import divergence, learned_positions, teacher_logits
from l4q.errors import L4QError
from l4q.evaluate import windows_perplexity
from l4q.train_options import OptimOptions
from l4q.weight import QuantizedWeight
from tools.measure import peak_bytes, reset_peak, timed
from tools.reproduction.data import Tokens
from tools.reproduction.quantizers import stored_bits
from tools.reproduction.recipe import Cell, Recipe

LOSS_SPAN = 10


class DivergedCellError(L4QError):
    """A cell whose loss became NaN or infinite."""

    exit_code = 4


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """One row's figures for one model as a runtime loads it."""

    row: str
    bits: int
    perplexity: dict[str, float]
    """Held-out text -> perplexity."""
    bits_per_weight: float
    """Stored bits per weight of the adapted layers: codes, scales, zero-points and, if mixed, A and B."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Benchmark -> accuracy; empty unless asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainFacts:
    """What training cost."""

    step_seconds: float
    """Median."""
    peak_bytes: int
    """Peak during training above what the process held before the model was loaded."""
    final_loss: float
    """Mean over the last steps."""
    steps: int


class Workbench:
    """Everything a method's `run` needs for one cell.

    Args:
        cell: What to run.
        recipe: Shared settings.
        tokens: Training and held-out ids.
        bits: All widths of the run, for methods whose training does not depend on them.
        assets: Folder of models, texts and benchmarks.
        variant: The method's variant.
    """

    def __init__(self, cell: Cell, recipe: Recipe, tokens: Tokens, bits: tuple[int, ...], assets: Path, variant: str):
        self.cell, self.recipe, self.tokens, self.all_bits = cell, recipe, tokens, bits
        self.assets, self.variant = assets, variant
        self.facts: TrainFacts | None = None
        self.notes: dict[str, Any] = {}
        self._floor = reset_peak(recipe.device)

    @property
    def bits(self) -> int:
        """The cell's width.

        Raises:
            ValueError: The method does not depend on bits.
        """
        if self.cell.bits is None:
            raise ValueError(f"{self.cell.name} has no bit width")
        return self.cell.bits

    @property
    def lora(self) -> LoraConfig:
        """Rank and alpha of the recipe."""
        return LoraConfig(rank=self.recipe.rank, alpha=self.recipe.alpha)

    @property
    def optim(self) -> OptimOptions:
        """Learning rates of the recipe."""
        recipe = self.recipe
        return OptimOptions(
            lr=recipe.lr,
            scale_lr=recipe.scale_lr,
            offset_lr=recipe.offset_lr,
            weight_decay=recipe.weight_decay,
            warmup_ratio=recipe.warmup_ratio,
            max_grad_norm=recipe.max_grad_norm,
        )

    def load(self) -> Any:
        """The original model in float32, in evaluation mode."""
        set_seed(self.cell.seed)
        model = AutoModelForCausalLM.from_pretrained(self.assets / self.recipe.model, dtype=torch.float32)
        return model.to(self.recipe.device).requires_grad_(False).eval()

    def targets(self, model: Any) -> dict[str, nn.Linear]:
        """The layers every method adapts: all linear ones but the head, if the group size divides them."""
        head = model.get_output_embeddings()
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
            if module.in_features % self.recipe.group_size == 0
        }

    @cached_property
    def _batches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        calibration, steps = self.tokens.batches(self.recipe, self.cell.seed)
        device = self.recipe.device
        return [batch.to(device) for batch in calibration], [batch.to(device) for batch in steps]

    @property
    def calibration(self) -> list[torch.Tensor]:
        """Calibration batches for GPTQ."""
        return self._batches[0]

    def train(self, model: Any, groups: Iterable[Any], *, distill: float = 0.0) -> None:
        """AdamW, linear warm-up, cosine decay, gradient clipping; fills `facts`.

        Args:
            model: Called with input_ids and labels.
            groups: Parameters or AdamW parameter groups.
            distill: Share of the loss that is the divergence from the unquantized model, for wrapped models.

        Raises:
            DivergedCellError: A loss is not finite.
        """
        recipe, device = self.recipe, self.recipe.device
        optimizer = torch.optim.AdamW(list(groups), lr=recipe.lr, weight_decay=recipe.weight_decay)
        warmup = math.ceil(recipe.warmup_ratio * recipe.steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        model.train()

        def step(ids: torch.Tensor) -> float:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.amp):
                loss = training_loss(model, ids, distill)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        seconds, losses = [], []
        reset_peak(device)
        for number, ids in enumerate(self._batches[1]):
            loss, took = timed(device, lambda ids=ids: step(ids))
            if not math.isfinite(loss):
                raise DivergedCellError(
                    "the loss is not finite", where=f"{self.cell.name}, step {number + 1}", got=loss
                )
            seconds.append(took)
            losses.append(loss)
        self.facts = TrainFacts(
            step_seconds=statistics.median(seconds),
            peak_bytes=peak_bytes(device) - self._floor,
            final_loss=statistics.fmean(losses[-LOSS_SPAN:]),
            steps=len(losses),
        )
        model.eval()

    def deployed_quantized(self, row: str, weights: Mapping[str, QuantizedWeight]) -> Deployed:
        """Measure the original model with integers in the place of the target layers."""
        model = self.load()
        place(model, weights)
        bits = next(iter(weights.values())).bits
        return self.deployed(row, model, bits, sum(stored_bits(weight) for weight in weights.values()))

    def deployed(self, row: str, model: Any, bits: int, stored: int) -> Deployed:
        """Measure a model that holds its deployed weights, `stored` bits in the target layers."""
        model.eval()
        weights = sum(layer.weight.numel() for layer in self.targets(self.load()).values())
        figures = {
            name: windows_perplexity(model, windows.tolist(), batch_size=self.recipe.batch).value
            for name, windows in self.tokens.held_out.items()
        }
        return Deployed(
            row=row, bits=bits, perplexity=figures, bits_per_weight=stored / weights, accuracy=self._accuracy(model)
        )

    def _accuracy(self, model: Any) -> dict[str, float]:
        if not self.recipe.benchmark_items:
            return {}
        from tools.reproduction.benchmarks import accuracies

        return accuracies(model, self.assets, self.recipe)


def training_loss(model: Any, ids: torch.Tensor, distill: float) -> torch.Tensor:
    """Mean loss on ids [batch, length], of which a share is the divergence from the unquantized model."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    teacher = teacher_logits(model, inputs) if distill else None
    outputs = model(**inputs, labels=ids)
    loss: torch.Tensor = outputs.loss
    if teacher is None:
        return loss
    return (1 - distill) * loss + distill * divergence(outputs.logits, teacher, ids) / learned_positions(ids)


@torch.no_grad()
def place(model: Any, weights: Mapping[str, QuantizedWeight]) -> None:
    """Overwrite the named layers of a plain model with the dequantized integers."""
    for name, weight in weights.items():
        target = model.get_submodule(name).weight
        target.copy_(torch.from_numpy(weight.dequantize()))
