"""The reconstructed start: blocks come nearer to the original's outputs, and training goes on from what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.blocks import decoder_blocks
from l4q.calibrate import input_moments
from l4q.compensate import compensate, spread_errors
from l4q.config import LoraConfig, QuantConfig
from l4q.data import TrainingData
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.evaluate import text_windows
from l4q.found_start import find_start
from l4q.init import Start
from l4q.model import freeze_model, l4q_layers, wrap_linears
from l4q.quant import grid_params
from l4q.reconstruct import BlockReport, ReconstructOptions, reconstruct
from l4q.refreeze import FreezeOptions, refreeze
from l4q.train import train
from l4q.train_options import TrainOptions
from runtime_tests import start_files as files
from runtime_tests.random_models import build_model
from runtime_tests.test_refreeze import same_files
from runtime_tests.tiny_archs import SIZES, TINY_ARCHS
from runtime_tests.train_runs import Options, final_weights, rewind, same_bits, same_checkpoints

GRID = QuantConfig(bits=2, group_size=32, zero_point="integer")
"""At 2 bits rounding hurts even the small model."""


@pytest.fixture(scope="module")
def windows(glassllm_dir: Path, wiki_text: str) -> list[list[int]]:
    """Windows of real text: the first twelve to reconstruct on, the rest to measure with."""
    return text_windows(AutoTokenizer.from_pretrained(glassllm_dir), wiki_text, 128, 20)


@pytest.fixture
def model(glassllm_dir: Path) -> Any:
    """A fresh copy of the real small model."""
    return AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32).eval()


def divisible(model: nn.Module, quant: QuantConfig = GRID) -> dict[str, QuantConfig]:
    """The layers of a model's blocks that the group size divides."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: quant for name, linear in linears.items() if "layers" in name and linear.in_features % 32 == 0}


def correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [32, 64], and inputs [512, 64] whose columns say much of each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) @ torch.diag(torch.linspace(3, 0.05, 64))
    return torch.randn(32, 64, generator=generator), torch.randn(512, 64, generator=generator) @ mix.T


