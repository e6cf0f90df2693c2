"""W0 as packed integers: what it is, that training cannot tell it from the dense equivalent, and what it saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from l4q.base import PackedBase, base_nbytes
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, wrap_linears
from l4q.starts.grid import LinearGrid
from l4q.train import train
from l4q.train_options import EvalOptions
from runtime_tests.train_runs import base_options, final_weights, metrics, rewind, same_bits, same_checkpoints

# storage -> (steps to the largest weight, block, bytes per weight)
STORED = {"int8": ((127,), 64, 1 + 2 / 64), "int4": ((7, 8, 9), 32, 0.5 + 2 / 32)}
KINDS = ("none", "integer", "float")


def random_grid(shape: tuple[int, int], *, bits: int, group_size: int, kind: str, seed: int = 0) -> LinearGrid:
    """Integers as a pre-quantized start has them."""
    rng = torch.Generator().manual_seed(seed)
    groups = (shape[0], shape[1] // group_size)
    return LinearGrid.build(
        torch.randint(0, 1 << bits, shape, generator=rng, dtype=torch.uint8),
        (torch.rand(groups, generator=rng) * 0.02 + 0.001).half(),
        torch.randint(1, 1 << bits, groups, generator=rng) if kind == "integer" else None,
        (torch.randn(groups, generator=rng) * 0.1).half() if kind == "float" else None,
        bits=bits,
        where="test",
    )


def packed_base(storage: str, shape: tuple[int, int]) -> PackedBase:
    """A packed W0: "int8", "int4", or "start" with 3-bit integers."""
    if storage == "start":
        size = shape[1] if shape[1] % 32 else 32
        return PackedBase.from_grid(random_grid(shape, bits=3, group_size=size, kind="integer"))
    torch.manual_seed(3)
    return PackedBase.quantize(torch.randn(shape) * 0.05, storage)  # type: ignore[arg-type]


def best_block(values: np.ndarray, counts: tuple[int, ...], bits: int) -> tuple[np.float16, np.ndarray]:
    """Scale and signed codes of one block, by trying every candidate."""
    extreme = values[np.abs(values).argmax()]
    found = []
    for count in counts:
        wanted = np.abs(extreme) / np.float32(count)
        scale = np.float16(max(wanted, 2.0**-24))
        scale = np.nextafter(scale, np.float16(np.inf)) if np.float32(scale) < wanted else scale
        signed = -scale if extreme > 0 else scale
        codes = np.clip(np.rint(values / np.float32(signed)), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        found.append((float(np.square(codes * np.float32(signed) - values).sum()), signed, codes))
    _, signed, codes = min(found, key=lambda item: item[0])
    return signed, codes


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("columns", [128, 341])
def test_blocks_follow_their_definition(storage: str, columns: int) -> None:
    """Every block has the best of its candidate scales and the nearest codes, by NumPy's arithmetic and own bits."""
    counts, block, _ = STORED[storage]
    weight = (np.random.default_rng(0).standard_normal((5, columns)) * 0.05).astype(np.float32)
    weight[2, :block] = 0
    packed = PackedBase.quantize(torch.from_numpy(weight), storage)  # type: ignore[arg-type]
    bits, found = packed.bits, packed.dequantize().numpy()
    padded = np.pad(weight, ((0, 0), (0, -columns % block))).reshape(5, -1, block)
    for row, stream in enumerate(packed.codes.numpy()):
        number = int.from_bytes(stream.tobytes(), "little")  # one little-endian number per row
        fields = np.array([number >> bits * k & ((1 << bits) - 1) for k in range(padded[row].size)])
        signed = fields.reshape(-1, block) - (1 << (bits - 1))
        for index, values in enumerate(padded[row]):
            scale, codes = best_block(values, counts, bits)
            assert np.array_equal(signed[index], codes)
            assert not values.any() or packed.block_scales[row, index] == float(scale)
            piece = found[row, index * block : (index + 1) * block]
            assert np.array_equal(piece, (codes * np.float32(scale)).astype(np.float32)[: len(piece)])


