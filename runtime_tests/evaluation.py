"""Perplexity of a checkpoint or an export in the runtime it is made for, and task scores of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4q.errors import UnsupportedError, UsageError
from l4q.evaluate import Perplexity
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.targets import ParityTarget, detect

PLAIN = "hf"
TASK_FORMATS = ("l4q", PLAIN)

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How engines are started."""

    threads: int = 2
    timeout_s: float = 900.0
    pythons: dict[str, str] | None = None
    """Engine name -> interpreter that has its runtime."""


def find_target(folder: Path, engine: str | None = None) -> ParityTarget:
    """What a folder is and which engine reads it; a plain Hugging Face folder runs in torch.

    Args:
        folder: An L4Q checkpoint, an export, or a Hugging Face model.
        engine: Use this engine instead of the format's own.

    Raises:
        UsageError: The folder is none of those.
        UnsupportedError: The export's own manifest says that its runtime does not load it.
    """
    if _is_plain(folder):
        target = ParityTarget(format=PLAIN, engine="torch", variant="", folder=folder)
    else:
        target = detect(folder)[0]
    if engine is None or engine == target.engine:
        if target.refused:
            raise UnsupportedError(
                "the runtime of this export does not load it",
                where=folder,
                got=target.refused,
                remedy="evaluate the checkpoint it was made from, or an export whose plan names a runtime",
            )
        return target
    return ParityTarget(format=target.format, engine=engine, variant=target.variant, folder=folder)


def engine_perplexity(
    target: ParityTarget, windows: Sequence[list[int]], options: EngineOptions, progress: Progress = lambda _: None
) -> tuple[Perplexity, dict[str, Any]]:
    """Perplexity over windows in the target's engine, and what the engine says about itself.

    Raises:
        EngineError: The engine does not load the folder, or fails.
    """
    total, tokens = 0.0, 0
    with RemoteEngine(
        target.engine,
        target.folder,
        python=(options.pythons or {}).get(target.engine),
        timeout_s=options.timeout_s,
        threads=options.threads,
        **target.engine_options(max(map(len, windows), default=0)),
    ) as engine:
        for window in windows:
            answers = engine.prompt_logprobs(list(window))  # [window, vocab]
            picked = answers[np.arange(len(window) - 1), np.array(window[1:])]
            total -= float(picked.astype(np.float64).sum())
            tokens += len(window) - 1
            progress(1)
        info = engine.info()
    return Perplexity(nll=total, tokens=tokens), info


def load_for_tasks(target: ParityTarget) -> tuple[Any, Any]:
    """The target as a transformers model and tokenizer.

    Raises:
        UnsupportedError: transformers does not read the format.
    """
    if target.format not in TASK_FORMATS:
        raise UnsupportedError(
            "tasks run through a transformers model",
            where=target.folder,
            got=target.format,
            expected=" or ".join(TASK_FORMATS),
            remedy="give the checkpoint the export was made from: exports hold its weights bit for bit",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Importing l4q (above) has taught transformers the L4Q format.
    model = AutoModelForCausalLM.from_pretrained(target.folder, dtype=torch.float32)
    if target.format == "l4q":
        model = model.dequantize()  # once, instead of in every forward pass
    return model.eval(), AutoTokenizer.from_pretrained(target.folder)


def _is_plain(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file() or not any(folder.glob("*.safetensors")):
        return False
    try:
        return "quantization_config" not in json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("config.json is not JSON", where=path, got=error) from error
