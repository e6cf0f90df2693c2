"""compressed-tensors folders: exact under that package's own decompressor, damage detected, schemes and notes right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporters import compressed_tensors as exporter
from exporters.compressed_tensors.plan import module_nbytes, module_schemes
from exporters.driver import EXPORTERS
from exporters.plan import ExportOptions, Fidelity
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.conftest import CheckpointMaker
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
from runtime_tests.targets import detect
from runtime_tests.thresholds import limits_for
from runtime_tests.tiny_llama import random_weight, tiny_checkpoint

NAME = "compressed-tensors"


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("zero_point", "group_size"), [("none", 64), ("integer", 32), ("none", -1), ("integer", -1)])
def test_foreign_decompressor_returns_the_checkpoint(
    tmp_path: Path, zero_point: ZeroPoint, group_size: int, bits: int
) -> None:
    """Every module bit for bit, in groups and per row, and codes of 2 and 3 bits in 4-bit fields."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point=zero_point, group_size=group_size, bits=bits))
    plan = write_export(checkpoint, NAME, tmp_path / "out")
    assert wrong_modules(checkpoint, NAME, tmp_path / "out") == []
    assert len(plan.quantized) == len(checkpoint.modules) == 14
    assert {tensor.fidelity for tensor in plan.quantized} == {Fidelity.EXACT}


