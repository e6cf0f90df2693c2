"""One cell in a process of its own, so that its peak memory is its own and a crash is one blank cell."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from l4q.errors import L4QError
from tools.reproduction.bench import Workbench
from tools.reproduction.data import load_tokens
from tools.reproduction.methods import METHODS
from tools.reproduction.recipe import Cell, Recipe


def run_cell(cell: Cell, recipe: Recipe, bits: tuple[int, ...], assets: Path, out: Path) -> None:
    """Run one cell and write `out`/<cell>.json, complete or not at all; ends the process with 1 on an L4Q error."""
    transformers.utils.logging.disable_progress_bar()
    if recipe.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    began = time.monotonic()
    method = METHODS[cell.method]
    try:
        bench = Workbench(cell, recipe, load_tokens(recipe, assets, out), bits, assets, method.variant)
        rows = method.runner()(bench)
    except L4QError as error:
        logging.getLogger(__name__).error("%s: %s", cell.name, error)
        raise SystemExit(1) from error
    result = {
        "cell": asdict(cell),
        "recipe_key": recipe.key(cell.method),
        "recipe": recipe.to_dict(),
        "all_bits": list(bits),
        "rows": [asdict(row) for row in rows],
        "training": asdict(bench.facts) if bench.facts else None,
        "notes": bench.notes,
        "seconds": round(time.monotonic() - began, 2),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }
    target = out / f"{cell.name}.json"
    stage = target.with_suffix(".json.part")
    stage.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(stage, target)
