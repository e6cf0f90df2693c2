"""Starts that are not read as they lie: activation order, and models of the hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError
from l4q.model import wrap_linears
from l4q.starts import open_start
from runtime_tests import start_files as files

UP = "model.layers.0.mlp.up_proj"
GRID = QuantConfig(zero_point="integer", group_size=32, scale_grid="fp16")


def act_order(tensors: dict[str, torch.Tensor]) -> None:
    """A g_idx that is not k // group_size."""
    tensors[f"{UP}.g_idx"][:2] = torch.tensor([1, 0])


def test_activation_order_starts_as_dense_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a layer keeps its own values as W0, is initialised anew and noted; the others are taken over."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: None)  # the tiny llama has none
    checkpoint = files.gptq_folder(tmp_path, GRID)
    files.edit_tensors(tmp_path / "model", act_order)
    weight, order = checkpoint.quantized(UP), np.arange(128) // 32
    order[:2] = 1, 0
    expected = (weight.codes - weight.integer_zeros().astype(np.float32)[:, order]) * weight.scales[:, order]
    start = open_start(str(tmp_path / "model"))
    assert start is not None
    model, _ = start.load(torch.float32)
    loaded = model.get_submodule(UP).weight.detach().numpy()
    assert np.array_equal(loaded, expected)
    assert not np.array_equal(loaded, weight.dequantize())
    report = wrap_linears(model, GRID, LoraConfig(rank=2), start=start)
    assert set(checkpoint.modules) - set(report.reproduced) == {UP}
    assert f"1 layers start anew, for example {UP}: activation order" in "\n".join(report.describe_start())


def test_a_pre_quantized_hub_id_is_read_from_the_cache(
    glassllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id of the hub is the folder in its cache, under its own name; plain and unknown models are left alone."""
    checkpoint = files.gptq_folder(tmp_path, GRID)
    cache = tmp_path / "cache"
    files.hub_cache(tmp_path / "model", "org/tiny-gptq", cache)
    files.hub_cache(glassllm_dir, "org/plain", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = open_start("org/tiny-gptq")
    assert start is not None
    assert start.path.is_relative_to(cache)
    assert all(
        np.array_equal(start.values(name).numpy(), checkpoint.quantized(name).dequantize())
        for name in checkpoint.modules
    )
    files.edit_section(start.path, quant_method="bitsandbytes")
    with pytest.raises(UnsupportedError, match="no reader"):
        open_start("org/tiny-gptq")
    assert open_start("org/plain") is None
    assert open_start("org/absent") is None
