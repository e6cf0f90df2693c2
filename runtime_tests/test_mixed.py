"""Per-module grids, modules left dense and the output head, from the command line to a loaded checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.checkpoint import L4QCheckpoint
from l4q.cli_train import command, parse_options
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, wrap_linears
from l4q.module_grids import module_grids
from l4q.refreeze import FreezeOptions, refreeze
from l4q.rules import Override, grid_of
from l4q.train import train
from l4q.train_options import OptimOptions, TrainOptions
from runtime_tests.mixed_models import MIXED_SIZES, MIXES, mixed_checkpoint, wrap_mix
from runtime_tests.random_models import build_model, dequantized_model, model_logprobs
from runtime_tests.train_runs import base_options, final_weights, rewind, same_bits, same_checkpoints

TOKENS = list(range(5, 40))


def test_the_first_matching_override_holds_and_names_only_what_it_changes() -> None:
    """Fields an override leaves out keep the common value; the scale grid follows another kind of zero-point."""
    base = QuantConfig(group_size=128)
    rules = [Override.parse(text) for text in ("*.1.*.q_proj:bits=3", "q_proj:zero_point=integer", "*:group_size=-1")]
    assert grid_of("layers.1.attn.q_proj", base, rules) == replace(base, bits=3)
    assert grid_of("layers.2.attn.q_proj", base, rules) == QuantConfig(group_size=128, zero_point="integer")
    assert grid_of("layers.2.attn.q_proj", base, rules).scale_grid == "fp16_s7"
    assert grid_of("lm_head", base, rules) == replace(base, group_size=-1)
    assert grid_of("lm_head", base, rules[:2]) == base
    assert [Override.parse(rule.describe()) for rule in rules] == rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=3", "cannot be read"),
        ("*.q_proj:", "cannot be read"),
        ("*.q_proj:bits", "a whole number"),
        ("*.q_proj:bits=three", "a whole number"),
        ("*.q_proj:bits=3,bits=4", "at most once"),
        ("*.q_proj:width=3", "'bits', 'group_size', 'zero_point', 'scale_grid'"),
        ("*.q_proj:bits=5", "bits has an unsupported value"),
        ("*.q_proj:group_size=48", "multiple of 32"),
        ("*.q_proj:zero_point=free", "zero_point has an unsupported value"),
        ("*.q_proj:scale_grid=", "scale_grid has an unsupported value"),
    ],
)
def test_overrides_that_say_nothing_are_refused(text: str, message: str) -> None:
    """A typing error stops before any model is loaded."""
    with pytest.raises(UsageError, match=message):
        Override.parse(text)


def test_command_line_fills_the_options(glassllm_dir: Path, tmp_path: Path) -> None:
    """The three options reach TrainOptions, survive its JSON form, and are explained by --help."""
    data = glassllm_dir / "config.json"
    words = [str(glassllm_dir), "--data", str(data), "--out", str(tmp_path), "--quantize-head", "--skip", "*.o_proj"]
    words += ["--override", "*.down_proj:bits=3,group_size=-1", "--override", "q_proj:zero_point=integer"]
    values = command.make_context("train", words).params
    values.pop("as_json")
    options = parse_options(values)
    assert options.overrides == (
        Override(pattern="*.down_proj", bits=3, group_size=-1),
        Override(pattern="q_proj", zero_point="integer"),
    )
    assert (options.skip, options.quantize_head) == (("*.o_proj",), True)
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    text = CliRunner().invoke(command, ["--help"]).output
    assert all(option in text for option in ("--override", "--skip", "--quantize-head"))


def test_an_init_that_an_override_cannot_start_from_is_refused(glassllm_dir: Path, tmp_path: Path) -> None:
    """asymm needs offsets on every grid, not only on the common one."""
    base = base_options(glassllm_dir, tmp_path)
    rule = Override(pattern="*.q_proj", zero_point="none")
    with pytest.raises(UsageError, match="zero_point none has none"):
        replace(base, init="asymm", overrides=(rule,))


def wrapped(**options: Any) -> nn.Module:
    """A tiny untied llama wrapped with these options."""
    model: nn.Module = build_model("llama", MIXED_SIZES)
    wrap_linears(model, QuantConfig(), LoraConfig(rank=4), **options)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": (Override(pattern="*.qproj", bits=3),)}, r"matches no layer(?s:.)*override(?s:.)*q_proj"),
        ({"overrides": (Override(pattern="lm_head", bits=3),)}, "matches no layer"),
        ({"skip": ("*.oproj",)}, r"matches no layer(?s:.)*skip"),
        ({"skip": ("*.o_proj",), "overrides": (Override(pattern="*.o_proj", bits=3),)}, "matches no layer"),
        ({"skip": ("*",)}, "no linear layer is left"),
        ({"overrides": (Override(pattern="q_proj", group_size=96),)}, r"q_proj, (?s:.)*group_size 96, in_features"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    """A pattern without a match, a model without targets and an indivisible override are errors, not silence."""
    with pytest.raises(UsageError, match=message):
        wrapped(**options)


def test_a_tied_head_is_refused_and_nothing_is_changed() -> None:
    """Quantizing the embedding matrix is not what --quantize-head means; the model stays as it was."""
    model = build_model("llama", {**MIXED_SIZES, "tie_word_embeddings": True})
    with pytest.raises(UnsupportedError, match=r"the output head is the embedding matrix (?s:.*)-embeddings q8_0"):
        wrap_linears(model, QuantConfig(), LoraConfig(rank=4), quantize_head=True)
    assert not any(isinstance(module, L4QLinear) for module in model.modules())
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", MIXES)
def test_frozen_modules_equal_the_training_forward(name: str, tmp_path: Path) -> None:
    """Every module is frozen on its own grid, bit for bit as the forward used it; skipped ones are dense."""
    mix = MIXES[name]
    layers = dict(l4q_layers(wrap_mix(mix)))
    checkpoint = mixed_checkpoint(mix, tmp_path / "c")
    assert set(layers) == set(checkpoint.modules)
    assert "lm_head" in layers
    assert len({layer.quant for layer in layers.values()}) > 2
    for module, layer in layers.items():
        assert checkpoint.info(module).grid == (layer.quant.bits, layer.quant.group_size, layer.quant.zero_point)
        values = checkpoint.quantized(module).dequantize()
        assert np.array_equal(values.view(np.uint32), layer.quantized_weight().numpy().view(np.uint32)), module
    skipped = set(checkpoint.config["quantization_config"]["modules_to_not_convert"])
    assert {f"{module}.weight" for module in skipped} <= set(checkpoint.dense_names)
    assert all(grid_of(module, mix.quant, [Override.parse(text) for text in mix.overrides]) for module in skipped)


@pytest.mark.parametrize("name", MIXES)
def test_transformers_loads_every_grid(name: str, tmp_path: Path) -> None:
    """from_pretrained gives the dequantized model's numbers, also after save_pretrained; other codes do not."""
    checkpoint = mixed_checkpoint(MIXES[name], tmp_path / "c")
    expected = model_logprobs(dequantized_model(checkpoint), TOKENS)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    assert type(loaded.lm_head).__name__ == "PackedLinear"
    assert np.abs(model_logprobs(loaded, TOKENS) - expected).max() < 1e-4
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert np.array_equal(model_logprobs(again, TOKENS), model_logprobs(loaded, TOKENS))
    again.lm_head.codes.data[3] ^= 1
    assert np.abs(model_logprobs(again, TOKENS) - expected).max() > 1e-3