def test_four_bits_beat_the_same_block_of_gguf() -> None:
    """The error of `int4` is below that of gguf's Q4_0, which has as many bits; `int8` is far below both."""
    weight = (np.random.default_rng(2).standard_normal((64, 256)) * 0.05).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    errors = {"Q4_0": float(np.square(theirs - weight).mean())}
    for storage in STORED:
        ours = PackedBase.quantize(torch.from_numpy(weight), storage).dequantize().numpy()  # type: ignore[arg-type]
        errors[storage] = float(np.square(ours - weight).mean())
    assert errors["int8"] < errors["int4"] / 100 < errors["Q4_0"] / 100
    assert errors["int4"] < 0.97 * errors["Q4_0"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [32, 341])
def test_a_start_keeps_its_own_integers(bits: int, kind: str, group_size: int) -> None:
    """Any run of rows of a packed start equals the grid's own dequantization bit for bit; a changed code is noticed."""
    grid = random_grid((9, group_size * (1 if group_size == 341 else 3)), bits=bits, group_size=group_size, kind=kind)
    packed = PackedBase.from_grid(grid)
    expected = grid.dequantize()
    assert torch.equal(packed.rows(slice(2, 7)), expected[2:7])
    assert torch.equal(packed.dequantize().view(torch.int32), expected.view(torch.int32))
    packed.codes[4, 1] ^= 1
    assert not torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_those_rows(kind: str) -> None:
    """The rows of a process of several: the same weights, in shared memory, and the whole is left as it was."""
    base = PackedBase.from_grid(random_grid((7, 64), bits=4, group_size=32, kind=kind))
    part = base.part(lambda tensor: tensor[3:])
    assert torch.equal(part.dequantize(), base.dequantize()[3:])
    assert base.shape == (7, 64)
    base.codes[5] ^= 1
    assert torch.equal(part.dequantize(), base.dequantize()[3:])
    assert not torch.equal(part.dequantize(), base.dequantize()[2:6])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_unstorable_weights_are_refused(value: float) -> None:
    """NaN, infinity and values beyond fp16 scales stop with the layer's name."""
    weight = torch.ones(4, 64)
    weight[1, 2] = value
    with pytest.raises(UsageError, match=r"(?s)quantized base.*some\.layer"):
        PackedBase.quantize(weight, "int4", "some.layer")


def twin_layers(storage: str, kind: str, shape: tuple[int, int]) -> tuple[L4QLinear, L4QLinear]:
    """A layer with a packed W0 and one with the same values dense, moved away from step 0 alike."""
    group_size = -1 if shape[1] % 32 else 32
    quant = QuantConfig(group_size=group_size, zero_point=kind)  # type: ignore[arg-type]
    packed = packed_base(storage, shape)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    layers = []
    for base in (packed, nn.Parameter(packed.dequantize(), requires_grad=False)):
        torch.manual_seed(5)
        layer = L4QLinear.from_linear(linear, quant, LoraConfig(rank=3), base=base)
        with torch.no_grad():
            layer.lora_B.normal_(0, 0.02)
            layer.scales.mul_(0.7 + 0.2 * torch.rand_like(layer.scales))
            if kind != "none":
                layer.offsets.copy_(torch.randn_like(layer.offsets) * layer.scales)
        layers.append(layer)
    return layers[0], layers[1]


