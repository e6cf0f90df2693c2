"""Random weights on a grid and random models in L4Q checkpoints: one source for every test's tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.config import QuantConfig
from l4q.k_grids import SUPERBLOCK
from l4q.weight import QuantizedWeight

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
"""Last parts of the names of a block's linears, over all families."""


def random_weight(
    shape: tuple[int, ...],
    quant: QuantConfig,
    seed: int,
    *,
    group_size: int | None = None,
    scales: tuple[float, float] = (0.005, 0.015),
    mins: tuple[float, float] = (-0.1, 0.1),
    scale_mask: int = 0xFFFF,
) -> QuantizedWeight:
    """Codes and zero-points over their whole range.

    Args:
        shape: [out_features, in_features].
        quant: The grid; as everywhere, a layer whose rows a K grid does not fill gets `QuantConfig.for_layer`'s.
        seed: Of everything random here.
        group_size: Columns per group, in place of the grid's.
        scales: Range they are drawn from.
        mins: The same for float zero-points.
        scale_mask: Bits kept of each fp16 scale.
    """
    quant = quant.for_layer(shape[1])
    if quant.k_grid is not None:
        return random_k_weight(shape, quant, seed, scales=scales, lowest=mins[0])
    rng = np.random.default_rng(seed)
    columns = group_size or quant.resolve_group_size(shape[1])
    grouped = (shape[0], shape[1] // columns)
    integer, free = quant.zero_point == "integer", quant.zero_point == "float"
    zeros = rng.integers(1, quant.max_code + 1, grouped, dtype=np.uint8) if integer else None
    offsets = rng.uniform(*mins, grouped).astype(np.float16) if free else None
    codes = rng.integers(0, quant.max_code + 1, shape, dtype=np.uint8)
    drawn = rng.uniform(*scales, grouped).astype(np.float16)
    return QuantizedWeight(
        codes=codes,
        scales=(drawn.view(np.uint16) & np.uint16(scale_mask)).view(np.float16),
        zeros=zeros,
        mins=offsets,
        bits=quant.bits,
        group_size=columns,
    )


def random_k_weight(
    shape: tuple[int, ...], quant: QuantConfig, seed: int, *, scales: tuple[float, float], lowest: float
) -> QuantizedWeight:
    """Codes and integer scales and mins over their whole range on a K grid.

    Args:
        shape: [out_features, in_features].
        quant: The grid.
        seed: Of everything random here.
        scales: Range of the superblocks' largest scales.
        lowest: The least of the mins.
    """
    grid = quant.k_grid
    assert grid is not None
    rng = np.random.default_rng(seed)
    shared, grouped = (shape[0], shape[1] // SUPERBLOCK), (shape[0], shape[1] // grid.group_size)
    free = quant.zero_point == "float"
    return QuantizedWeight(
        codes=rng.integers(0, quant.max_code + 1, shape, dtype=np.uint8),
        scales=(rng.uniform(*scales, shared) / grid.top).astype(np.float16),
        sub_scales=rng.integers(1, grid.top + 1, grouped, dtype=np.uint8),
        mins=(rng.uniform(lowest, 0, shared) / grid.top).astype(np.float16) if free else None,
        sub_mins=rng.integers(0, grid.top + 1, grouped, dtype=np.uint8) if free else None,
        bits=quant.bits,
        group_size=grid.group_size,
    )


def build_model(model_type: str, config: Mapping[str, Any]) -> Any:
    """A transformers causal model in float32 from config values, equal for equal values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), attn_implementation="eager")
    model.config.architectures = [type(model).__name__]  # as a model loaded from a folder has it
    return model.float().eval()


def disturb_vectors(model: torch.nn.Module) -> None:
    """Move norms and biases away from all ones and all zeros, which would hide a wrong order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def save_random(
    model: Any,
    folder: Path,
    quant: QuantConfig,
    weight: Callable[[tuple[int, ...], int], QuantizedWeight],
    *,
    dense_linears: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    side_files: Iterable[Path] = (),
) -> L4QCheckpoint:
    """Save a model with random weights in place of its blocks' linears.

    Args:
        model: A transformers model.
        folder: Checkpoint to write, replacing what is there.
        quant: The grid.
        weight: `weight(shape, index)` of the index-th linear.
        dense_linears: Endings of linears that keep their own values.
        dtype: Of dense tensors; None keeps theirs.
        side_files: Copied beside.
    """
    tied = bool(model.config.tie_word_embeddings)
    skipped = tuple(dense_linears) or ("-",)
    weights: list[tuple[str, QuantizedWeight]] = []
    dense: list[tuple[str, torch.Tensor]] = []
    for name, tensor in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module.endswith(LINEARS) and not module.endswith(skipped):
            weights.append((module, weight(tuple(tensor.shape), len(weights))))
        elif not (name == "lm_head.weight" and tied):
            dense.append((name, tensor.to(dtype or tensor.dtype)))
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    save_checkpoint(
        folder, config=config, weights=weights, dense=dense, quant=quant, side_files=side_files, overwrite=True
    )
    return L4QCheckpoint.open(folder)


def dequantized_model(checkpoint: L4QCheckpoint, replaced: Mapping[str, QuantizedWeight] | None = None) -> Any:
    """Transformers' model in float32 on the dequantized weights, some of them replaced: the oracle."""
    model = build_model(checkpoint.config["model_type"], checkpoint.config)
    state = {name: checkpoint.dense(name).float() for name in checkpoint.dense_names}
    for module in checkpoint.modules:
        weight = (replaced or {}).get(module) or checkpoint.quantized(module)
        state[f"{module}.weight"] = torch.from_numpy(weight.dequantize())
    lacking = model.load_state_dict(state, strict=False)
    assert not lacking.unexpected_keys
    assert set(lacking.missing_keys) == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def model_logprobs(model: Any, token_ids: list[int]) -> np.ndarray:
    """Float64 [tokens, vocab]: row t is log p( . | token_ids[:t + 1])."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()
