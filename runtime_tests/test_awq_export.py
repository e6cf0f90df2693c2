"""AWQ folders: exact under compressed-tensors' AutoAWQ converter, damage detected, sizes refused before writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import awq
from exporters.awq.plan import module_nbytes
from exporters.plan import ExportOptions, Fidelity
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.hf_exports import (
    DAMAGED,
    Damage,
    edit_config,
    edit_tensor,
    flip_nibble,
    lower_zeros,
    next_scale,
    section,
    shift_half,
    stored,
    support,
    swap_rows,
    write_export,
    wrong_modules,
)
from runtime_tests.tiny_llama import tiny_checkpoint


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("zero_point", "group_size"), [("none", 64), ("integer", 32), ("none", -1), ("integer", -1)])
def test_foreign_decoder_returns_the_checkpoint(
    tmp_path: Path, zero_point: ZeroPoint, group_size: int, bits: int
) -> None:
    """Every module bit for bit, in groups and per row, and codes of 2 and 3 bits in 4-bit fields."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point=zero_point, group_size=group_size, bits=bits))
    plan = write_export(checkpoint, "awq", tmp_path / "out")
    assert wrong_modules(checkpoint, "awq", tmp_path / "out") == []
    assert len(plan.quantized) == len(checkpoint.modules) == 14
    assert {tensor.fidelity for tensor in plan.quantized} == {Fidelity.EXACT}


def natural_order(words: torch.Tensor) -> None:
    """Store columns in GPTQ's nibble order."""
    from exporters.awq.pack import unpack_awq
    from exporters.words import pack_cols

    words.copy_(torch.from_numpy(pack_cols(unpack_awq(words.numpy()), 4)))


DAMAGE: dict[str, Damage] = {
    "nibble": edit_tensor("qweight", flip_nibble),
    "scale": edit_tensor("scales", next_scale),
    "rows": edit_tensor("qweight", swap_rows),
    "zero-points off by one": edit_tensor("qzeros", lower_zeros),
    "signed zero-points": edit_tensor("qzeros", shift_half),
    "signed codes": edit_tensor("qweight", shift_half),
    "nibbles in natural order": edit_tensor("qweight", natural_order),
    "called symmetric": edit_config(lambda s: s.update(zero_point=False)),
    "another group size": edit_config(lambda s: s.update(group_size=32)),
    "not converted": edit_config(lambda s: s.update(modules_to_not_convert=[DAMAGED])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_detected(tmp_path: Path, damage: Damage) -> None:
    """A nibble, scale, row, zero-point, order, sign convention or config entry that is wrong fails the comparison."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    write_export(checkpoint, "awq", tmp_path / "out")
    assert wrong_modules(checkpoint, "awq", tmp_path / "out") == []
    damage(tmp_path / "out")
    assert wrong_modules(checkpoint, "awq", tmp_path / "out")


def test_config_and_tensors_are_what_the_loaders_read(tmp_path: Path) -> None:
    """Symmetric weights carry zero-points of 8 and zero_point true, so that no reader has to guess them."""
    write_export(tiny_checkpoint(tmp_path, QuantConfig()), "awq", tmp_path / "out")
    expected = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    found = section(tmp_path / "out")
    assert expected.items() <= found.items()
    assert found["modules_to_not_convert"] is None
    tensors = stored(tmp_path / "out")
    stem = "model.layers.0.mlp.down_proj"
    shapes = {part: tuple(tensors[f"{stem}.{part}"].shape) for part in ("qweight", "qzeros", "scales")}
    assert shapes == {"qweight": (256, 16), "qzeros": (4, 16), "scales": (4, 128)}
    assert set(tensors[f"{stem}.qzeros"].ravel().tolist()) == {-0x77777778}


def test_plan_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    """The plan's bytes are the file's; an int3 plan says that it takes 4 bits."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer", bits=3))
    plan = write_export(checkpoint, "awq", tmp_path / "out")
    assert sum(tensor.nbytes for tensor in stored(tmp_path / "out").values()) == plan.nbytes
    assert plan.quantized[0].nbytes == module_nbytes(checkpoint.info(plan.quantized[0].name))
    assert plan.quantized[0].encoding == "int3 in 4-bit fields group 64"
    assert any("3-bit codes are stored in 4-bit fields" in note for note in plan.notes)


def test_dense_linears_are_named(tmp_path: Path) -> None:
    """A linear that stayed dense stands in modules_to_not_convert."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(), dense_linears=["o_proj"])
    write_export(checkpoint, "awq", tmp_path / "out")
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    assert section(tmp_path / "out")["modules_to_not_convert"] == names
    assert wrong_modules(checkpoint, "awq", tmp_path / "out") == []


@pytest.mark.parametrize(
    ("grid", "changes", "options", "expected"),
    [
        ({"zero_point": "integer"}, {}, {}, ""),
        ({"bits": 3}, {}, {}, ""),
        ({}, {}, {"dtype": "float32"}, "--dtype float16"),
        ({"group_size": -1}, {"intermediate_size": 264}, {}, "multiples of 32"),
    ],
    ids=["asymmetric", "int3", "float32", "odd size"],
)
def test_plan_says_whether_vllm_loads_it(
    tmp_path: Path, grid: dict[str, Any], changes: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    """vLLM's restrictions are known before anything is written."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(**grid), **changes)
    loads, reason = support(awq.plan(checkpoint, ExportOptions(**options)), "vLLM")
    assert loads == (not expected)
    assert expected in reason


def test_slow_and_unknown_group_sizes_are_told(tmp_path: Path) -> None:
    """A group of 96 runs in vLLM, slowly on GPUs; gptqmodel's AWQ does not take it."""
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
    plan = awq.plan(tiny_checkpoint(tmp_path, QuantConfig(group_size=96), **sizes), ExportOptions())
    assert any("96 runs slower" in note for note in plan.notes)
    assert support(plan, "vLLM")[0]
    assert not support(plan, "transformers")[0]


def test_refusals_name_what_fits(tmp_path: Path) -> None:
    """Float zero-points and rows that do not fill words are refused with the formats that hold them."""
    with pytest.raises(UnsupportedError, match=r"Q4_1.*zero_point integer"):
        awq.plan(tiny_checkpoint(tmp_path / "float", QuantConfig(zero_point="float")), ExportOptions())
    odd = tiny_checkpoint(tmp_path / "odd", QuantConfig(group_size=-1), intermediate_size=340)
    with pytest.raises(UnsupportedError, match=r"(?s)gate_proj \[340, 128\].*multiples of 8.*compressed-tensors"):
        awq.plan(odd, ExportOptions())


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    """Reading back something else is a usage error, not an empty success."""
    with pytest.raises(UsageError, match="not an AWQ folder"):
        list(awq.read_back(tiny_checkpoint(tmp_path, QuantConfig()).path))
