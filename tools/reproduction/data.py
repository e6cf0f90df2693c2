"""Token ids of the comparison: training sequences and held-out windows, tokenized once per model and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l4q.data import load_training_data
from l4q.errors import UsageError
from l4q.evaluate import text_windows
from tools.reproduction.recipe import Recipe

HELD_OUT = ("wiki_demo", "heldout")
"""Whole Wikipedia articles (the headline figure), and held-out documents of the training text's own kind."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the cells of one recipe read."""

    train: np.ndarray
    """int32 [sequences, length]."""
    held_out: dict[str, np.ndarray]
    """Text name -> int32 [windows, window]."""

    def batches(self, recipe: Recipe, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(calibration batches, one batch per step), disjoint while the text lasts, in an order the seed decides.

        Raises:
            UsageError: The text holds fewer sequences than calibration and one step need.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        if len(order) < recipe.calibration + recipe.batch:
            raise UsageError(
                "the training text is too short for the recipe",
                got=f"{len(order)} sequences of {recipe.length} tokens",
                expected=f"at least {recipe.calibration + recipe.batch}",
                remedy="shorten the sequences or use more text",
            )
        rows = torch.from_numpy(self.train).long()
        pool = order[recipe.calibration :]
        picks = [pool[torch.arange(i * recipe.batch, (i + 1) * recipe.batch) % len(pool)] for i in range(recipe.steps)]
        calibration = rows[order[: recipe.calibration]].split(recipe.batch)
        return list(calibration), [rows[pick] for pick in picks]


def load_tokens(recipe: Recipe, assets: Path, cache: Path) -> Tokens:
    """Read the cached ids of a recipe, tokenizing the texts first if they are not there."""
    path = cache / f"tokens-{recipe.model}-{recipe.length}-{recipe.eval_window}x{recipe.eval_windows}.npz"
    if not path.is_file():
        stage = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(stage, **_tokenize(recipe, assets))
        os.replace(stage, path)
    with np.load(path, allow_pickle=False) as arrays:
        return Tokens(train=arrays["train"], held_out={name: arrays[name] for name in HELD_OUT})


def _tokenize(recipe: Recipe, assets: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / recipe.model)
    data = load_training_data((assets / "text" / "train.txt",), tokenizer, max_length=recipe.length)
    full = [example.input_ids for example in data.examples if len(example.input_ids) == recipe.length]
    arrays = {"train": np.array(full, dtype=np.int32)}
    for name in HELD_OUT:
        text = (assets / "text" / f"{name}.txt").read_text(encoding="utf-8")
        windows = text_windows(tokenizer, text, recipe.eval_window, recipe.eval_windows)
        arrays[name] = np.array(windows, dtype=np.int32)
    return arrays
