"""The K grids in training and in the checkpoint: nearest values, exact freezing, golden bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.verify import compare_bits
from l4q import k_snap
from l4q.bitpack import pack_codes
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.k_grids import K_GRIDS
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, save_l4q, trained_grid, wrap_linears
from l4q.quant import StraightThrough, snap_mins, snap_scales
from l4q.refreeze import regrid_model
from l4q.weight import QuantizedWeight
from runtime_tests.conftest import disturb
from runtime_tests.random_models import build_model, random_weight
from runtime_tests.test_linear import gradients, reference_weight
from runtime_tests.tiny_llama import SIZES

Q4_K = QuantConfig(group_size=32, zero_point="float", scale_grid="q4_k")
Q4_K_NONE = QuantConfig(group_size=32, zero_point="none", scale_grid="q4_k")
Q3_K = QuantConfig(bits=3, group_size=16, zero_point="none", scale_grid="q3_k")
GRIDS = {"q4_k": Q4_K, "q4_k-none": Q4_K_NONE, "q3_k": Q3_K}
# Query heads of 4 * 48 = 192 columns, so that o_proj's rows do not fill a superblock.
MIXED = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "head_dim": 48}


def k_layer(
    quant: QuantConfig, *, dtype: torch.dtype = torch.float32, init: Any = "l4q", std: float = 0.02
) -> L4QLinear:
    """A 40 x 512 layer with moved scales and offsets and B not zero."""
    torch.manual_seed(3)
    linear = nn.Linear(512, 40, bias=False, dtype=dtype)
    nn.init.normal_(linear.weight, std=std)
    layer = L4QLinear.from_linear(linear, quant, LoraConfig(rank=3, alpha=2.0), init=init)
    with torch.no_grad():
        layer.lora_B.normal_(0, std / 5)
        layer.scales.mul_(0.7 + 0.5 * torch.rand_like(layer.scales))
        if quant.zero_point != "none":
            layer.offsets.copy_(torch.randn_like(layer.offsets) * layer.scales)
    return layer


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(K_GRIDS)), st.integers(0, 2**31), st.floats(-26, 10), st.floats(0, 9), st.integers(0, 1))
@example("q4_k", 5, -22.0, 2.0, 1)
def test_snapping(name: str, seed: int, exponent: float, spread: float, least: int) -> None:
    """Any positive values: on the grid and stable; the largest of a superblock is kept or grows; others are nearest."""
    grid = K_GRIDS[name]
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp2(exponent - spread * torch.rand(5, 2 * grid.groups, generator=generator))
    parts = k_snap.split(values, grid, least=least)
    snapped = k_snap.join(parts)
    assert torch.equal(parts.units.half().to(values.dtype), parts.units)
    assert int(parts.integers.min()) >= least
    assert int(parts.integers.max()) <= grid.top
    assert all(torch.equal(a, b) for a, b in zip(k_snap.split(snapped, grid, least=least), parts, strict=True))
    units = parts.units.repeat_interleave(grid.groups, dim=1)
    largest = values == values.view(5, 2, -1).amax(-1).repeat_interleave(grid.groups, dim=1)
    assert torch.all(snapped[largest] >= values[largest] * (1 - 2.0**-16))
    near = (snapped - values).abs() <= units * (0.5 + 1e-5)
    assert torch.all(near | largest | (parts.integers == least))
    above = k_snap.split_above(values, grid, least=least)
    assert torch.all(k_snap.join(above) >= values)
    assert all(
        torch.equal(a, b) for a, b in zip(k_snap.split(k_snap.join(above), grid, least=least), above, strict=True)
    )


def test_no_mins_at_all() -> None:
    """A superblock whose mins are all zero has unit 0 and no NaN."""
    parts = k_snap.split(torch.zeros(2, 8), K_GRIDS["q4_k"], least=0)
    assert not parts.units.any()
    assert not parts.integers.any()
    assert torch.equal(snap_mins(torch.full((1, 8), 0.5), "q4_k"), torch.zeros(1, 8))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("init", ["l4q", "lsq+", "symm", "asymm"])
@pytest.mark.parametrize("std", [1e-4, 0.02, 3.0])
def test_frozen_weight_is_the_forward_bit_for_bit(name: str, init: str, std: float) -> None:
    """dequantize(freeze(layer)) == the weight the forward multiplied with, also with subnormal fp16 units."""
    quant = GRIDS[name]
    if init == "asymm" and quant.zero_point == "none":
        with pytest.raises(UsageError, match="needs offsets"):
            k_layer(quant, init=init)
        return
    layer = k_layer(quant, init=init, std=std)
    forward = layer(torch.eye(512)).T.detach()
    frozen = layer.freeze()
    assert frozen.k_grid == quant.scale_grid
    assert compare_bits(frozen.dequantize(), layer.quantized_weight().numpy()) is None
    assert torch.equal(forward, torch.from_numpy(frozen.dequantize()))
    assert frozen.sub_scales is not None
    frozen.sub_scales[3, 5] ^= 1  # the twin: one integer scale off by one
    assert compare_bits(frozen.dequantize(), layer.quantized_weight().numpy()) is not None


@pytest.mark.parametrize(("name", "init"), [("q4_k", "asymm"), ("q4_k-none", "l4q"), ("q3_k", "l4q")])
def test_starts_that_promise_not_to_clip(name: str, init: Any) -> None:
    """No weight lies outside the codes at step 0, and s starts on the grid."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 64, bias=False)
    layer = L4QLinear.from_linear(linear, GRIDS[name], LoraConfig(rank=2), init=init)
    params = layer.grid()
    assert torch.equal(params.scales, layer.scales)
    position = (
        linear.weight.detach().view(*params.scales.shape, -1) - params.mins.unsqueeze(-1)
    ) / params.scales.unsqueeze(-1)
    assert float(position.detach().min()) >= -1e-4
    assert float(position.detach().max()) <= layer.quant.max_code + 1e-4


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_equal_autograd(name: str) -> None:
    """Forward and gradients equal autograd through clamp and straight-through rounding onto the K grid, to 1e-12."""
    layer = k_layer(GRIDS[name], dtype=torch.float64, std=0.5)

    def reference() -> torch.Tensor:
        if name != "q4_k":
            return reference_weight(layer)
        scales = StraightThrough.apply(layer.scales, snap_scales(layer.scales, "q4_k")).unsqueeze(-1)
        free = layer.offsets - 8 * scales.squeeze(-1)
        mins = StraightThrough.apply(free, snap_mins(free, "q4_k")).unsqueeze(-1)
        merged = (layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A).view(*layer.scales.shape, -1)  # type: ignore[operator]
        clamped = ((merged - mins) / scales).clamp(0, 15)
        return (StraightThrough.apply(clamped, clamped.detach().round()) * scales + mins).view(40, 512)

    x = torch.randn(7, 512, dtype=torch.float64)
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda value: F.linear(value, reference()))
    assert set(ours) == set(theirs)
    for part, gradient in ours.items():
        assert float((gradient - theirs[part]).abs().max()) <= 1e-12 * max(1.0, float(theirs[part].abs().max())), part
    assert layer.scales.grad is not None
    assert float(layer.scales.grad.abs().min()) > 0  # every group's own scale learns


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            {"scale_grid": "q4_k"},
            r"(?s)fixes the bits.*got: bits 4, group_size 64.*group_size 32, zero_point none or float",
        ),
        ({"scale_grid": "q4_k", "group_size": 32, "zero_point": "integer"}, "zero_point none or float"),
        ({"scale_grid": "q4_k", "group_size": 32, "bits": 3}, "--bits 4 --group-size 32 --zero-point float"),
        ({"scale_grid": "q3_k", "group_size": 16, "bits": 3, "zero_point": "float"}, "zero_point none"),
        ({"scale_grid": "q3_k", "group_size": -1, "bits": 3}, "--bits 3 --group-size 16 --zero-point none"),
        ({"scale_grid": "fp16", "group_size": 16}, "group_size has an unsupported value"),
        ({"scale_grid": ["q4_k"]}, "scale_grid has an unsupported value"),
    ],
)
def test_grids_that_do_not_exist(grid: dict[str, Any], expected: str) -> None:
    """A K grid with other bits, groups or zero-points is refused with what fits; groups of 16 belong to q3_k alone."""
    with pytest.raises(UsageError, match=expected):
        QuantConfig(**grid)


