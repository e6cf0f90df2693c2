"""l4q-import on modules that the others' grid does not hold: refused by name, dense with leave, or without loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l4q.config import QuantConfig
from l4q.errors import InexactError, UnsupportedError
from l4q.starts import open_start
from l4q.weight import QuantizedWeight
from runtime_tests import start_files as files
from runtime_tests.import_sources import UP, gptq_source, imported, reorder, same_values
from runtime_tests.random_models import random_weight


def replace_module(source: Path, name: str, weight: QuantizedWeight) -> None:
    """Other integers for one module of a GPTQ folder, with a `dynamic` rule where its bits are others."""
    new = files.gptq_parts(weight)
    files.edit_tensors(source, lambda tensors: tensors.update({f"{name}.{part}": new[part] for part in new}))
    files.edit_section(source, dynamic={f"+:{name}$": {"bits": weight.bits, "group_size": weight.group_size}})


def wide_scales(source: Path) -> None:
    """Scales of a module in float32, with bits that fp16 has not."""
    files.edit_tensors(source, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float() * 1.001}))


def no_zero_point(source: Path) -> None:
    """Zero-point 0, which GPTQ stores as 15, in the first group of every row of a module."""
    files.edit_tensors(source, lambda t: t[f"{UP}.qzeros"][0].fill_(-1))


def eight_bits(source: Path) -> None:
    """One module of 8 bits."""
    files.edit_section(source, dynamic={f"+:{UP}$": {"bits": 8}})
    values = torch.randint(0, 256, (160, 96), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint8)
    changed = {"qweight": files.dense_words(values, 8).T.contiguous(), "qzeros": torch.zeros(3, 40, dtype=torch.int32)}
    files.edit_tensors(source, lambda t: t.update({f"{UP}.{part}": tensor for part, tensor in changed.items()}))


def small_groups(source: Path) -> None:
    """One module in groups of 16."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1, group_size=16)
    replace_module(source, UP, weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (reorder, "activation order"),
        (wide_scales, "scales are no fp16 numbers"),
        (no_zero_point, r"zero-point 0 in \d+ groups"),
        (eight_bits, "8 bits; a checkpoint holds 2, 3, 4"),
        (small_groups, "groups of 16 columns"),
    ],
)
def test_what_the_grid_cannot_hold_is_refused_or_dense(
    tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    """The module and the reason are named before anything is written; with leave it stays dense with its own values."""
    origin, source = gptq_source(tmp_path, scale_mask=0xFFFF)
    change(source)
    with pytest.raises(InexactError, match=f"(?s){UP}.*{reason}.*--allow-dense"):
        imported(source, tmp_path / "import")
    assert not (tmp_path / "import").exists()
    checkpoint = imported(source, tmp_path / "import", allow_dense=True)
    assert set(origin.modules) - set(checkpoint.modules) == {UP}
    start = open_start(str(source))
    assert start is not None
    assert torch.equal(checkpoint.dense(f"{UP}.weight"), start.values(UP))
    assert checkpoint.dense(f"{UP}.weight").dtype == torch.float32
    assert UP in checkpoint.config["quantization_config"]["modules_to_not_convert"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert torch.equal(model.get_submodule(UP).weight, start.values(UP))


def test_activation_order_is_decoded_column_by_column(tmp_path: Path) -> None:
    """An activation-ordered weight is (q - z) * s with the group that g_idx gives each column."""
    origin, source = gptq_source(tmp_path)
    weight = origin.quantized(UP)
    reorder(source)
    order = np.random.default_rng(0).permutation(np.arange(96) // 32)
    zeros, scales = (part.astype(np.float32)[:, order] for part in (weight.integer_zeros(), weight.scales))
    start = open_start(str(source))
    assert start is not None
    assert np.array_equal(start.values(UP).numpy(), (weight.codes - zeros) * scales)
    assert not np.array_equal(start.values(UP).numpy(), weight.dequantize())


def narrow_module(source: Path) -> QuantizedWeight:
    """One module of 3 bits, whose first zero-point is 0: at 4 bits there is room to move it."""
    weight = random_weight((160, 96), QuantConfig(bits=3, group_size=32, zero_point="integer"), 1)
    replace_module(source, UP, weight)
    return weight


def coarse_module(source: Path) -> QuantizedWeight:
    """One module with a single group per row."""
    weight = random_weight((160, 96), QuantConfig(group_size=-1, zero_point="integer"), 1)
    replace_module(source, UP, weight)
    return weight


def low_module(source: Path) -> QuantizedWeight:
    """One module with zero-point 0 everywhere, and no code at the top."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1)
    lowered = QuantizedWeight(
        codes=weight.codes.clip(1), scales=weight.scales, zeros=np.ones_like(weight.scales, np.uint8), bits=4,
        group_size=32,
    )  # fmt: skip
    replace_module(source, UP, lowered)
    files.edit_tensors(source, lambda t: t[f"{UP}.qweight"].sub_(0x11111111))
    files.edit_tensors(source, lambda t: t[f"{UP}.qzeros"].fill_(-1))
    return lowered


def short_scales(source: Path) -> QuantizedWeight:
    """One module with bfloat16 scales."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1, scale_mask=0xFFF8)
    replace_module(source, UP, weight)
    files.edit_tensors(source, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].bfloat16()}))
    return weight


@pytest.mark.parametrize("change", [narrow_module, coarse_module, low_module, short_scales])
def test_mixed_modules_share_a_grid_without_loss(tmp_path: Path, change: Callable[[Path], QuantizedWeight]) -> None:
    """Fewer bits, coarser groups, zero-point 0 with room and bfloat16 scales all fit the grid of the other modules."""
    origin, source = gptq_source(tmp_path)
    weight = change(source)
    checkpoint = imported(source, tmp_path / "import")
    assert (checkpoint.info(UP).bits, checkpoint.info(UP).group_size) == (4, 32)
    expected = {name: origin.quantized(name).dequantize() for name in origin.modules}
    assert not same_values(checkpoint, expected)
    assert same_values(checkpoint, {**expected, UP: weight.dequantize()})


def test_the_kind_of_zero_point_can_be_asked_for(tmp_path: Path) -> None:
    """Zero-point 0 makes a whole checkpoint float where its scales allow; --zero-point integer names the module."""
    origin, source = gptq_source(tmp_path)
    no_zero_point(source)
    assert imported(source, tmp_path / "free").quant.zero_point == "float"
    with pytest.raises(InexactError, match=f"(?s)1 of 14.*{UP}.*zero-point 0"):
        imported(source, tmp_path / "whole", zero_point="integer")
    whole = imported(source, tmp_path / "whole", zero_point="integer", allow_dense=True)
    assert set(origin.modules) - set(whole.modules) == {UP}
    with pytest.raises(UnsupportedError, match="14 modules: it has zero-points off the midpoint"):
        imported(source, tmp_path / "none", zero_point="none", allow_dense=True)
