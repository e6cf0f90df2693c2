"""Autocast: products in bfloat16, while the trained function stays the one that freezing writes down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from l4q.base import PackedBase, dense_base
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.evaluate import windows_perplexity
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, load_trainable_state, trainable_state, wrap_linears
from l4q.quant import LoraUpdate, freeze_weight
from l4q.train import evaluation_windows, train
from l4q.train_model import load_model, wrap_model
from l4q.train_options import EvalOptions
from runtime_tests.conftest import disturb
from runtime_tests.train_runs import base_options, final_weights

KINDS = ("none", "integer", "float")
ROWS, COLUMNS = 96, 128


def autocast() -> torch.autocast:
    """What Trainer(bf16=True) surrounds the forward with."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def make_layer(kind: str, *, packed: bool = False) -> L4QLinear:
    """A layer as in the middle of a training."""
    torch.manual_seed(0)
    quant = QuantConfig(group_size=32, zero_point=kind)  # type: ignore[arg-type]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    base = PackedBase.quantize(linear.weight, "int8") if packed else None
    layer = L4QLinear.from_linear(linear, quant, LoraConfig(rank=4), base=base)
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.02)
        if layer.offsets.requires_grad:
            layer.offsets.copy_(0.6 * torch.randn_like(layer.offsets) * layer.scales)
    return layer


def multiplied_weight(layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] that a layer multiplies with under autocast: each product has a single term that counts."""
    with autocast(), torch.no_grad():
        y = layer(torch.eye(COLUMNS))
    assert y.dtype == torch.bfloat16
    return y.T


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_multiplies_with_the_frozen_weight(kind: str, packed: bool) -> None:
    """Bit for bit freeze()'s weight in bfloat16; a merge in bfloat16 would give other codes."""
    layer = make_layer(kind, packed=packed)
    frozen = layer.freeze()
    expected = torch.from_numpy(frozen.dequantize()).to(torch.bfloat16)
    assert torch.equal(multiplied_weight(layer), expected)
    with autocast():
        assert np.array_equal(layer.freeze().codes, frozen.codes)
        assert torch.equal(layer.quantized_weight(), torch.from_numpy(frozen.dequantize()))
    with torch.no_grad(), autocast():
        merged = dense_base(layer.weight) + layer.lora.scaling * (layer.lora_B @ layer.lora_A)
        nothing = LoraUpdate(torch.zeros_like(layer.lora_A), layer.lora_B, 1.0)
        twin = freeze_weight(merged.to(torch.bfloat16).float(), nothing, layer.grid(), layer.quant)
    assert not np.array_equal(twin.codes, frozen.codes)


def gradients(layer: L4QLinear, x: torch.Tensor, context: Any) -> dict[str, torch.Tensor]:
    """Gradients of a fixed projection of the output, by parameter, and that of the input."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    projection = torch.randn(x.shape[0], ROWS, generator=torch.Generator().manual_seed(1))
    with context:
        y = layer(x)
    (y.float() * projection).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "x": x.grad}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest distance of two tensors of equal name, relative to the norm of the second."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in right)


@pytest.mark.parametrize("quantizing", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_arrive_and_are_those_of_float32(kind: str, packed: bool, quantizing: bool) -> None:
    """Every gradient within bfloat16's noise of the float32 one, in a LoRA warm-up too; another input is not."""
    layer = make_layer(kind, packed=packed)
    layer.quantizing = quantizing
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(2))
    plain = gradients(layer, x, nullcontext())
    mixed = gradients(layer, x, autocast())
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    expected = {"x", "lora_A", "lora_B"} | ({"scales"} if quantizing else set())
    assert set(mixed) == expected | ({"offsets"} if quantizing and kind != "none" else set())
    assert 0 < distance(mixed, plain) < 0.02
    assert distance(gradients(layer, x * 1.05, autocast()), plain) > 0.02


def one_step(folder: Path, glassllm_dir: Path, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The stock transformers.Trainer, one step on glassllm: the model and its gradients before the optimizer's step."""
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    torch.manual_seed(0)
    wrap_linears(model, QuantConfig(zero_point="integer"), LoraConfig(rank=4), skip_indivisible=True)
    disturb(model)
    seen: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            trained = (pair for pair in model.named_parameters() if pair[1].grad is not None)
            seen.update({name: parameter.grad.clone() for name, parameter in trained})

    ids = torch.randint(0, 1000, (4, 48), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        learning_rate=1e-3, per_device_train_batch_size=4, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, callbacks=[Look()]).train()
    return model, seen


def test_the_stock_trainer_in_bf16(tmp_path: Path, glassllm_dir: Path) -> None:
    """Trainer(bf16=True), alone and with gradient checkpointing: float32's gradients to bfloat16's noise."""
    _, plain = one_step(tmp_path, glassllm_dir)
    _, mixed = one_step(tmp_path, glassllm_dir, bf16=True)
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model, repeated = one_step(tmp_path, glassllm_dir, bf16=True, **again)
    assert 0 < distance(mixed, plain) < 0.1
    assert all(torch.equal(mixed[name], repeated[name]) for name in mixed)
    name, layer = next(iter(l4q_layers(model)))
    assert {tensor.dtype for tensor in trainable_state(model).values()} == {torch.float32}
    with autocast(), torch.no_grad():
        weight = layer(torch.eye(layer.in_features)).T
    assert torch.equal(weight, torch.from_numpy(layer.freeze(name).dequantize()).to(torch.bfloat16))


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_run_with_amp(tmp_path: Path, glassllm_dir: Path, warmup: int) -> None:
    """`--amp bfloat16` learns in other bits than float32, and its checkpoint is the forward it trained with."""
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    changes: dict[str, Any] = {
        "steps": 4,
        "lora_warmup_steps": warmup,
        "lora": LoraConfig(rank=4),
        "evaluation": EvalOptions(text=text, windows=2, window=128),
    }
    options = replace(base_options(glassllm_dir, tmp_path), amp="bfloat16", out=tmp_path / "amp", **changes)
    result = train(options)
    plain = train(replace(options, amp="none", out=tmp_path / "plain"))
    states = final_weights(options.out), final_weights(tmp_path / "plain")
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert result["first_loss"] == pytest.approx(plain["first_loss"], rel=0.01)
    model, _ = load_model(options)
    wrap_model(model, options)
    load_trainable_state(model, states[0])
    checkpoint = L4QCheckpoint.open(result["checkpoint"])
    for name, layer in l4q_layers(model):
        with autocast(), torch.no_grad():
            weight = layer(torch.eye(layer.in_features)).T
        stored = torch.from_numpy(checkpoint.quantized(name).dequantize())
        assert torch.equal(weight, stored.to(torch.bfloat16))
    # Perplexities are taken in float32: the frozen folder has the one reported for the trained model.
    loaded = AutoModelForCausalLM.from_pretrained(result["checkpoint"], dtype=torch.float32)
    windows = evaluation_windows(options.evaluation, loaded, AutoTokenizer.from_pretrained(result["checkpoint"]))
    assert windows_perplexity(loaded, windows).value == pytest.approx(result["perplexity"]["trained"], rel=1e-6)


def test_amp_is_refused_where_it_means_nothing(tmp_path: Path, glassllm_dir: Path) -> None:
    """Unknown dtypes, and autocast over weights that are in bfloat16 already."""
    options = base_options(glassllm_dir, tmp_path)
    with pytest.raises(UsageError, match=r"(?s)amp.*float16"):
        replace(options, amp="float16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"(?s)amp.*dtype bfloat16"):
        replace(options, amp="bfloat16", dtype="bfloat16")
