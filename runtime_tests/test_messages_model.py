"""What wrapping and loading a model say about layers that fit no grid, message by message."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.hf import register
from l4q.model import l4q_layers, wrap_linears
from runtime_tests.attacks.edit import section
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.mixed_models import MIXED_SIZES
from runtime_tests.random_models import build_model


def test_a_head_that_is_no_linear_layer() -> None:
    """Quantizing the head of such a model is refused, and nothing is wrapped; without it, all but the head is."""
    model = build_model("llama", MIXED_SIZES)
    model.lm_head = nn.Sequential(model.lm_head)
    message = "the output head is no linear layer, so it cannot be quantized\n  got: Sequential"
    with pytest.raises(UnsupportedError, match=message):
        wrap_linears(model, QuantConfig(), LoraConfig(rank=4), quantize_head=True)
    assert not list(l4q_layers(model))
    wrap_linears(model, QuantConfig(), LoraConfig(rank=4))
    assert list(l4q_layers(model))


def test_a_checkpoint_whose_config_has_another_group_size(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Transformers' loader stops at the first layer that has no whole groups of it."""
    register()
    folder = shutil.copytree(glass_checkpoint("none", group_size=32), tmp_path / "checkpoint")
    AutoModelForCausalLM.from_pretrained(folder)
    section(group_size=96)(folder)
    with pytest.raises(UsageError, match=r"the group size does not divide in_features\n  where: .*\n  got: 128 / 96"):
        AutoModelForCausalLM.from_pretrained(folder)
