"""GPTQ folders: exact under a foreign decoder, damage detected, sizes and grids refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters import gptq
from exporters.gptq.plan import module_nbytes
from exporters.gptq.write import write
from exporters.plan import ExportOptions, ExportPlan, Fidelity
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UnsupportedError, UsageError, VerificationError
from runtime_tests.tiny_llama import export_gptq, tiny_checkpoint


def wrong_modules(checkpoint: L4QCheckpoint, folder: Path) -> list[str]:
    """Modules whose decoded bits differ from the checkpoint's, or are missing."""
    found = dict(gptq.read_back(folder))
    assert all(array.dtype == np.float32 for array in found.values())
    return [
        module
        for module in checkpoint.modules
        if module not in found
        or not np.array_equal(
            found[module].view(np.uint32),
            np.ascontiguousarray(checkpoint.quantized(module).dequantize()).view(np.uint32),
        )
    ]


@pytest.mark.parametrize("gptq_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("zero_point", "group_size"), [("none", 64), ("integer", 32), ("none", -1), ("integer", -1)])
def test_foreign_decoder_returns_the_checkpoint(
    tmp_path: Path, zero_point: ZeroPoint, group_size: int, gptq_format: str
) -> None:
    """compressed-tensors' decoder reads every module bit for bit, in both zero-point conventions."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point=zero_point, group_size=group_size))
    plan = export_gptq(checkpoint, tmp_path / "out", gptq_format=gptq_format)
    assert wrong_modules(checkpoint, tmp_path / "out") == []
    assert len(plan.quantized) == len(checkpoint.modules) == 14
    assert {tensor.fidelity for tensor in plan.quantized} == {Fidelity.EXACT}


def edit_tensor(suffix: str, change: Callable[[torch.Tensor], None]) -> Callable[[Path], None]:
    """Damage one tensor of the first layer's k_proj."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors[f"model.layers.0.self_attn.k_proj.{suffix}"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_config(changes: Mapping[str, Any]) -> Callable[[Path], None]:
    """Lie in the quantization config."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def flip_nibble(words: torch.Tensor) -> None:
    """Change one code by one."""
    words[3, 5] ^= 1 << 12


def next_scale(scales: torch.Tensor) -> None:
    """Move one scale to its neighbour in fp16."""
    scales.view(torch.int16)[1, 7] += 1


def swap_rows(words: torch.Tensor) -> None:
    """Exchange two output rows' codes."""
    words[:, [2, 9]] = words[:, [9, 2]]


def raise_zero(words: torch.Tensor) -> None:
    """Shift a word of zero-points by one step each."""
    words[0, 0] ^= 0x11111111


def permute_groups(index: torch.Tensor) -> None:
    """Pretend an activation order."""
    index[[0, 100]] = index[[100, 0]]


DAMAGE = {
    "nibble": edit_tensor("qweight", flip_nibble),
    "scale": edit_tensor("scales", next_scale),
    "rows": edit_tensor("qweight", swap_rows),
    "zero-point": edit_tensor("qzeros", raise_zero),
    "g_idx": edit_tensor("g_idx", permute_groups),
    "v2 zeros called v1": edit_config({"checkpoint_format": "gptq"}),
    "asymmetric data called sym": edit_config({"sym": True}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_detected(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A nibble, scale, row, zero-point, group order or flag that is wrong fails the comparison."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    export_gptq(checkpoint, tmp_path / "out", gptq_format="gptq_v2")
    assert wrong_modules(checkpoint, tmp_path / "out") == []
    damage(tmp_path / "out")
    try:
        wrong = wrong_modules(checkpoint, tmp_path / "out")
    except VerificationError as error:
        wrong = [str(error)]
    assert wrong


def test_config_is_what_the_loaders_read(tmp_path: Path) -> None:
    """config.json carries GPTQ's section, the serving dtype and nothing of l4q; quantize_config.json repeats it."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig())
    export_gptq(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
    assert expected.items() <= section.items()
    assert section["checkpoint_format"] == "gptq"
    assert "dynamic" not in section
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == section
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        checkpoint.path / "generation_config.json"
    ).read_bytes()


def test_asymmetric_v1_names_a_producer_gptqmodel_accepts(tmp_path: Path) -> None:
    """GPTQModel loads sym: false with v1 zero-points only from producers it knows to keep them in range."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    export_gptq(checkpoint, tmp_path / "out")
    section = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert section["sym"] is False
    assert "gptqmodel:0.9.0" in section["meta"]["quantizer"]


def test_plan_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    """The bytes and the tensor set of the plan equal the file's; dense casts are told apart from exact tensors."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="integer"))
    plan = export_gptq(checkpoint, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.nbytes
    assert plan.quantized[0].nbytes == module_nbytes(checkpoint.info(plan.quantized[0].name))
    dense = [tensor for tensor in plan.tensors if not tensor.quantized]
    assert {tensor.name for tensor in dense} == set(checkpoint.dense_names) <= set(tensors)
    assert {tensor.fidelity for tensor in dense} == {Fidelity.ROUNDED}
    assert any("float16" in note for note in plan.notes)
    for tensor in dense:
        assert torch.equal(tensors[tensor.name], checkpoint.dense(tensor.name).to(torch.float16))


def test_float32_keeps_dense_tensors_exact(tmp_path: Path) -> None:
    """With dtype float32 every tensor is exact, and the plan says that vLLM will not serve it."""
    plan = gptq.plan(tiny_checkpoint(tmp_path, QuantConfig()), ExportOptions(dtype="float32"))
    assert {tensor.fidelity for tensor in plan.tensors} == {Fidelity.EXACT}
    assert support(plan, "vLLM") == (False, "float16")


def test_shards_are_filled_and_indexed(tmp_path: Path) -> None:
    """Small shards give several non-empty files and an index naming each tensor once; a huge tensor stands alone."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig())
    options = ExportOptions(max_shard_bytes=9_000)
    plan, folder = gptq.plan(checkpoint, options), tmp_path / "out"
    seen: list[str] = []
    folder.mkdir()
    write(checkpoint, plan, folder, options, seen.append)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert seen == [tensor.name for tensor in plan.tensors]
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    contents = {file.name: set(load_file(file)) for file in files}
    assert all(contents.values())
    assert index["weight_map"] == {name: file for file, names in contents.items() for name in names}
    assert index["metadata"]["total_size"] == plan.nbytes
    assert wrong_modules(checkpoint, folder) == []


def support(plan: ExportPlan, runtime: str) -> tuple[bool, str]:
    """(loads, the first expected word found in the reason)."""
    row = next(row for row in plan.runtimes if row.runtime == runtime)
    words = ("compressed-tensors", "group sizes", "float16", "partly", "multiples")
    return row.loads, next((word for word in words if word in row.reason), "")


@pytest.mark.parametrize(
    ("grid", "changes", "expected"),
    [
        ({}, {}, (True, "")),
        ({"zero_point": "integer"}, {}, (False, "compressed-tensors")),
        ({"group_size": 256}, {"hidden_size": 256, "num_attention_heads": 8}, (False, "group sizes")),
        ({"group_size": -1}, {"intermediate_size": 264}, (False, "multiples")),
    ],
    ids=["symmetric", "asymmetric", "group", "odd size"],
)
def test_plan_says_whether_vllm_loads_it(
    tmp_path: Path, grid: dict[str, Any], changes: dict[str, Any], expected: tuple[bool, str]
) -> None:
    """The restrictions of vLLM are known before anything is written; GPTQModel takes all of these."""
    plan = gptq.plan(tiny_checkpoint(tmp_path, QuantConfig(**grid), **changes), ExportOptions())
    assert support(plan, "vLLM") == expected
    assert support(plan, "GPTQModel")[0]


def test_dense_linears_are_skipped_by_name(tmp_path: Path) -> None:
    """A linear that stayed dense is named in `dynamic`, so that loaders do not expect GPTQ tensors there."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(), dense_linears=["o_proj"])
    export_gptq(checkpoint, tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    skipped: dict[str, Any] = {rf"-:^model\.layers\.{layer}\.self_attn\.o_proj$": {} for layer in (0, 1)}
    assert section["dynamic"] == skipped


def test_float_zero_points_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """GPTQ cannot hold the paper's free b; the error names GGUF Q4_1 and zero_point integer."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point="float"))
    with pytest.raises(UnsupportedError, match=r"Q4_1.*zero_point integer"):
        gptq.plan(checkpoint, ExportOptions())


@pytest.mark.parametrize("zero_point", ["none", "integer"])
@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_held_exactly_by_four(tmp_path: Path, bits: int, zero_point: ZeroPoint) -> None:
    """2- and 3-bit codes move into 4-bit fields without loss, and the plan and the config say 4."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=bits, zero_point=zero_point))
    plan = export_gptq(checkpoint, tmp_path / "out")
    assert wrong_modules(checkpoint, tmp_path / "out") == []
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (section["bits"], section["sym"]) == (4, zero_point == "none")
    assert plan.quantized[0].encoding.startswith(f"int{bits} in 4-bit fields")
    assert plan.bits_per_weight > 4
    assert any(f"{bits}-bit codes are stored in 4-bit fields" in note for note in plan.notes)


def test_sizes_that_do_not_fill_words_are_all_listed(tmp_path: Path) -> None:
    """Every offending module is named with its size."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=-1), intermediate_size=340)
    with pytest.raises(UnsupportedError) as caught:
        gptq.plan(checkpoint, ExportOptions())
    for layer in (0, 1):
        for name, shape in (("gate_proj", "[340, 128]"), ("up_proj", "[340, 128]"), ("down_proj", "[128, 340]")):
            assert f"model.layers.{layer}.mlp.{name} {shape}" in str(caught.value)


def test_a_dense_value_that_overflows_is_refused(tmp_path: Path) -> None:
    """A finite weight that would become infinite in float16 stops the export and names bfloat16, which holds it."""
    tiny_checkpoint(tmp_path, QuantConfig())
    path = tmp_path / "l4q" / "model.safetensors"
    checkpoint = L4QCheckpoint.open(tmp_path / "l4q")
    weights = [(module, checkpoint.quantized(module)) for module in checkpoint.modules]
    dense = {name: checkpoint.dense(name).clone() for name in checkpoint.dense_names}
    dense["model.norm.weight"][3] = 1e5
    save_checkpoint(
        path.parent,
        config=checkpoint.config,
        weights=weights,
        dense=dense.items(),
        quant=checkpoint.quant,
        overwrite=True,
    )
    with pytest.raises(UnsupportedError, match=r"(?s)model\.norm\.weight.*bfloat16"):
        export_gptq(L4QCheckpoint.open(path.parent), tmp_path / "out")
    export_gptq(L4QCheckpoint.open(path.parent), tmp_path / "bf16", dtype="bfloat16")


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    """Reading back something that is not GPTQ is a usage error, not an empty success."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig())
    with pytest.raises(UsageError, match="not a GPTQ folder"):
        list(gptq.read_back(checkpoint.path))