def _lower_bits(modules: dict[str, Any]) -> None:
    modules["lm_head"]["bits"] = 2


def _add_unknown(modules: dict[str, Any]) -> None:
    modules["model.layers.9.mlp.up_proj"] = dict(modules["lm_head"])


def _spoil(modules: dict[str, Any]) -> None:
    modules["lm_head"] = {"bits": 4}


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other bits": (_lower_bits, "disagree on its grid"),
    "unknown module": (_add_unknown, "no such module"),
    "entry removed": (lambda modules: modules.clear(), "disagree on its grid"),
    "half an entry": (_spoil, "lacks required fields"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_config_that_contradicts_the_records_is_refused(lie: str, tmp_path: Path) -> None:
    """config.json, which transformers reads, and the shards' records, which exporters read, must agree."""
    change, message = LIES[lie]
    path = mixed_checkpoint(MIXES["groups"], tmp_path / "c").path / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["modules"])
    path.write_text(json.dumps(config))
    with pytest.raises(L4QError, match=message):
        L4QCheckpoint.open(path.parent)


@pytest.mark.parametrize("entry", [[], {"lm_head": 3}])
def test_a_damaged_list_of_grids_is_refused(entry: object) -> None:
    """Anything but a grid per module name is an error of the file, not of l4q."""
    with pytest.raises(UsageError, match="grids of single modules cannot be read"):
        module_grids({"modules": entry})


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A finished run on glassllm with a head of its own: four grids, a dense layer and a quantized head."""
    folder = tmp_path_factory.mktemp("mixed")
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder / "untied")
    AutoTokenizer.from_pretrained(glassllm_dir).save_pretrained(folder / "untied")
    rules = ("*.layers.1.*.q_proj:group_size=32", "*.o_proj:bits=3,zero_point=none", "lm_head:bits=3")
    made = replace(
        base_options(glassllm_dir, folder),
        model=str(folder / "untied"),
        overrides=tuple(map(Override.parse, rules)),
        skip=("*.layers.2.*.up_proj",),
        quantize_head=True,
        optim=OptimOptions(offset_lr=0.1),
        steps=4,
        save_every=2,
    )
    train(made)
    return made


def test_training_resumes_on_the_same_rules_only(base: TrainOptions, tmp_path: Path) -> None:
    """A resumed run ends bit-equal; with another rule it is refused."""
    resumed = rewind(base.out, tmp_path / "resumed", 2)
    with pytest.raises(UsageError, match="can only be resumed with the options"):
        train(replace(base, out=resumed, resume=True, overrides=base.overrides[1:]))
    with pytest.raises(UsageError, match="can only be resumed with the options"):
        train(replace(base, out=resumed, resume=True, skip=()))
    train(replace(base, out=resumed, resume=True))
    assert same_bits(final_weights(base.out), final_weights(resumed))
    assert same_checkpoints(base.out, resumed)


def test_trained_checkpoint_holds_the_rules(base: TrainOptions) -> None:
    """The frozen run has the grids asked for; its head and its neighbours were trained."""
    checkpoint = L4QCheckpoint.open(base.out / "checkpoint")
    grids = {module: checkpoint.info(module).grid for module in checkpoint.modules}
    assert grids["lm_head"] == (3, 64, "integer")
    assert grids["model.layers.1.self_attn.q_proj"] == (4, 32, "integer")
    assert grids["model.layers.0.self_attn.q_proj"] == (4, 64, "integer")
    assert grids["model.layers.0.self_attn.o_proj"] == (3, 64, "none")
    assert "model.layers.2.mlp.up_proj" not in grids
    state = final_weights(base.out)
    assert state["lm_head.lora_B"].abs().max() > 0


def test_freezing_again_keeps_each_modules_bits(base: TrainOptions, tmp_path: Path) -> None:
    """Another kind of zero-point goes onto every module, with its own bits and group size; none asked changes none."""
    refreeze(FreezeOptions(run=base.out, out=tmp_path / "same"))
    copied = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert copied == (base.out / "checkpoint" / "model.safetensors").read_bytes()
    result = refreeze(FreezeOptions(run=base.out, out=tmp_path / "none", zero_point="none"))
    before, after = (L4QCheckpoint.open(folder) for folder in (base.out / "checkpoint", tmp_path / "none"))
    assert {after.info(module).grid for module in after.modules} == {(4, 64, "none"), (4, 32, "none"), (3, 64, "none")}
    unchanged = "model.layers.0.self_attn.o_proj"  # was symmetric already
    assert np.array_equal(after.quantized(unchanged).codes, before.quantized(unchanged).codes)
    losses = {loss["name"]: loss["change"] for loss in result["weight_loss"]}
    assert losses[unchanged] == 0.0 < losses["lm_head"]


def test_split_siblings_are_announced_before_training(
    base: TrainOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log counts the layers per grid, and warns of q, k, v and gate, up that no vLLM format can hold so."""
    with caplog.at_level(logging.INFO, logger="l4q"):
        train(replace(base, out=tmp_path, steps=1))
    assert "1 layers: bits 3, group_size 64, zero_point integer, scale_grid fp16_s7" in caplog.messages
    warned = [record.getMessage() for record in caplog.records if "vLLM fuses" in record.getMessage()]
    assert [line.split(" ")[0] for line in warned] == [
        "model.layers.2.mlp.gate_up_proj",
        "model.layers.1.self_attn.qkv_proj",
    ]
