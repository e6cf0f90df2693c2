"""The compiled kernels compute what torch's operations compute: the same bits of W_q, the same gradients."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from l4q.base import PackedBase
from l4q.cli_train import command as train_command
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError, UsageError, VerificationError
from l4q.kernels import select
from l4q.kernels.fused import FusedKernels, merged_runs
from l4q.kernels.numba_kernels import NumbaPasses
from l4q.kernels.select import EAGER, kernels_for
from l4q.kernels.verify import compare, example, same_bits
from l4q.linear import L4QLinear
from l4q.model import wrap_linears
from l4q.quant import GridParams, merge_lora, row_blocks
from runtime_tests.kernel_runs import changed_codes, few_steps
from runtime_tests.train_runs import base_options
from tools.bench_kernels import command as bench_command

NUMBA = FusedKernels(NumbaPasses())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (out, in), group size: several cache blocks, odd rows, one group a row of odd length, one row
SHAPES = (((300, 480), 32), ((37, 96), 96), ((19, 341), -1), ((1, 64), 64))


class Broken(NumbaPasses):
    """Passes with one defect, of the kind that looks right at a glance."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def quantize(self, merged: torch.Tensor, params: GridParams, max_code: int, out: torch.Tensor) -> None:
        """W_q with the defect."""
        if self.defect == "reciprocal":  # what a compiler makes of a division with fast-math
            inverse = 1 / params.scales.unsqueeze(-1)
            position = (merged.view(*params.scales.shape, -1) - params.mins.unsqueeze(-1)) * inverse
            codes = position.clamp(0, max_code).round()
            out.copy_((codes * params.scales.unsqueeze(-1) + params.mins.unsqueeze(-1)).view_as(out))
            return
        super().quantize(merged, params, max_code - (self.defect == "clamp"), out)

    def differentiate(
        self, merged: torch.Tensor, params: GridParams, max_code: int, grad_w: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients with the defect."""
        grad_s, grad_m = super().differentiate(merged, params, max_code, grad_w, out)
        if self.defect == "mask":  # the straight-through mask forgotten
            merged.copy_(grad_w)
        if self.defect == "group":  # one group's sum lost
            grad_m[3, 1] = 0
        return grad_s, grad_m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_numba_equals_eager(kind: Any, shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> None:
    """W_q of both directions bit for bit, gradients to rounding: every bit width, scale grid, shape and dtype."""
    for bits in (2, 3, 4):
        for grid in ("fp16", "fp16_s7"):
            quant = QuantConfig(bits=bits, group_size=group_size, zero_point=kind, scale_grid=grid)
            assert compare(NUMBA, *example(quant, dtype, shape=shape, tokens=21)) is None, quant


@pytest.mark.parametrize("defect", ["reciprocal", "clamp", "mask", "group"])
def test_a_defect_is_noticed(defect: str) -> None:
    """The twin: a reciprocal instead of a division, a shifted clamp, a forgotten mask and a lost sum are all found."""
    quant = QuantConfig(group_size=32, zero_point="integer")
    assert compare(FusedKernels(Broken(defect)), *example(quant, torch.float32)) is not None
    assert compare(FusedKernels(Broken("none")), *example(quant, torch.float32)) is None


def test_ties_and_ends() -> None:
    """Positions on k + 1/2 round to even; the ends of the range, both zeros and subnormals keep their bits."""
    halves = torch.arange(-4, 40, dtype=torch.float32) / 2
    weight = torch.cat([halves, torch.tensor([0.0, -0.0, 1e-42, -1e-42, 15.0, 15.5, 3e38, -3e38])])
    weight = torch.nn.functional.pad(weight, (0, 64 - len(weight)), value=7.5)[None] * 0.25
    problem, _, _ = example(QuantConfig(), torch.float32, shape=(1, 64))
    quarter = torch.full((1, 1), 0.25)
    for low in (0.0, -2.0):
        params = GridParams(quarter, quarter * low, quarter)
        edge = problem._replace(weight=weight, params=params, update=problem.update._replace(scaling=0.0))
        assert same_bits(NUMBA.quantize(edge, torch.float32), EAGER.quantize(edge, torch.float32))


def test_what_is_not_finite_stays_visible() -> None:
    """NaN and infinite weights give NaN and clamped codes at the places where torch has them, in every dtype."""
    problem, x, grad_y = example(QuantConfig(group_size=32), torch.float32)
    assert isinstance(problem.weight, torch.Tensor)
    problem.weight[3, 5], problem.weight[4, 6], problem.weight[5, 7] = torch.nan, torch.inf, -torch.inf
    for dtype in DTYPES:
        ours, theirs = NUMBA.quantize(problem, dtype), EAGER.quantize(problem, dtype)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(nan=9.0), theirs.nan_to_num(nan=9.0))
        assert ours.isnan().any()
    mine, oracle = (kernels.gradients(problem, x, grad_y) for kernels in (NUMBA, EAGER))
    for name in ("a", "b", "scales", "mins"):
        assert torch.equal(getattr(mine, name).isnan(), getattr(oracle, name).isnan()), name


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_runs_merge_like_blocks(storage: str) -> None:
    """The merged weight of a long run has the bits that freezing merges block by block; two runs, W0 in any storage."""
    problem, _, _ = example(QuantConfig(group_size=32), torch.float32, shape=(2400, 480))
    assert isinstance(problem.weight, torch.Tensor)
    if storage.startswith("int"):
        problem = problem._replace(weight=PackedBase.quantize(problem.weight, storage))  # type: ignore[arg-type]
    else:
        problem = problem._replace(weight=problem.weight.to(getattr(torch, storage)))
    runs = [(rows, merged.clone()) for rows, merged in merged_runs(problem)]
    assert len(runs) == 2
    for block in row_blocks(problem.weight):
        expected = merge_lora(problem.weight, problem.update, block, torch.float32)
        rows, merged = next(run for run in runs if run[0].start <= block.start < run[0].stop)
        assert same_bits(merged[block.start - rows.start : block.stop - rows.start], expected)
    assert compare(NUMBA, problem, torch.ones(2, 480), torch.ones(2, 2400)) is None


def test_threads_change_no_bit() -> None:
    """One, two and three threads give the same bits, gradients included."""
    problem, _, _ = example(QuantConfig(zero_point="integer"), torch.bfloat16, shape=(301, 512))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                merged = torch.cat([run.clone() for _, run in merged_runs(problem)])
                out = torch.empty_like(merged)
                grad_w = merged.sin()
                sums = NUMBA.passes.differentiate(merged, problem.params, problem.max_code, grad_w, out)
                found.append((merged, out, *sums))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(same_bits(left, right) for left, right in zip(found[0], other, strict=True))


def test_a_forked_process_computes() -> None:
    """A child forked after the threads started (as a data loader forks) starts its own and gets the same bits."""
    script = """
import os, torch
from l4q.config import QuantConfig
from l4q.kernels.numba_kernels import NumbaPasses
from l4q.kernels.verify import example
problem, _, _ = example(QuantConfig(), torch.float32, shape=(512, 512))
outs = [torch.empty(512, 512) for _ in range(2)]
torch.set_num_threads(2)
NumbaPasses().quantize(problem.weight, problem.params, 15, outs[0])
child = os.fork()
if child == 0:
    NumbaPasses().quantize(problem.weight, problem.params, 15, outs[1])
    os._exit(17 if torch.equal(*outs) and outs[0].any() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("17", 0), done.stderr


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_layer_is_the_same_function(dtype: torch.dtype) -> None:
    """The layer's output has the same bits with either kernels, also under autocast, and what is frozen is its W_q."""
    torch.manual_seed(0)
    linear, quant = nn.Linear(192, 300, dtype=dtype), QuantConfig(zero_point="integer")
    layer = L4QLinear.from_linear(linear, quant, LoraConfig(rank=4), kernels="numba")
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.02)
        layer.scales.mul_(0.7)
    x = torch.randn(5, 192, dtype=dtype)
    eye = torch.eye(192, dtype=dtype)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            ours, weight = layer(x), layer(eye).T - layer(torch.zeros_like(eye)).T
            layer.kernels = "eager"
            assert same_bits(ours, layer(x))
            layer.kernels = "numba"
    layer.bias = None
    frozen = torch.from_numpy(layer.freeze().dequantize())
    assert torch.equal(layer(eye).T, frozen.to(dtype))
    assert weight.shape == frozen.shape


def test_training_ends_on_the_same_integers(glassllm_dir: Path, tmp_path: Path) -> None:
    """Six steps on a real model: losses to 1e-4 and at most 1 code in 1,000 differ between eager and Numba kernels."""
    eager = few_steps(glassllm_dir, tmp_path / "eager", kernels="eager")
    ours = few_steps(glassllm_dir, tmp_path / "numba", kernels="numba")
    other = few_steps(glassllm_dir, tmp_path / "other", kernels="numba", seed=1)
    assert ours["final_loss"] == pytest.approx(eager["final_loss"], rel=1e-4)
    assert changed_codes(eager, ours) <= 1e-3
    assert changed_codes(eager, other) > 1e-2  # the twin: another seed changes many


# --- the choice -------------------------------------------------------------------------------------------------------


def forget() -> None:
    """Drop the remembered choices."""
    kernels_for.cache_clear()
    select.require_kernels.cache_clear()


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """No remembered choice, before and after."""
    forget()
    yield
    forget()


def test_auto_takes_the_fastest() -> None:
    """float32 on a CPU is Numba's; other dtypes and devices, and a compiled model, are left to torch."""
    assert kernels_for("auto", "cpu").name == "numba"
    assert kernels_for("auto", "cpu", torch.float64).name == "eager"
    assert kernels_for("auto", "meta").name == "eager"
    layer = L4QLinear.from_linear(nn.Linear(64, 32), QuantConfig(), LoraConfig(rank=2))
    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.usefixtures("fresh_choice")
def test_wrong_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that differ from torch on this machine: auto warns and goes on without them, a choice of them stops."""
    monkeypatch.setattr(select, "load", lambda _name: FusedKernels(Broken("mask")))
    with caplog.at_level(logging.WARNING, logger="l4q"):
        assert kernels_for("auto", "cpu").name == "eager"
    assert "the numba kernels are not used, because on this machine the gradient of a is off" in caplog.text
    with pytest.raises(VerificationError, match="do not reproduce torch"):
        kernels_for("numba", "cpu")


@pytest.mark.usefixtures("fresh_choice")
def test_refused_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do not exist, are not installed, or do not run on the device are refused with the way out."""
    with pytest.raises(UnsupportedError, match="float32 on cpu"):
        kernels_for("numba", "cuda")
    with pytest.raises(UnsupportedError, match="float64 on cpu"):
        kernels_for("numba", "cpu", torch.float64)
    with pytest.raises(UsageError, match=r"one of .*eager.*numba"):
        wrap_linears(nn.Sequential(nn.Linear(64, 64)), QuantConfig(), LoraConfig(), kernels="fast")  # type: ignore[arg-type]
    forget()
    monkeypatch.setattr(select, "installed", lambda _name: False)
    assert kernels_for("auto", "cpu").name == "eager"
    with pytest.raises(UsageError, match=r"pip install 'l4q\[cuda\]'"):
        L4QLinear.from_linear(nn.Linear(64, 32), QuantConfig(), LoraConfig(), kernels="triton")


def test_kernels_option(glassllm_dir: Path, tmp_path: Path) -> None:
    """--kernels reaches the options, is refused where unknown, and does not decide whether a run can be resumed."""
    options = base_options(glassllm_dir, tmp_path)
    assert options.kernels == "auto"
    assert replace(options, kernels="eager").identity() == options.identity()
    with pytest.raises(UsageError, match="kernels"):
        replace(options, kernels="fast")  # type: ignore[arg-type]
    arguments = [str(glassllm_dir), "--data", str(options.data[0]), "--out", str(tmp_path / "run"), "--kernels"]
    assert train_command.make_context("train", [*arguments, "numba"]).params["kernels"] == "numba"
    refused = CliRunner().invoke(train_command, [*arguments, "fast"])
    assert refused.exit_code == 2
    assert "'fast' is not one of 'auto', 'eager', 'numba', 'triton'" in refused.output


def test_the_benchmark_checks_and_measures() -> None:
    """tools.bench_kernels ends with the ratios of eager and Numba kernels, all positive."""
    done = CliRunner().invoke(bench_command, ["--device", "cpu", "--tokens", "8", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"eager", "numba"}
    assert set(found["eager"].values()) > {1.0}
    assert all(value > 0 for ratios in found.values() for value in ratios.values())
