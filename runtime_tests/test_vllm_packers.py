"""vLLM's own Python unpackers find the trained codes in GPTQ, AWQ and compressed-tensors folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.converter_mistakes import flipped, plain_nibbles, tensors
from runtime_tests.engines.host import COMMON_ENV, ENGINE_ENV
from runtime_tests.hf_exports import write_export
from runtime_tests.tiny_llama import tiny_checkpoint

SCRIPT = Path(__file__).resolve().parent / "vllm_packers.py"
KINDS = {
    "gptq 4": ("gptq", 4),
    "awq 4": ("awq", 4),
    "compressed-tensors 4": ("compressed-tensors", 4),
    "gptq 2 dense": ("gptq", 2),
    "compressed-tensors 2 dense": ("compressed-tensors", 2),
}
DAMAGED = {
    "gptq 4": tensors("k_proj.qweight", flipped),
    "awq 4": tensors("k_proj.qweight", plain_nibbles),
    "compressed-tensors 2 dense": tensors("k_proj.weight_packed", flipped),
}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[L4QCheckpoint, dict[str, np.ndarray]]]:
    """Per folder, correct and damaged: the checkpoint and the codes that vLLM's functions see; one process for all."""
    base = tmp_path_factory.mktemp("packers")
    quant = {bits: QuantConfig(bits=bits, zero_point="integer", group_size=32) for bits in (2, 4)}
    checkpoints = {bits: tiny_checkpoint(base / str(bits), grid) for bits, grid in quant.items()}
    arguments, sources = [], {}
    for kind, (name, bits) in KINDS.items():
        write_export(checkpoints[bits], name, base / kind, container_bits=bits)
        sources[kind] = checkpoints[bits]
        arguments.append(f"{name}:{bits}:{base / kind}")
        if kind in DAMAGED:
            shutil.copytree(base / kind, base / f"damaged {kind}")
            DAMAGED[kind](base / f"damaged {kind}")
            sources[f"damaged {kind}"] = checkpoints[bits]
            arguments.append(f"{name}:{bits}:{base / f'damaged {kind}'}")
    environment = {**os.environ, **COMMON_ENV, **ENGINE_ENV["vllm"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {kind: (source, load_file(base / kind / "codes.safetensors")) for kind, source in sources.items()}


def wrong(checkpoint: L4QCheckpoint, codes: dict[str, np.ndarray]) -> list[str]:
    """Modules whose codes are not the trained ones."""
    return [
        module
        for module in checkpoint.modules
        if module not in codes or not np.array_equal(codes[module], checkpoint.quantized(module).codes)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_codes_are_found(
    decoded: dict[str, tuple[L4QCheckpoint, dict[str, np.ndarray]]], kind: str
) -> None:
    """Every code of every module, whole words and dense 2-bit words."""
    assert wrong(*decoded[kind]) == []


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_found(decoded: dict[str, tuple[L4QCheckpoint, dict[str, np.ndarray]]], kind: str) -> None:
    """The twin: one bit, or AWQ's columns in another order, in the two k_proj and nowhere else."""
    assert wrong(*decoded[f"damaged {kind}"]) == [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
