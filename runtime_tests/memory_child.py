"""Peaks of memory in a process of its own: two models that differ in the number of layers, frozen, exported, evaluated.

Run as `python -m runtime_tests.memory_child SOURCE WORK`; SOURCE gives tokenizer and config. The last line of output is
a JSON object: what was done -> [bytes above what was resident before, for the small model and for the large one].
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exporters.driver import EXPORTERS, export
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.model import save_l4q, wrap_linears

LAYERS = (2, 34)
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def growth(work: Callable[[], object]) -> int:
    """How far the resident memory rose above its present size while `work` ran; every kind of page counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed would hide what this work takes
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from here
    work()
    return status("VmHWM") - before


def least(work: Callable[[], object]) -> int:
    """The least of two growths: on a busy machine threads wait for each other, and mapped pages are dropped."""
    return min(growth(work) for _ in range(2))


def random_model(source: Path, layers: int) -> Any:
    """A wrapped llama with random weights and the vocabulary of `source`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, **SIZES, head_dim=64, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wrap_linears(model, QuantConfig(), LoraConfig(rank=2))
    return model


def freeze(model: Any, source: Path, folder: Path) -> int:
    """The peak of freezing and saving."""
    return growth(lambda: save_l4q(model, folder, quant=QuantConfig(), side_files_from=source))


def load(folder: Path) -> Any:
    """The checkpoint as transformers loads it: codes and scales, no float weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def evaluate(model: Any) -> None:
    """One forward over a few tokens."""
    model(torch.arange(8)[None])


def hold(checkpoint: L4QCheckpoint) -> list[object]:
    """What no exporter may do: keep every module's packed codes."""
    return [checkpoint.packed(module) for module in checkpoint.modules]


def measure(source: Path, folder: Path, layers: int) -> dict[str, int]:
    """Every peak for one number of layers."""
    saved = folder / "checkpoint"
    peaks = {"freeze": freeze(random_model(source, layers), source, saved)}
    checkpoint = L4QCheckpoint.open(saved)
    for name in EXPORTERS:
        peaks[name] = least(lambda name=name: export(checkpoint, name, folder / name, overwrite=True))  # type: ignore[misc]
    peaks["hold"] = growth(lambda: hold(checkpoint))
    peaks["bytes"] = (saved / "model.safetensors").stat().st_size
    loaded = load(saved)
    evaluate(loaded)  # its weights are mapped and come in when they are first used
    peaks["evaluate"] = least(lambda: evaluate(loaded))
    peaks["dequantize"] = growth(lambda: loaded.dequantize())
    return peaks


def main(source: Path, work: Path) -> None:
    """Measure a small model for what is loaded once, then both."""
    found = [measure(source, work / str(number), layers) for number, layers in enumerate((LAYERS[0], *LAYERS))][1:]
    print(json.dumps({name: [peaks[name] for peaks in found] for name in found[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
