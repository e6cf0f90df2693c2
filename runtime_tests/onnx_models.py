"""Tiny random models and their L4Q checkpoints for the ONNX tests, with torch as the judge of the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import exporters.onnx as onnx_exporter
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.weight import QuantizedWeight
from runtime_tests import random_models
from runtime_tests.random_models import build_model, dequantized_model, disturb_vectors, save_random

# Uneven on purpose: 6 query heads on 2 key heads, head_dim 32 beside hidden / heads = 16, a vocabulary of 77.
TINY: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 77,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture on one grid."""

    model_type: str = "llama"
    changes: Mapping[str, Any]
    quant: QuantConfig


CASES = {
    "none-tied": Case(
        changes={"tie_word_embeddings": True}, quant=QuantConfig(bits=4, group_size=32, zero_point="none")
    ),
    "integer-untied-llama3": Case(
        changes={"rope_parameters": LLAMA3_ROPE}, quant=QuantConfig(bits=4, group_size=32, zero_point="integer")
    ),
    "float-linear": Case(
        changes={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        quant=QuantConfig(bits=4, group_size=32, zero_point="float"),
    ),
    "integer-3bit-row": Case(
        changes={"intermediate_size": 83}, quant=QuantConfig(bits=3, group_size=-1, zero_point="integer")
    ),
    "float-row": Case(changes={"intermediate_size": 83}, quant=QuantConfig(bits=4, group_size=-1, zero_point="float")),
    "llama-biases": Case(
        changes={"attention_bias": True, "mlp_bias": True},
        quant=QuantConfig(bits=4, group_size=32, zero_point="none"),
    ),
    "mistral-window": Case(
        model_type="mistral",
        changes={"sliding_window": 5},
        quant=QuantConfig(bits=4, group_size=32, zero_point="none"),
    ),
    "qwen2": Case(model_type="qwen2", changes={}, quant=QuantConfig(bits=4, group_size=32, zero_point="none")),
    "qwen3": Case(model_type="qwen3", changes={}, quant=QuantConfig(bits=4, group_size=32, zero_point="integer")),
}


def random_weight(
    shape: tuple[int, ...], quant: QuantConfig, seed: int, *, group_size: int | None = None
) -> QuantizedWeight:
    """Random codes, scales and zero-points on a grid, values of about 0.2; `group_size` replaces the grid's."""
    return random_models.random_weight(
        shape, quant, seed, group_size=group_size, scales=(0.01, 0.08), mins=(-0.5, -0.1)
    )


def make_checkpoint(case: Case, folder: Path) -> L4QCheckpoint:
    """Save a tiny random model of the case with every layer linear quantized."""
    model = build_model(case.model_type, {**TINY, **case.changes})
    disturb_vectors(model)
    return save_random(model, folder, case.quant, lambda shape, seed: random_weight(shape, case.quant, seed))


def export_onnx(checkpoint: L4QCheckpoint, folder: Path, **options: Any) -> Path:
    """Plan and write an ONNX folder."""
    chosen = ExportOptions(**options)
    folder.mkdir()
    onnx_exporter.write(checkpoint, onnx_exporter.plan(checkpoint, chosen), folder, chosen, lambda name: None)
    return folder


def torch_model(checkpoint: L4QCheckpoint, weights: Mapping[str, QuantizedWeight] | None = None) -> torch.nn.Module:
    """Transformers' model in float32 on the dequantized weights, some of them replaced."""
    model: torch.nn.Module = dequantized_model(checkpoint, weights)
    return model


def torch_logits(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Float32 [batch, length, vocab]."""
    with torch.no_grad():
        attention = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(ids), attention_mask=attention).logits.numpy()


def open_session(folder: Path, level: int | None = 0) -> ort.InferenceSession:
    """A plain ONNX Runtime session at an accuracy level; None leaves ONNX Runtime's own."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run_session(
    session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, cache: list[np.ndarray] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and the grown cache."""
    slots = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    past = cache or [np.zeros((ids.shape[0], s.shape[1], 0, s.shape[3]), dtype=np.float32) for s in slots]
    feeds = {slot.name: array for slot, array in zip(slots, past, strict=True)}
    logits, *grown = session.run(None, {**feeds, "input_ids": ids, "attention_mask": mask})
    return logits, grown


def corrupted(weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """The three ways an export goes wrong: one flipped code bit, one wrong scale, two swapped rows."""
    codes, scales = weight.codes.copy(), weight.scales.copy()
    codes[1, 2] ^= 1 << (weight.bits - 1)
    scales[1, 0] *= 2
    order = np.arange(weight.out_features)
    order[[0, 1]] = order[[1, 0]]
    return {
        "nibble": replace(weight, codes=codes),
        "scale": replace(weight, scales=scales),
        "row swap": replace(weight, codes=weight.codes[order]),
    }


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One checkpoint in all the forms the tests compare."""

    checkpoint: L4QCheckpoint
    folder: Path
    session: ort.InferenceSession
    model: torch.nn.Module

    @classmethod
    def make(cls, checkpoint: L4QCheckpoint, folder: Path) -> Exported:
        """Export with default options into `folder`."""
        export_onnx(checkpoint, folder)
        return cls(checkpoint=checkpoint, folder=folder, session=open_session(folder), model=torch_model(checkpoint))