def rounded(weight: torch.Tensor, start: Start, quant: QuantConfig) -> torch.Tensor:
    """Round-to-nearest on a grid, written without the code under test."""
    params = grid_params(start.scales, start.offsets, quant)
    s, m = (part.repeat_interleave(weight.shape[1] // part.shape[1], 1) for part in (params.scales, params.mins))
    return torch.clip(torch.round((weight - m) / s), 0, quant.max_code) * s + m


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_compensated_rounding_loses_less_output(kind: Any) -> None:
    """Round-to-nearest of the compensated weight beats that of the weight itself, on these inputs and no others."""
    weight, x = correlated()
    quant = QuantConfig(bits=3, group_size=32, zero_point=kind)
    found = compensate(weight, x.T @ x, quant)
    other = compensate(weight, torch.flip(x, (1,)).T @ torch.flip(x, (1,)), quant)

    def error(quantized: torch.Tensor) -> float:
        return float(((weight - quantized) @ x.T).square().mean())

    solved = error(rounded(found.weight, found.start, quant))
    assert solved < 0.6 * error(rounded(weight, found.start, quant))
    assert error(rounded(other.weight, other.start, quant)) > 1.5 * solved


def test_errors_do_not_spread_to_independent_columns() -> None:
    """Where columns say nothing of each other, every column is rounded as it was."""
    weight, _ = correlated()
    diagonal = torch.diag(torch.linspace(0.5, 2, 64))
    assert torch.equal(spread_errors(weight, diagonal, 32, lambda *_: torch.round), weight)
    diagonal[3, 7] = diagonal[7, 3] = 0.4
    assert not torch.equal(spread_errors(weight, diagonal, 32, lambda *_: torch.round), weight)


def test_blocks_come_nearer_to_their_originals(model: Any, windows: list[list[int]]) -> None:
    """Every block's error falls, and on unseen text the predictions are nearer than from the calibrated start."""
    reports: list[BlockReport] = []
    plain = AutoModelForCausalLM.from_pretrained(model.config.name_or_path, dtype=torch.float32)
    layers, unseen = divisible(model), torch.tensor(windows[12:])
    with torch.no_grad():
        target = F.log_softmax(model(input_ids=unseen).logits, -1)
    found = reconstruct(model, layers, windows[:12], ReconstructOptions(epochs=4), reports.append)
    assert [report.name for report in reports] == list(decoder_blocks(model, layers))
    assert all(report.after < 0.95 * report.before for report in reports)
    assert found.keys() == layers.keys()
    wrap_linears(model, GRID, LoraConfig(), skip_indivisible=True, found=found)
    moments = input_moments(plain, layers, windows[:12])
    wrap_linears(plain, GRID, LoraConfig(), skip_indivisible=True, init="calibrated", moments=moments)
    with torch.no_grad():
        given = [F.log_softmax(each.eval()(input_ids=unseen).logits, -1) for each in (model, plain)]
    ours, theirs = (float(F.kl_div(each, target, log_target=True, reduction="sum")) for each in given)
    assert ours < 0.8 * theirs


def test_products_in_bfloat16_find_another_start_as_good(model: Any, windows: list[list[int]]) -> None:
    """Under autocast the errors fall about as far, with other bits; weights and grids stay in float32."""
    layers = divisible(model)
    plain = AutoModelForCausalLM.from_pretrained(model.config.name_or_path, dtype=torch.float32)
    full: list[BlockReport] = []
    half: list[BlockReport] = []
    reconstruct(plain, layers, windows[:12], ReconstructOptions(epochs=2), full.append)
    found = reconstruct(model, layers, windows[:12], ReconstructOptions(epochs=2, amp=True), half.append)
    assert [each.after for each in half] == pytest.approx([each.after for each in full], rel=0.1)
    assert all(each.after < 0.95 * each.before for each in half)
    assert {part.dtype for grid in found.values() for part in grid} == {torch.float32}
    assert not any(torch.equal(model.get_submodule(n).weight, plain.get_submodule(n).weight) for n in layers)


def test_the_wrapped_model_is_the_one_that_was_reconstructed(model: Any, windows: list[list[int]]) -> None:
    """At step 0 its codes are those of the weights and grids that were found; with another grid they are not."""
    found = reconstruct(model, divisible(model), windows[:2], ReconstructOptions(epochs=1))
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in found}
    wrap_linears(model, GRID, LoraConfig(), skip_indivisible=True, found=found)
    frozen = dict(freeze_model(model))
    for name, layer in l4q_layers(model):
        expected = rounded(weights[name], found[name], GRID)
        assert torch.equal(torch.from_numpy(frozen[name].dequantize()), expected), name
        layer.scales.data.mul_(1.5)
        assert not torch.equal(layer.quantized_weight(), expected)


def same_weights(one: Any, other: Any) -> bool:
    """Whether two wrapped models freeze to the same weights."""
    pairs = zip(freeze_model(one), freeze_model(other), strict=True)
    return all(np.array_equal(a.dequantize(), b.dequantize()) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_codes_and_zero_points_are_far_from_their_borders(model: Any, windows: list[list[int]], kind: Any) -> None:
    """Settled or not the weights are the same; settled, scales a twentieth larger change no code and no zero-point."""
    quant = replace(GRID, zero_point=kind, scale_grid=None)
    layers = divisible(model, quant)
    found = reconstruct(model, layers, windows[:2], ReconstructOptions(epochs=1, settle=1.0))
    wrap_linears(model, quant, LoraConfig(), skip_indivisible=True, found=found)
    free = AutoModelForCausalLM.from_pretrained(model.config.name_or_path, dtype=torch.float32)
    loose = reconstruct(free, layers, windows[:2], ReconstructOptions(epochs=1, settle=0.0))
    wrap_linears(free, quant, LoraConfig(), skip_indivisible=True, found=loose)
    assert same_weights(model, free)

    def moved(wrapped: Any) -> int:
        before = dict(freeze_model(wrapped))
        for _, layer in l4q_layers(wrapped):
            layer.scales.data.mul_(1.05)
        after = dict(freeze_model(wrapped))
        pairs = [(before[name], after[name]) for name in before]
        zeros = sum(int(np.count_nonzero(one.zeros != other.zeros)) for one, other in pairs) if kind == "integer" else 0
        return zeros + sum(int(np.count_nonzero(one.codes != other.codes)) for one, other in pairs)

    assert moved(model) == 0
    assert moved(free) > 1000


def test_the_model_is_left_as_it_came(model: Any, windows: list[list[int]]) -> None:
    """Only the layers' weights change: no hooks, same modules, same flags; an error in between changes nothing else."""
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    layers = divisible(model)
    reconstruct(model, layers, windows[:2], ReconstructOptions(epochs=1))
    changed = {n.removesuffix(".weight") for n, p in model.named_parameters() if not torch.equal(p, dense[n])}
    assert changed == layers.keys()

    def stop(report: BlockReport) -> None:
        raise L4QError("stop")

    with pytest.raises(L4QError):
        reconstruct(model, layers, windows[:2], ReconstructOptions(epochs=1), stop)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(module._forward_pre_hooks for module in modules.values())


@pytest.mark.parametrize("name", [name for name in TINY_ARCHS if name != "llama-linear"])
def test_every_architectures_blocks_can_be_called(name: str) -> None:
    """Windows, masks, softcaps, experts, biases: each block runs alone as the model runs it, and its error falls."""
    arch = TINY_ARCHS[name]
    model = build_model(arch.model_type, {**SIZES, **arch.changes})
    layers = divisible(model)
    ids = torch.randint(3, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
    reports: list[BlockReport] = []
    reconstruct(model, layers, ids, ReconstructOptions(epochs=4), reports.append)
    assert sum(report.after for report in reports) < 0.95 * sum(report.before for report in reports)


def test_a_model_without_blocks_is_refused() -> None:
    """Nothing to take one after another."""
    with pytest.raises(UnsupportedError, match=r"(?s)no list of blocks.*calibrated"):
        reconstruct(nn.Sequential(nn.Linear(64, 64)), {"0": GRID}, [[1, 2]], ReconstructOptions())


@pytest.fixture
def options(train_options: Options) -> Callable[..., TrainOptions]:
    """Options of a short run with the reconstructed start."""

    def make(**changes: Any) -> TrainOptions:
        settings = {"init": "reconstructed", "quant": GRID, "calibration": 6, "steps": 5, "reconstruct_epochs": 1}
        return train_options(**{**settings, **changes})

    return make


def test_a_run_resumes_bit_equal_and_freezes_again(options: Options, tmp_path: Path) -> None:
    """Killed and resumed it ends with the same bits, on the start it had kept; without that start it is refused."""
    made = options()
    train(made)
    resumed = rewind(made.out, tmp_path / "resumed", 3)
    train(replace(made, out=resumed, resume=True))
    assert same_bits(final_weights(made.out), final_weights(resumed))
    assert same_checkpoints(made.out, resumed)
    refreeze(FreezeOptions(run=made.out, out=tmp_path / "again"))
    assert same_files(tmp_path / "again", made.out / "checkpoint")
    other = options(out=tmp_path / "other", init="calibrated")
    train(other)
    assert not same_bits(final_weights(made.out), final_weights(other.out))
    lost = rewind(made.out, tmp_path / "lost", 3)
    (lost / "start.safetensors").unlink()
    with pytest.raises(UsageError, match=r"(?s)reconstructed start is missing.*--overwrite"):
        train(replace(made, out=lost, resume=True))
    foreign = rewind(made.out, tmp_path / "foreign", 3)
    from safetensors.torch import load_file, save_file

    kept = load_file(foreign / "start.safetensors")
    name = next(name for name in kept if name.endswith("q_proj.weight"))
    save_file({**kept, name: kept[name][:, :32].contiguous()}, foreign / "start.safetensors")
    with pytest.raises(UsageError, match=r"(?s)start is of another model.*q_proj"):
        train(replace(made, out=foreign, resume=True))


def test_a_warm_up_keeps_the_grid(options: Options) -> None:
    """Quantization starts with what was found, on the merged weight."""
    made = options(lora_warmup_steps=2)
    result = train(made)
    assert result["steps"] == 5


def test_what_does_not_fit_together_is_refused(options: Options, tmp_path: Path) -> None:
    """Sharding, a teacher that is gone, and models that have a grid of their own."""
    with pytest.raises(UsageError, match=r"(?s)reconstructed with fsdp.*whole model"):
        options(fsdp=True)
    with pytest.raises(UsageError, match=r"(?s)distill.*with init reconstructed.*replaces W0"):
        options(distill=0.5)
    files.gptq_folder(tmp_path, QuantConfig(bits=4, group_size=32))
    with pytest.raises(UnsupportedError, match=r"(?s)grid of its own.*leave --init out"):
        find_start(
            None,
            options(model=str(tmp_path / "model")),
            TrainingData(examples=[], sha256="", records={}, truncated=0, dropped=0),
        )
    for changes in ({"epochs": 0}, {"lr": 1.0}, {"settle": 1.5}):
        with pytest.raises(UsageError, match="unsupported value"):
            ReconstructOptions(**changes)
