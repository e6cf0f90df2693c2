"""The calibrated start: it measures the inputs right, finds smaller weighted errors, and a better model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.calibrate import input_moments, search_grid
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.evaluate import text_windows, windows_perplexity
from l4q.init import Start, init_qparams
from l4q.model import l4q_layers, wrap_linears
from l4q.quant import grid_params, snap_scales
from l4q.train import train
from l4q.train_options import EvalOptions, TrainOptions

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def windows(glassllm_dir: Path) -> list[list[int]]:
    """Sixteen windows of real text; the first eight calibrate, the rest measure."""
    text = (glassllm_dir.parent / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    return text_windows(AutoTokenizer.from_pretrained(glassllm_dir), text, 128, 16)


@pytest.fixture
def model(glassllm_dir: Path) -> Any:
    """A fresh copy of the real small model."""
    return AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32).eval()


def weighted_error(weight: torch.Tensor, start: Start, quant: QuantConfig, moments: torch.Tensor) -> np.ndarray:
    """Σ E[x²] (W_q − W)² per group in float64, from the grid the forward uses; written without the code under test."""
    params = grid_params(start.scales, start.offsets, quant)
    w = weight.double().numpy().reshape(*start.scales.shape, -1)
    s, m = params.scales.double().numpy()[..., None], params.mins.double().numpy()[..., None]
    codes = np.clip(np.round((w - m) / s), 0, quant.max_code)
    error = (codes * s + m - w) ** 2 * moments.double().numpy().reshape(1, start.scales.shape[1], -1)
    return np.asarray(error.sum(-1))


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_other_start_has_a_smaller_weighted_error(kind: Any, bits: int) -> None:
    """Group by group the searched grid is at least as good as every other start, and clearly better on average."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(32, 128, generator=generator) * 0.03 + 0.005
    moments = torch.rand(128, generator=generator) ** 4
    quant = QuantConfig(bits=bits, group_size=32, zero_point=kind)
    found = search_grid(weight, quant, moments)
    assert torch.equal(found.scales, snap_scales(found.scales, quant.scale_grid or "fp16"))
    ours = weighted_error(weight, found, quant, moments)
    for other in ("l4q", "lsq+", "symm", "asymm"):
        if (other, kind) == ("asymm", "none"):
            continue
        theirs = weighted_error(weight, init_qparams(weight, quant, other), quant, moments)
        assert ours.mean() < 0.9 * theirs.mean(), other
        assert np.mean(ours <= theirs * 1.05) > 0.95, other
    unweighted = weighted_error(weight, search_grid(weight, quant), quant, moments)
    assert ours.mean() < unweighted.mean()  # the twin: without the inputs' sizes the same search does worse


