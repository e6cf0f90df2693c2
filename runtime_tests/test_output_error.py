"""What a block's error is made of: ordinary positions alike, an attention sink like all the others together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from l4q.config import QuantConfig
from l4q.output_error import output_error
from l4q.reconstruct import BlockReport, ReconstructOptions, reconstruct

LENGTH = 64


def outputs(norms: dict[int, float]) -> torch.Tensor:
    """[2, LENGTH, 32] with positions of length 1, but those of the first sequence that are given."""
    wanted = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    wanted /= wanted.norm(dim=-1, keepdim=True)
    for position, norm in norms.items():
        wanted[0, position] *= norm
    return wanted


def wrong(wanted: torch.Tensor, positions: slice) -> float:
    """The error when those positions of the first sequence are a tenth too long."""
    given = wanted.clone()
    given[0, positions] *= 1.1
    return float(output_error(given, wanted))


def test_ordinary_positions_count_alike() -> None:
    """The squared relative error, whichever position has it and whatever the block's outputs are measured in."""
    wanted = outputs({})
    assert float(output_error(1.1 * wanted, wanted)) == pytest.approx(0.01, rel=1e-4)
    assert float(output_error(1.1e6 * wanted, 1e6 * wanted)) == pytest.approx(0.01, rel=1e-4)
    assert wrong(wanted, slice(3, 4)) == pytest.approx(0.01 / (2 * LENGTH), rel=1e-4)
    assert float(output_error(wanted, wanted)) == 0


@pytest.mark.parametrize(("norm", "worth"), [(3.0, 1), (90.0, 1), (110.0, LENGTH), (1e4, LENGTH)])
def test_a_sink_counts_like_all_others_of_its_sequence(norm: float, worth: int) -> None:
    """From a hundred times the median on; below it, like one, however long."""
    wanted = outputs({0: norm})
    other = wrong(wanted, slice(5, 6))
    assert wrong(wanted, slice(0, 1)) == pytest.approx(worth * other, rel=1e-3)


def test_the_blocks_reports_are_this_error(glassllm_dir: Path) -> None:
    """What is reported before training, of a model whose first position is a sink, contains the sink's part."""
    quant = QuantConfig(bits=2, group_size=32, zero_point="integer")
    ids = torch.randint(3, 200, (1, 32), generator=torch.Generator().manual_seed(0))

    def errors(factor: float) -> list[float]:
        model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32).eval()
        token = int(ids[0, 0])
        with torch.no_grad():
            model.get_input_embeddings().weight[token].mul_(factor)
        layers = {
            name: quant
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "layers" in name and module.in_features % 32 == 0
        }
        reports: list[BlockReport] = []
        reconstruct(model, layers, ids.tolist(), ReconstructOptions(epochs=1), reports.append)
        return [report.before for report in reports]

    # The residual stream carries the long position past the block exactly, so its share of the size is without error.
    assert errors(1e4)[0] < 0.7 * errors(1.0)[0]