@pytest.mark.parametrize("name", GRIDS)
def test_checkpoint_of_a_mixed_model(name: str, tmp_path: Path) -> None:
    """Rows of 192 fall back to fp16 scales, the rest is on the K grid; transformers computes the trained logits."""
    quant = GRIDS[name]
    model = build_model("llama", MIXED)
    report = wrap_linears(model, quant, LoraConfig(rank=2))
    assert report.fallback == tuple(f"model.layers.{layer}.self_attn.o_proj" for layer in range(2))
    assert "2 of 14 layers" in report.describe_start()[0]
    assert trained_grid(model) == quant
    disturb(model)
    ids = torch.arange(40)[None] * 7 % 320
    with torch.no_grad():
        trained = model(ids).logits
    save_l4q(model, tmp_path / "l4q", quant=quant)
    checkpoint = L4QCheckpoint.open(tmp_path / "l4q")
    for module, layer in l4q_layers(model):
        off, info = module in report.fallback, checkpoint.info(module)
        assert (info.bits, info.group_size, info.k_grid) == (
            (4, 32, None) if off else (quant.bits, quant.group_size, quant.scale_grid)
        )
        assert compare_bits(checkpoint.quantized(module).dequantize(), layer.quantized_weight().numpy()) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "l4q", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("l4q", "again"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_layers_off_the_grid_can_stay_dense() -> None:
    """--leave-dense keeps them as they are; a K grid that fits no layer is refused with one that does."""
    model = build_model("llama", MIXED)
    report = wrap_linears(model, Q3_K, LoraConfig(rank=2), skip_indivisible=True)
    assert report.fallback == ()
    assert "model.layers.0.self_attn.o_proj" in report.dense
    assert {layer.quant for _, layer in l4q_layers(model)} == {Q3_K}
    model = build_model("llama", SIZES)
    with pytest.raises(UsageError, match=r"(?s)q4_k fits none.*multiples of 256.*--scale-grid fp16"):
        wrap_linears(model, Q4_K, LoraConfig(rank=2, target_modules=("q_proj", "up_proj")))


@pytest.mark.parametrize("quant", [Q4_K, Q3_K], ids=["q4_k", "q3_k"])
def test_smollm2_is_mostly_off_the_grid(quant: QuantConfig, smollm2_dir: Path) -> None:
    """Of SmolLM2's linears only down_proj, 1536 wide, is on a K grid; those that are 576 wide are listed."""
    config = AutoConfig.from_pretrained(smollm2_dir, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    report = wrap_linears(model, quant, LoraConfig(rank=2))
    assert len(report.fallback) == 12
    assert {name.rpartition(".")[2] for name in set(report.wrapped) - set(report.fallback)} == {"down_proj"}
    assert {layer.in_features for _, layer in l4q_layers(model) if layer.quant == quant} == {1536}
    assert trained_grid(model) == quant


def test_refreezing_onto_and_off_a_k_grid() -> None:
    """A run with float zero-points moves onto q4_k and back onto fp16 by snap and recode, at some cost each."""
    model = build_model("llama", MIXED)
    fp16 = QuantConfig(group_size=32, zero_point="float")
    wrap_linears(model, fp16, LoraConfig(rank=2), init="asymm")
    overall = regrid_model(model, lambda _: Q4_K)[-1]
    assert trained_grid(model) == Q4_K
    assert model.model.layers[0].self_attn.o_proj.quant == fp16
    assert 0 < overall.change < 0.15
    assert regrid_model(model, lambda _: fp16)[-1].change < 0.05
    small = build_model("llama", {**SIZES, "intermediate_size": 160})
    wrap_linears(small, fp16, LoraConfig(rank=2))
    with pytest.raises(UsageError, match="fits none"):
        regrid_model(small, lambda _: Q4_K)


def golden_weight(grid: str) -> QuantizedWeight:
    """The worked examples of docs/format.md."""
    codes = np.arange(256, dtype=np.uint8)[None] * 7 % 16
    scales = np.array([[0.25]], np.float16)
    if grid == "q3_k":
        integers = np.arange(1, 17, dtype=np.uint8)[None]
        return QuantizedWeight(codes=codes % 8, scales=scales, sub_scales=integers, bits=3, group_size=16)
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        sub_scales=np.array([[1, 2, 3, 4, 5, 6, 7, 63]], np.uint8),
        mins=np.array([[-0.5]], np.float16),
        sub_mins=np.array([[0, 1, 2, 3, 4, 5, 6, 63]], np.uint8),
        bits=4,
        group_size=32,
    )


@pytest.mark.parametrize("grid", ["q4_k", "q3_k"])
def test_golden_bytes_of_the_specification(grid: str, tmp_path: Path) -> None:
    """The tensors, the record and the values of docs/format.md's K-grid examples."""
    weight, quant = golden_weight(grid), Q4_K if grid == "q4_k" else Q3_K
    save_checkpoint(tmp_path / "l4q", config={}, weights=[("M", weight)], dense=[], quant=quant)
    tensors = {
        key: value.numpy().tobytes().hex(" ") for key, value in load_file(tmp_path / "l4q/model.safetensors").items()
    }
    assert tensors.pop("M.codes") == pack_codes(weight.codes, weight.bits).tobytes().hex(" ")
    values = L4QCheckpoint.open(tmp_path / "l4q").quantized("M").dequantize()[0]
    if grid == "q4_k":
        assert tensors == {
            "M.scales": "00 34",
            "M.sub_scales": "01 02 03 04 05 06 07 3f",
            "M.mins": "00 b8",
            "M.sub_mins": "00 01 02 03 04 05 06 3f",
        }
        assert values[32:36].tolist() == [-0.5, 3.0, 6.5, 2.0]
        assert values[224] == -31.5
    else:
        assert tensors == {"M.scales": "00 34", "M.sub_scales": " ".join(f"{n:02x}" for n in range(1, 17))}
        assert values[16:20].tolist() == [-2.0, 1.5, 1.0, 0.5]
    record = json.loads(L4QCheckpoint.open(tmp_path / "l4q")._shards.metadata("M.codes")["M"])
    assert record == {
        "bits": quant.bits,
        "group_size": quant.group_size,
        "scale_grid": grid,
        "shape": [1, 256],
        "zero_point": quant.zero_point,
    }


def poison(part: str, value: float) -> Any:
    """Set one entry of a tensor."""
    return lambda tensors: tensors[f"M.{part}"].__setitem__((0, 0), value)


HOSTILE = {
    "zero scale": (poison("sub_scales", 0), r"sub_scales.*\n.*\n.*got: \[0, "),
    "scale of 7 bits": (poison("sub_scales", 64), "sub_scales"),
    "min of 7 bits": (poison("sub_mins", 64), "sub_mins"),
    "negative d": (poison("scales", -0.25), "scales"),
    "NaN d": (poison("scales", float("nan")), "scales"),
    "infinite dmin": (poison("mins", -float("inf")), "mins"),
    "positive dmin": (poison("mins", 0.5), r"(?s)mins.*<= 0 on a K grid"),
    "no integers": (lambda tensors: tensors.pop("M.sub_scales"), "sub_scales is missing"),
    "no integer mins": (lambda tensors: tensors.pop("M.sub_mins"), "sub_mins is missing"),
    "d per group": (lambda tensors: tensors.update({"M.scales": torch.ones(1, 8).half()}), "wrong dtype or shape"),
    "zeros too": (lambda tensors: tensors.update({"M.zeros": torch.ones(1, 8).byte()}), "not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused(name: str, tmp_path: Path) -> None:
    """Every tensor of a K-grid module is checked when it is opened or read, and named."""
    damage, message = HOSTILE[name]
    save_checkpoint(tmp_path / "l4q", config={}, weights=[("M", golden_weight("q4_k"))], dense=[], quant=Q4_K)
    path = tmp_path / "l4q" / "model.safetensors"
    tensors, metadata = load_file(path), L4QCheckpoint.open(tmp_path / "l4q")._shards.metadata("M.codes")
    damage(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UsageError, match=message):
        L4QCheckpoint.open(tmp_path / "l4q").quantized("M")


def test_weights_that_are_no_k_grid() -> None:
    """Integer scales with bits, groups, a row or zero-points that no K grid has are refused."""
    good = random_weight((2, 256), Q4_K, 0)
    values = {key: value for key, value in vars(good).items() if key in QuantizedWeight.__dataclass_fields__}
    for change, field in (
        ({"bits": 2, "codes": good.codes % 4}, "sub_scales"),
        ({"mins": None}, "sub_mins"),
        ({"sub_scales": None}, "sub_mins"),
        ({"group_size": 64}, "sub_scales"),
    ):
        with pytest.raises(UsageError, match=f"invalid quantized weight: {field}"):
            QuantizedWeight(**{**values, **change})
    narrow = random_weight((2, 256), Q3_K, 0)
    with pytest.raises(UsageError, match="invalid quantized weight: zero_point"):
        QuantizedWeight(
            codes=narrow.codes,
            scales=narrow.scales,
            sub_scales=narrow.sub_scales,
            zeros=np.full((2, 16), 4, np.uint8),
            bits=3,
            group_size=16,
        )