@pytest.mark.parametrize(("grid", "bits", "kind"), [("q4_k", 4, "none"), ("q4_k", 4, "float"), ("q3_k", 3, "none")])
def test_k_grids_start_better_too(grid: Any, bits: int, kind: Any) -> None:
    """Also after the superblocks have rounded the scales that were searched, the weighted error is the smaller one."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(bits)) * 0.03
    moments = torch.rand(512, generator=torch.Generator().manual_seed(0)) ** 4
    quant = QuantConfig(bits=bits, group_size=16 if bits == 3 else 32, zero_point=kind, scale_grid=grid)
    ours = weighted_error(weight, search_grid(weight, quant, moments), quant, moments)
    for other in ("l4q", "asymm") if kind == "float" else ("l4q",):
        theirs = weighted_error(weight, init_qparams(weight, quant, other), quant, moments)
        assert ours.mean() < 0.95 * theirs.mean(), other


def test_moments_are_those_of_the_layers_inputs(model: Any, windows: list[list[int]]) -> None:
    """E[x²] of the first projection is that of the normalized embeddings; of other text it differs."""
    found = input_moments(model, [QUERY], windows[:2])[QUERY]
    ids = torch.tensor(windows[:2]).flatten()
    with torch.no_grad():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    torch.testing.assert_close(found, inputs.square().mean(0), rtol=1e-5, atol=0)
    other = input_moments(model, [QUERY], windows[4:6])[QUERY]
    assert not torch.allclose(found, other, rtol=1e-3)
    assert not model.get_submodule(QUERY)._forward_pre_hooks


def test_a_layer_that_nothing_reaches_is_searched_unweighted(model: Any, windows: list[list[int]]) -> None:
    """No sequence, no moments; wrapping then weighs all columns alike."""
    assert input_moments(model, [QUERY], []) == {}
    weight = model.get_submodule(QUERY).weight.detach().clone()
    quant = QuantConfig(bits=3, group_size=32)
    wrap_linears(model, quant, LoraConfig(target_modules=(QUERY,)), init="calibrated", moments={})
    layer = dict(l4q_layers(model))[QUERY]
    assert torch.equal(layer.scales, search_grid(weight, quant).scales)


def test_the_layers_outputs_change_less(model: Any, windows: list[list[int]]) -> None:
    """On text it has not seen, a layer's output moves less from the weighted grid than from the unweighted one."""
    quant = QuantConfig(bits=3, group_size=32, zero_point="integer")
    names = [name for name, module in model.named_modules() if name.endswith(("q_proj", "o_proj", "up_proj"))]
    moments = input_moments(model, names, windows[:8])
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
    with torch.no_grad():
        model(input_ids=torch.tensor(windows[8:]))

    def moved(weights: dict[str, torch.Tensor] | None) -> float:
        total = 0.0
        for name in names:
            weight = model.get_submodule(name).weight.detach()
            found = search_grid(weight, quant, None if weights is None else weights[name])
            params = grid_params(found.scales, found.offsets, quant)
            codes = ((weight.view(*found.scales.shape, -1) - params.mins[..., None]) / params.scales[..., None]).round()
            quantized = codes.clamp(0, quant.max_code) * params.scales[..., None] + params.mins[..., None]
            change = quantized.view_as(weight) - weight
            total += float((inputs[name] @ change.T).square().mean() / (inputs[name] @ weight.T).square().mean())
        return total

    weighted = moved(moments)
    assert weighted < moved(None)
    assert weighted < moved({name: 1 / value for name, value in moments.items()})  # the twin: weights upside down


def test_the_model_starts_better(model: Any, windows: list[list[int]], glassllm_dir: Path) -> None:
    """At 2 bits, where rounding hurts this model, calibrated starts well below l4q."""
    quant = QuantConfig(bits=2, group_size=32, zero_point="integer")
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    moments = input_moments(model, names, windows[:8])
    plain = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32).eval()
    wrap_linears(plain, quant, LoraConfig(), skip_indivisible=True)
    wrap_linears(model, quant, LoraConfig(), init="calibrated", moments=moments, skip_indivisible=True)
    assert windows_perplexity(model, windows[8:]).value < 0.9 * windows_perplexity(plain, windows[8:]).value


def test_a_run_calibrates_on_its_data(glassllm_dir: Path, tmp_path: Path) -> None:
    """l4q-train with the calibrated start, a LoRA warm-up included, begins lower than with l4q's and freezes."""
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    data = tmp_path / "data.txt"
    data.write_text((glassllm_dir.parent / "text" / "train.txt").read_text(encoding="utf-8")[:40000], encoding="utf-8")
    started = {}
    for init in ("l4q", "calibrated"):
        made: Any = TrainOptions(
            model=str(glassllm_dir),
            data=(data,),
            out=tmp_path / init,
            quant=QuantConfig(bits=2, group_size=32, zero_point="integer"),
            evaluation=EvalOptions(text=text, window=128, windows=4),
            init=init,
            calibration=8,
            lora_warmup_steps=1,
            leave_dense=True,
            steps=2,
            max_length=128,
        )
        started[init] = train(made)["perplexity"]
    assert started["calibrated"]["start"] < started["l4q"]["start"]
    assert started["calibrated"]["trained"] != started["l4q"]["trained"]  # also after the warm-up


def test_calibrating_is_refused_where_it_cannot_be(glassllm_dir: Path, tmp_path: Path) -> None:
    """FSDP holds no whole model; no sequences are none to look at."""
    common: dict[str, Any] = {"model": str(glassllm_dir), "data": (tmp_path,), "out": tmp_path, "init": "calibrated"}
    with pytest.raises(UsageError, match="whole model in every process"):
        TrainOptions(**common, fsdp=True)
    with pytest.raises(UsageError, match="calibration"):
        TrainOptions(**common, calibration=0)