def step(layer: L4QLinear, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Output and all gradients of one forward and backward."""
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad and p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("storage", ["int8", "int4", "start"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2800, 96), (40, 341)])
@pytest.mark.parametrize("warmup", [False, True])
def test_training_cannot_tell_it_from_dense(storage: str, kind: str, shape: tuple[int, int], warmup: bool) -> None:
    """Output and every gradient equal the dense equivalent's bit for bit, over several row blocks and in a warm-up."""
    packed, dense = twin_layers(storage, kind, shape)
    if warmup:
        packed.start_warmup()
        dense.start_warmup()
    ours, theirs = step(packed), step(dense)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_changed_base_is_noticed() -> None:
    """The twin: one code of W0 off by one changes the gradients."""
    packed, dense = twin_layers("int4", "integer", (40, 96))
    assert isinstance(packed.weight, PackedBase)
    packed.weight.codes[7, 3] ^= 4
    ours, theirs = step(packed), step(dense)
    assert not torch.equal(ours["y"], theirs["y"])
    assert not torch.equal(ours["lora_A"], theirs["lora_A"])


@pytest.mark.parametrize("storage", ["int8", "int4", "start"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2800, 96), (40, 341)])
def test_frozen_is_the_forward_bit_for_bit(storage: str, kind: str, shape: tuple[int, int]) -> None:
    """dequantize(freeze(layer)) is what the forward multiplied with, whatever W0 is stored as."""
    layer, _ = twin_layers(storage, kind, shape)
    forward = layer(torch.eye(layer.in_features)).T.detach()
    frozen = torch.from_numpy(layer.freeze().dequantize())
    assert torch.equal(frozen.view(torch.int32), layer.quantized_weight().view(torch.int32))
    assert torch.equal(forward, frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("warmup", [False, True])
def test_backward_keeps_no_dense_weight(dtype: torch.dtype, warmup: bool) -> None:
    """Autograd keeps a small part of one dense weight, also in a warm-up, where a plain linear would keep all of it."""
    layer = L4QLinear.from_linear(
        nn.Linear(512, 512, bias=False), QuantConfig(), LoraConfig(rank=4), base=packed_base("int4", (512, 512))
    )
    if warmup:
        layer.start_warmup()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(64, 512, dtype=dtype, requires_grad=True))
    y.float().sum().backward()
    assert sum(kept.values()) <= 0.3 * 512 * 512 * dtype.itemsize


@pytest.mark.parametrize("storage", STORED)
def test_bytes_of_a_wrapped_model(glassllm_dir: Path, storage: str) -> None:
    """Every wrapped W0 of a real model takes the stated bytes per weight, and the dense weights are gone."""
    from transformers import AutoModelForCausalLM

    counts = {}
    for kept in ("dense", storage):
        model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
        wrap_linears(model, QuantConfig(), LoraConfig(rank=4), skip_indivisible=True, storage=kept)  # type: ignore[arg-type]
        layers = [layer for _, layer in l4q_layers(model)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        frozen = {p.data_ptr(): p.nbytes for layer in layers for p in layer.parameters() if not p.requires_grad}
        offsets = sum(layer.offsets.nbytes for layer in layers)
        counts[kept] = sum(frozen.values()) - offsets
        assert counts[kept] == sum(base_nbytes(layer.weight) for layer in layers)
    assert counts["dense"] == 4 * weights
    assert counts[storage] == STORED[storage][2] * weights


def test_a_resumed_run_is_the_uninterrupted_one(glassllm_dir: Path, tmp_path: Path) -> None:
    """With W0 in 4-bit blocks, a run continued from step 3 ends with the same bits; another storage is refused."""
    options: Any = base_options(glassllm_dir, tmp_path)
    held_out = glassllm_dir.parent / "text/wiki_demo.txt"
    options = dataclasses.replace(
        options, base_storage="int4", steps=5, evaluation=EvalOptions(text=held_out, windows=2)
    )
    result = train(options)
    broken = rewind(options.out, tmp_path / "broken", 3)
    again = dataclasses.replace(options, out=broken, resume=True)
    with pytest.raises(UsageError, match="base_storage"):
        train(dataclasses.replace(again, base_storage="dense"))
    train(again)
    assert same_bits(final_weights(options.out), final_weights(broken))
    assert same_checkpoints(options.out, broken)
    assert len(metrics(broken)) == 5
    dense = train(dataclasses.replace(options, base_storage="dense", out=tmp_path / "dense"))
    assert result["perplexity"]["base"] != dense["perplexity"]["base"]  # "base" is W0 as it is stored
