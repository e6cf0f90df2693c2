"""Configs that need no completion give the graph what transformers' own classes and embeddings give it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, MistralConfig

from exporters.onnx import family
from exporters.onnx.family import Rotation, read_spec
from exporters.onnx.stated import stated_config
from runtime_tests.onnx_models import CASES, make_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LlamaConfig(**SIZES, rms_norm_eps=1e-5).to_dict()),
    "head_dim 80": ("LlamaForCausalLM", LlamaConfig(**SIZES, head_dim=80, tie_word_embeddings=True).to_dict()),
    "theta 1e6": (
        "LlamaForCausalLM",
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).to_dict(),
    ),
    "mistral": ("MistralForCausalLM", MistralConfig(**SIZES, sliding_window=128).to_dict()),
    "no window": ("MistralForCausalLM", MistralConfig(**SIZES, sliding_window=None).to_dict()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_stated_values_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of the specification, the frequencies bit for bit."""
    architecture, config = CONFIGS[name]
    assert stated_config(architecture, config) is not None
    stated = read_spec(architecture, config)
    monkeypatch.setattr(family, "stated_config", lambda architecture, config: None)
    asked = read_spec(architecture, config)
    for field in fields(stated):
        if field.name != "rotations":
            assert getattr(stated, field.name) == getattr(asked, field.name), field.name
    assert set(stated.rotations) == set(asked.rotations)
    for kind, rotation in stated.rotations.items():
        assert same_rotation(rotation, asked.rotations[kind])
    theta = config["rope_parameters"]["rope_theta"]
    other = read_spec(architecture, {**config, "rope_parameters": {"rope_type": "linear", "rope_theta": theta * 1.001}
                                     | {"factor": 1.0}})  # fmt: skip
    assert not same_rotation(next(iter(stated.rotations.values())), next(iter(other.rotations.values())))


def same_rotation(one: Rotation, other: Rotation) -> bool:
    """Whether two rotations have the same bits."""
    return (one.scaling, one.long_inv_freq) == (other.scaling, None) and np.array_equal(
        one.inv_freq.view(np.int32), other.inv_freq.view(np.int32)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": None},
        {"hidden_size": "wide"},
        {"num_hidden_layers": True},
        {"vocab_size": 0},
        {"rms_norm_eps": None},
        {"tie_word_embeddings": 1},
        {"model_type": "nonesuch"},
        {"rope_theta": 1e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_what_is_not_plain_is_left_to_transformers(change: dict[str, Any]) -> None:
    """An entry its classes change, complete or refuse."""
    architecture, config = CONFIGS["llama"]
    assert stated_config(architecture, {**config, **change}) is None


@pytest.mark.parametrize("name", ["hidden_size", "head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_act"])
def test_what_is_not_stated_is_left_to_transformers(name: str) -> None:
    """Its classes have the value, for most models another one than for this."""
    architecture, config = CONFIGS["llama"]
    assert stated_config(architecture, {key: value for key, value in config.items() if key != name}) is None


def test_other_architectures_are_left_to_transformers() -> None:
    """Qwen2's class, for one, decides by another entry whether the window counts."""
    assert stated_config("Qwen2ForCausalLM", {**CONFIGS["llama"][1], "model_type": "qwen2"}) is None
    architecture, config = CONFIGS["mistral"]
    assert stated_config(architecture, {key: config[key] for key in config if key != "sliding_window"}) is None


def test_an_export_of_such_a_model_imports_no_transformers(tmp_path: Any) -> None:
    """The reason for all this: its classes take longer to import than a small model takes to export."""
    code = (
        "import atexit, sys; from exporters.cli import main\n"
        "atexit.register(lambda: print('imported' if 'transformers' in sys.modules else 'left out'))\n"
        "main()"
    )
    for case, imports in (("none-tied", "left out"), ("integer-untied-llama3", "imported")):
        folder = tmp_path / case
        make_checkpoint(CASES[case], folder / "checkpoint")
        arguments = [str(folder / "checkpoint"), "--to", "onnx", "--out", str(folder / "out"), "--no-verify"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == imports, (case, done.stdout)
