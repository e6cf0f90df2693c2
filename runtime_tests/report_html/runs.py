"""Runs as series of figures by step: run folders of l4q-train, and what transformers' Trainer leaves behind."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4q.errors import UsageError

Series = list[tuple[float, float]]
"""(step, value), in order of steps, each step once."""
FIGURES = {
    "loss": 1.0,
    "held_out_perplexity": 1.0,
    "scale_drift": 100.0,
    "clipped": 100.0,
    "zero_point_moves": 100.0,
    "grad_norm": 1.0,
    "tokens_per_s": 1.0,
    "memory_mb": 1.0,
}
"""What is read, with the factor it is shown with: shares become percent."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of one run."""

    name: str
    kind: str
    """"l4q-train" or "Trainer"."""
    series: dict[str, Series]
    """By the names of `FIGURES`; what was not measured is absent."""
    base: float | None = None
    """Perplexity of the 16-bit model before training."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run was, in a few words."""


def read_run(path: Path) -> Run:
    """Read a run, finished or not.

    Args:
        path: A run folder of l4q-train; or an output or checkpoint folder of transformers' Trainer, or its
            trainer_state.json, whose eval_loss becomes a perplexity.

    Raises:
        UsageError: It is neither, or holds no step.
    """
    metrics = path / "metrics.jsonl"
    if metrics.is_file():
        run = _own(path, _lines(metrics))
    else:
        state = _trainer_state(path)
        run = _foreign(path, _load(state)["log_history"])
    if not run.series.get("loss"):
        raise UsageError("the run has no logged step yet", where=path, expected="at least one step")
    return run


def _own(path: Path, lines: list[dict[str, Any]]) -> Run:
    """A run of l4q-train; its perplexities before and after training, once it is finished, join the curve."""
    config, result = (_load(file) if (file := path / name).is_file() else {} for name in ("config.json", "result.json"))
    series = {name: _series(lines, name, factor) for name, factor in FIGURES.items()}
    perplexity = result.get("perplexity", {})
    held_out = dict(series["held_out_perplexity"])
    if "start" in perplexity:
        held_out[0.0] = perplexity["start"]
    if "trained" in perplexity:
        held_out[float(result["steps"])] = perplexity["trained"]
    series["held_out_perplexity"] = sorted(held_out.items())
    options = config.get("options", {})
    quant = options.get("quant", {})
    facts: dict[str, Any] = {"model": options.get("model")}
    if quant:
        grid = f"{quant['bits']} bits, group size {quant['group_size']}, zero-point {quant['zero_point']}"
        facts |= {"grid": grid, "seed": options.get("seed")}
    facts["tokens"] = lines[-1].get("tokens") if lines else None
    facts["state"] = "finished" if result else "not finished"
    return Run(
        name=path.resolve().name,
        kind="l4q-train",
        series={name: found for name, found in series.items() if found},
        base=perplexity.get("base"),
        facts={name: value for name, value in facts.items() if value is not None},
    )


def _foreign(path: Path, history: list[dict[str, Any]]) -> Run:
    """A run of transformers' Trainer, for example a 16-bit LoRA."""
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    series = {name: _series(history, name, 1.0) for name in ("loss", "grad_norm")}
    series["held_out_perplexity"] = [(float(step), math.exp(loss)) for step, loss in losses if loss < 700]
    return Run(
        name=path.resolve().parent.name if path.is_file() else path.resolve().name,
        kind="Trainer",
        series={name: found for name, found in series.items() if found},
        facts={"perplexity": "exp(eval_loss), on the texts and windows of that run"},
    )


def _series(lines: list[dict[str, Any]], name: str, factor: float) -> Series:
    """One figure; a step that stands twice, as of a run killed and continued, counts as last written."""
    found = {float(line["step"]): factor * line[name] for line in lines if isinstance(line.get(name), (int, float))}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a process may be writing."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if isinstance(entry, dict) and "step" in entry]


def _trainer_state(path: Path) -> Path:
    """trainer_state.json at a path, in it, or in its newest checkpoint."""
    folders = sorted(path.glob("checkpoint-*"), key=_number, reverse=True) if path.is_dir() else []
    for candidate in (path, path / "trainer_state.json", *(folder / "trainer_state.json" for folder in folders)):
        if candidate.is_file():
            return candidate
    raise UsageError(
        "there is no run here",
        where=path,
        got="neither metrics.jsonl nor trainer_state.json",
        expected="the --out of l4q-train, or an output folder of transformers' Trainer",
    )


def _number(folder: Path) -> int:
    return int(re.sub(r"\D", "", folder.name) or 0)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("a record of the run cannot be read", where=path, got=error) from error
    if path.name == "trainer_state.json" and "log_history" not in content:
        raise UsageError("a record of the run cannot be read", where=path, expected="log_history")
    loaded: dict[str, Any] = content
    return loaded
