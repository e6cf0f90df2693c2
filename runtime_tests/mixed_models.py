"""Tiny untied llamas with modules on several grids, some dense and the head quantized, wrapped as training does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.model import save_l4q, wrap_linears
from l4q.rules import Override
from runtime_tests.conftest import disturb
from runtime_tests.random_models import build_model
from runtime_tests.tiny_llama import SIZES


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One model."""

    quant: QuantConfig
    overrides: Sequence[str]
    skip: Sequence[str] = ()
    quantize_head: bool = True
    formats: Sequence[str] = ()
    """What vLLM serves it from; the rows of these formats must be equal."""


MIXES: Mapping[str, Mix] = {
    "groups": Mix(
        quant=QuantConfig(group_size=64),
        overrides=(
            "*.down_proj:bits=3,group_size=128",
            "*.layers.1.*.[qkv]_proj:group_size=-1",
            "*.layers.1.*.k_proj:bits=2",  # never reached: the rule above matches first
            "*.layers.0.mlp.up_proj:bits=3",
            "lm_head:group_size=32",
        ),
        skip=("*.layers.0.*.[qkv]_proj",),
        formats=("gptq", "compressed-tensors"),
    ),
    "zero-points": Mix(
        quant=QuantConfig(group_size=32, zero_point="integer"),
        overrides=("*.layers.0.*.k_proj:zero_point=none", "*.layers.1.mlp.down_proj:bits=3", "lm_head:zero_point=none"),
        skip=("*.layers.1.*.o_proj", "*.layers.1.*.[qkv]_proj"),
        formats=("awq", "compressed-tensors"),
    ),
}
MIXED_SIZES = {**SIZES, "tie_word_embeddings": False}


def wrap_mix(mix: Mix, **changes: Any) -> Any:
    """The wrapped and disturbed model."""
    model = build_model("llama", {**MIXED_SIZES, **changes})
    wrap_linears(
        model,
        mix.quant,
        LoraConfig(rank=4),
        overrides=tuple(map(Override.parse, mix.overrides)),
        skip=mix.skip,
        quantize_head=mix.quantize_head,
    )
    disturb(model)
    return model


def mixed_checkpoint(mix: Mix, folder: Path, **changes: Any) -> L4QCheckpoint:
    """The model, frozen."""
    save_l4q(wrap_mix(mix, **changes), folder, quant=mix.quant)
    return L4QCheckpoint.open(folder)
