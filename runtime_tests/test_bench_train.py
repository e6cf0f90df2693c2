"""The training benchmark measures what it says: saved bytes, peaks, and the same function in every L4Q baseline."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from l4q.config import LoraConfig, QuantConfig
from l4q.linear import L4QLinear
from tools.bench_cases import METHODS
from tools.bench_models import QATLinear, QATLoRALinear
from tools.bench_steps import BUILDERS, SavedBytes
from tools.bench_train import BenchError, Cost, command, ratios
from tools.measure import peak_bytes, reset_peak

QUANT = QuantConfig(bits=4, group_size=32, zero_point="integer")
LORA = LoraConfig(rank=4)
MIB = 1 << 20


def linear(out_features: int = 96, in_features: int = 128) -> nn.Linear:
    """A seeded layer."""
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=False)


def disturb(layer: L4QLinear | QATLoRALinear | QATLinear) -> None:
    """Move scales and offsets away from their start, alike for alike layers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.scales.mul_(0.8 + 0.2 * torch.rand(layer.scales.shape, generator=generator))
        layer.offsets.copy_(torch.randn(layer.offsets.shape, generator=generator) * layer.scales)


def test_the_naive_graph_computes_l4qs_function_and_gradients() -> None:
    """With B = 0 the naive layer's output and its gradients of x, s and b are those of L4Q's own layer."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    found = []
    for layer in (
        L4QLinear.from_linear(linear(), QUANT, LORA),
        QATLoRALinear(linear(), QUANT, LORA),
        QATLinear(linear(), QUANT),
    ):
        disturb(layer)
        own = x.clone().requires_grad_(True)
        y = layer(own)
        y.square().sum().backward()
        found.append((y.detach(), own.grad, layer.scales.grad, layer.offsets.grad))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(found[0][0], x @ linear().weight.T, atol=1e-3)  # the quantizer does something


def test_a_naive_layer_keeps_several_weights_for_backward_and_l4q_none() -> None:
    """Saved bytes beside parameters: at least three dense weights for the naive graph, a tenth of one for L4Q."""
    x = torch.randn(4, 1024, requires_grad=True)
    dense = 1024 * 1024 * 4
    totals = []
    for layer in (
        L4QLinear.from_linear(linear(1024, 1024), QUANT, LORA),
        QATLoRALinear(linear(1024, 1024), QUANT, LORA),
    ):
        saved = SavedBytes(layer)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            y = layer(x)
        totals.append(saved.total)
        del y
    assert totals[0] < 0.2 * dense, totals
    assert totals[1] > 3 * dense, totals


def test_saved_bytes_counts_a_storage_once_and_no_parameter() -> None:
    """A view, the same tensor again and a parameter add nothing."""
    layer = linear()
    saved = SavedBytes(layer)
    tensor = torch.zeros(100)
    for kept in (tensor, tensor, tensor[10:], layer.weight):
        saved.pack(kept)
    assert saved.total == 400


def test_the_peak_follows_a_buffer_and_forgets_it_after_a_reset() -> None:
    """64 MiB that are held for a moment show in the peak; after a reset they do not."""
    floor = reset_peak("cpu")
    with mmap.mmap(-1, 64 * MIB) as buffer:  # from the system: malloc may hand out pages that are resident already
        for _ in range(64):
            buffer.write(b"\1" * MIB)
    assert peak_bytes("cpu") - floor > 60 * MIB
    again = reset_peak("cpu")
    assert peak_bytes("cpu") - again < 30 * MIB


def test_ratios_need_l4q_and_lora_and_leave_a_missing_baseline_blank() -> None:
    """A baseline that ran out of memory is null; without L4Q's own figures there is no result."""
    measured = Cost(step_seconds=3.0, peak_bytes=30, saved_bytes=1)
    half = Cost(step_seconds=2.0, peak_bytes=20, saved_bytes=1)
    lost = Cost(error="out of memory")
    costs = {"l4q": measured, "lora": half, "qat-lora-naive": lost, "qat-full": lost}
    assert ratios(costs) == {"peak_memory_vs_lora": 1.5, "step_time_vs_lora": 1.5, "naive_peak_vs_l4q": None}
    with pytest.raises(BenchError, match="could not be measured"):
        ratios({**costs, "l4q": lost})


def test_the_quick_benchmark_ends_with_its_three_figures(tmp_path: Path) -> None:
    """All four methods run, and the naive graph needs more memory than L4Q."""
    report = tmp_path / "report.json"
    start = [sys.executable, "-m", "tools.bench_train", "--quick", "--device", "cpu", "--repetitions", "1"]
    done = subprocess.run(
        [*start, "--steps", "1", "--length", "64", "--report", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(figures) == {"peak_memory_vs_lora", "step_time_vs_lora", "naive_peak_vs_l4q"}
    assert figures["naive_peak_vs_l4q"] > 1.2
    costs = json.loads(report.read_text())[0]["costs"]
    assert all(cost["step_seconds"] > 0 and cost["saved_bytes"] > 0 and not cost["error"] for cost in costs.values())
    assert costs["qat-lora-naive"]["saved_bytes"] > 3 * costs["l4q"]["saved_bytes"]


def test_an_unknown_case_is_a_usage_error() -> None:
    """The message lists the cases of the device."""
    done = CliRunner().invoke(command, ["--device", "cpu", "--case", "9b"])
    assert done.exit_code == 2
    assert "smollm2" in done.output


def test_every_method_has_a_builder() -> None:
    """The light table of names and the builders agree."""
    assert tuple(BUILDERS) == METHODS