DAMAGE: dict[str, Damage] = {
    "nibble": edit_tensor("weight_packed", flip_nibble),
    "scale": edit_tensor("weight_scale", next_scale),
    "rows": edit_tensor("weight_packed", swap_rows),
    "zero-points off by one": edit_tensor("weight_zero_point", lower_zeros),
    "signed zero-points": edit_tensor("weight_zero_point", shift_half),
    "signed codes": edit_tensor("weight_packed", shift_half),
    "called symmetric": edit_config(lambda s: s["config_groups"]["group_0"]["weights"].update(symmetric=True)),
    "another group size": edit_config(lambda s: s["config_groups"]["group_0"]["weights"].update(group_size=32)),
    "ignored": edit_config(lambda s: s["ignore"].append(DAMAGED)),
    "no target": edit_config(lambda s: s["config_groups"]["group_0"].update(targets=["re:.*gate_proj"])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_detected(tmp_path: Path, damage: Damage) -> None:
    """A nibble, scale, row, zero-point, sign convention or config entry that is wrong fails the comparison."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    write_export(checkpoint, NAME, tmp_path / "out")
    assert wrong_modules(checkpoint, NAME, tmp_path / "out") == []
    damage(tmp_path / "out")
    assert wrong_modules(checkpoint, NAME, tmp_path / "out")


def test_config_and_tensors_are_what_the_loaders_read(tmp_path: Path) -> None:
    """Symmetric modules have no weight_zero_point, which vLLM would refuse; lm_head is ignored; shapes are recorded."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig())
    write_export(checkpoint, NAME, tmp_path / "out")
    found = section(tmp_path / "out")
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["ignore"] == ["lm_head"]
    (group,) = found["config_groups"].values()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    assert group["targets"] == ["Linear"]
    assert weights.items() <= group["weights"].items()
    tensors = stored(tmp_path / "out")
    assert not [name for name in tensors if name.endswith("zero_point")]
    assert tensors["model.layers.0.mlp.down_proj.weight_shape"].tolist() == [128, 256]
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (128, 32)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 4)


def test_asymmetric_zero_points_are_packed_along_out_features(tmp_path: Path) -> None:
    """weight_zero_point is int32 [out_features / 8, groups]; one group per row is strategy channel."""
    write_export(tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer", group_size=-1)), NAME, tmp_path / "out")
    (group,) = section(tmp_path / "out")["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)
    assert group["weights"]["symmetric"] is False
    zeros = stored(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_zero_point"]
    assert (zeros.dtype, tuple(zeros.shape)) == (torch.int32, (32, 1))


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_plan_counts_the_bytes_that_are_written(tmp_path: Path, zero_point: ZeroPoint) -> None:
    """The plan's bytes are the file's, sizes that do not fill the last word included."""
    quant = QuantConfig(zero_point=zero_point, group_size=-1, bits=3)
    checkpoint = tiny_checkpoint(tmp_path, quant, intermediate_size=340)
    plan = write_export(checkpoint, NAME, tmp_path / "out")
    assert sum(tensor.nbytes for tensor in stored(tmp_path / "out").values()) == plan.nbytes
    assert plan.quantized[0].nbytes == module_nbytes(
        checkpoint.info(plan.quantized[0].name), 4, module_schemes(checkpoint)[plan.quantized[0].name]
    )
    assert wrong_modules(checkpoint, NAME, tmp_path / "out") == []


def test_plan_names_the_price_of_the_container(tmp_path: Path) -> None:
    """An int3 plan says 4 bits on disk, and counts them; an int4 plan has no such note."""
    three = exporter.plan(tiny_checkpoint(tmp_path / "3", QuantConfig(bits=3)), ExportOptions())
    four = exporter.plan(tiny_checkpoint(tmp_path / "4", QuantConfig()), ExportOptions())
    assert three.bits_per_weight == four.bits_per_weight > 4
    assert three.quantized[0].encoding == "int3 in 4-bit fields group 64, symmetric"
    assert any("3-bit codes are stored in 4-bit fields" in note for note in three.notes)
    assert not any("fields" in note for note in four.notes)


@pytest.mark.parametrize(
    ("name", "bits", "known"),
    [("gptq", 8, "2, 3, 4"), (NAME, 0, "2, 3, 4"), (NAME, 8, "2, 3, 4"), ("awq", 3, "4"), ("awq", 2, "4")],
)
def test_other_containers_are_refused(tmp_path: Path, name: str, bits: int, known: str) -> None:
    """Widths that a format has no fields for are refused, naming those it has and the way out."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3))
    message = rf"(?s)container_bits.*got: {bits}.*\[{known}\].*leave --container-bits out"
    with pytest.raises(UnsupportedError, match=message):
        write_export(checkpoint, name, tmp_path / "out", container_bits=bits)
    assert not (tmp_path / "out").exists()


def mixed_checkpoint(folder: Path) -> L4QCheckpoint:
    """down_proj asymmetric in groups of 32, gate and up in groups of 32, the rest symmetric in groups of 64."""
    source = tiny_checkpoint(folder, QuantConfig(), dense_linears=["o_proj"])
    weights = {module: source.quantized(module) for module in source.modules}
    for leaf, zero_point in (("down_proj", "integer"), ("gate_proj", "none"), ("up_proj", "none")):
        quant = QuantConfig(group_size=32, zero_point=zero_point)  # type: ignore[arg-type]
        for module in [name for name in weights if name.endswith(leaf)]:
            weights[module] = random_weight(weights[module].shape, quant, 1)
    dense = [(name, source.dense(name)) for name in source.dense_names]
    save_checkpoint(folder / "mixed", config=source.config, weights=weights.items(), dense=dense, quant=source.quant)
    return L4QCheckpoint.open(folder / "mixed")


def test_mixed_schemes_get_a_group_each(tmp_path: Path) -> None:
    """Exact with several config groups, which vLLM loads; dense linears are ignored by name."""
    checkpoint = mixed_checkpoint(tmp_path)
    plan = write_export(checkpoint, NAME, tmp_path / "out")
    assert wrong_modules(checkpoint, NAME, tmp_path / "out") == []
    found = section(tmp_path / "out")
    assert len(found["config_groups"]) == 3
    assert found["ignore"] == ["lm_head", *(f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1))]
    assert support(plan, "vLLM") == (True, "")


# q_proj has 24 rows, k_proj and v_proj 4 each: 32 together, as the kernel wants, but their zero-points share a word
FOUR_ROWS = {
    "hidden_size": 96,
    "head_dim": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "dense_linears": ["o_proj"],
}


@pytest.mark.parametrize(
    ("grid", "changes", "options", "expected"),
    [
        ({}, {}, {}, ""),
        ({"zero_point": "integer"}, {}, {}, ""),
        ({"bits": 3, "zero_point": "integer"}, {}, {}, ""),
        ({}, {}, {"dtype": "float32"}, "--dtype float16"),
        ({"group_size": -1}, {"intermediate_size": 264}, {}, "multiples of 32"),
        ({"group_size": -1, "zero_point": "integer"}, {"intermediate_size": 272}, {}, "multiples of 32"),
        ({"group_size": -1, "zero_point": "integer"}, FOUR_ROWS, {}, "members with [4, 24, 4] rows do not fill words"),
    ],
    ids=["symmetric", "asymmetric", "int3", "float32", "odd size", "odd rows", "members of 4 rows"],
)
def test_plan_says_whether_vllm_loads_it(
    tmp_path: Path, grid: dict[str, Any], changes: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    """vLLM's restrictions are known before anything is written."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(**grid), **changes)
    loads, reason = support(exporter.plan(checkpoint, ExportOptions(**options)), "vLLM")
    assert loads == (not expected)
    assert expected in reason


def test_slow_group_sizes_are_noted(tmp_path: Path) -> None:
    """Group sizes outside Machete's and Marlin's are exact and run, with a note on speed."""
    plan = exporter.plan(
        tiny_checkpoint(tmp_path, QuantConfig(group_size=96), hidden_size=96, intermediate_size=192, head_dim=24),
        ExportOptions(),
    )
    assert any("[96] runs on slower ones" in note for note in plan.notes)


def test_float_zero_points_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """The paper's free b does not fit an integer zero-point; the error names what holds it."""
    with pytest.raises(UnsupportedError, match=r"Q4_1.*zero_point integer"):
        exporter.plan(tiny_checkpoint(tmp_path, QuantConfig(zero_point="float")), ExportOptions())


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    """Reading back something else is a usage error, not an empty success."""
    with pytest.raises(UsageError, match="not a compressed-tensors folder"):
        list(exporter.read_back(tiny_checkpoint(tmp_path, QuantConfig()).path))


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_transformers_computes_with_the_trained_weights(glass_checkpoint: CheckpointMaker, zero_point: str,
                                                        tmp_path: Path) -> None:  # fmt: skip
    """transformers decompresses the export of a real model on its first forward to the checkpoint's float32 bits."""
    checkpoint = L4QCheckpoint.open(glass_checkpoint(zero_point, group_size=32))
    write_export(checkpoint, NAME, tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    with torch.no_grad():
        assert (model(ids).logits - reference(ids).logits).abs().max() < 1e-4
    for module in checkpoint.modules:
        weight = model.get_submodule(module).weight.detach().numpy()
        assert np.array_equal(weight.view(np.uint32), checkpoint.quantized(module).dequantize().view(np.uint32))


def test_transformers_reads_mixed_schemes(tmp_path: Path) -> None:
    """Several config groups by module name, symmetric and asymmetric, are each decompressed by their own scheme."""
    checkpoint = mixed_checkpoint(tmp_path)
    write_export(checkpoint, NAME, tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        model(torch.arange(3, 20)[None])
    for module in checkpoint.modules:
        weight = model.get_submodule(module).weight.detach().numpy()
        assert np.array_equal(weight, checkpoint.quantized(module).dequantize()), module


@pytest.mark.parametrize("name", ["awq", NAME])
def test_parity_knows_the_folders(tmp_path: Path, name: str) -> None:
    """l4q-parity runs both formats in vLLM within documented bounds, and judges their bits by name."""
    write_export(tiny_checkpoint(tmp_path, QuantConfig()), name, tmp_path / "out")
    (target,) = detect(tmp_path / "out")
    assert (target.format, target.engine) == (name, "vllm")
    assert target.format in EXPORTERS
    assert limits_for(target.format, target.variant) == limits_for("gptq", "")
