"""The Triton kernels without a GPU: interpreted against torch, and compiled for NVIDIA GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.kernel_runs import SMALL_RUN, changed_codes, few_steps


def check(*arguments: object, cache: Path, interpreted: bool) -> dict[str, Any]:
    """What `runtime_tests.triton_checks` prints."""
    command = [sys.executable, "-m", "runtime_tests.triton_checks", *map(str, arguments)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_interpreted_kernels_equal_eager(glassllm_dir: Path, tmp_path: Path) -> None:
    """Interpreted kernels give W_q bit for bit and gradients to rounding; a shifted clamp is seen every time.

    Three steps on a real model end with eager's loss to 1e-4 and at most 1 code in 1,000 different.
    """
    found = check("interpret", glassllm_dir, tmp_path / "triton", cache=tmp_path, interpreted=True)
    assert found["TritonPasses"] == []
    assert len(found["Shifted"]) == 27
    eager = few_steps(glassllm_dir, tmp_path / "eager", kernels="eager", **SMALL_RUN)
    other = few_steps(glassllm_dir, tmp_path / "other", kernels="eager", **{**SMALL_RUN, "seed": 1})
    assert found["run"]["final_loss"] == pytest.approx(eager["final_loss"], rel=1e-4)
    assert changed_codes(eager, found["run"]) <= 1e-3 < changed_codes(eager, other)


def test_compiled_kernels_divide_exactly(tmp_path: Path) -> None:
    """For GPUs of compute capability 8.0 and 9.0 both kernels compile, divide as IEEE says, and contract nothing.

    The twins: Triton's own `/` is an approximate division, and with fusion allowed the same source contracts.
    """
    found = check("compile", cache=tmp_path, interpreted=False)
    twins = found.pop("fused"), found.pop("plain division")
    assert len(found) == 4
    for name, counts in found.items():
        assert counts["div.rn.f32"] > 0, name
        assert counts["div.full.f32"] == counts["fma.rn.f32"] == 0, name
        assert counts["cubin"] > 0, name
    assert twins[0]["fma.rn.f32"] > 0
    assert twins[1]["div.full.f32"] > 0
