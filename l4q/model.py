"""Whole models: wrap the linears for training, freeze them, save the result as an L4Q checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from l4q.checkpoint import dense_unit, save_checkpoint, weight_unit
from l4q.config import BaseStorage, GridLearning, Init, KernelChoice, LoraConfig, QuantConfig
from l4q.distributed import gathered_units, is_main, is_sharded, is_sharded_tensor, own_rows, whole
from l4q.errors import UsageError
from l4q.files import find_side_files
from l4q.init import Start
from l4q.k_grids import FALLBACK_BITS, FALLBACK_GROUP, SUPERBLOCK
from l4q.linear import L4QLinear
from l4q.packed_weight import PackedWeight
from l4q.rules import Override
from l4q.shard_layout import Unit
from l4q.starts.adopt import adopt, reproduces
from l4q.starts.start import PretrainedStart
from l4q.targets import Targets, choose_targets, indivisible
from l4q.weight import QuantizedWeight

TRAINABLE = ("lora_A", "lora_B", "scales", "offsets")


@dataclass(frozen=True, kw_only=True)
class WrapReport:
    """What `wrap_linears` did."""

    wrapped: tuple[str, ...]
    """Modules that are quantized now."""
    dense: tuple[str, ...]
    """Linear modules left as they were, the output head among them unless it was asked for."""
    reproduced: tuple[str, ...] = ()
    """Wrapped modules that multiply with a pre-quantized start's own weights, each of them equal."""
    notes: tuple[tuple[str, str], ...] = ()
    """(module, why not) of the other modules of a pre-quantized start; they are initialised like any weight."""
    fallback: tuple[str, ...] = ()
    """Wrapped modules whose rows do not fill the K grid's superblocks; they are on `QuantConfig.for_layer`'s grid."""

    def describe_start(self) -> list[str]:
        """What is not plain to see: layers off the K grid, and how a pre-quantized start was taken over."""
        lines = []
        if self.fallback:
            lines.append(
                f"{len(self.fallback)} of {len(self.wrapped)} layers, for example {self.fallback[0]}, are on the fp16 "
                f"grid at {FALLBACK_BITS} bits in groups of {FALLBACK_GROUP}, as their in_features are no multiple of "
                f"{SUPERBLOCK}"
            )
        if self.reproduced:
            lines.append(f"{len(self.reproduced)} layers start with the model's own integers, bit for bit")
        for reason, count in Counter(reason for _, reason in self.notes).items():
            example = next(name for name, why in self.notes if why == reason)
            lines.append(f"{count} layers start anew, for example {example}: {reason}")
        return lines


def wrap_linears(
    model: nn.Module,
    quant: QuantConfig,
    lora: LoraConfig,
    *,
    init: Init = "l4q",
    learning: GridLearning | None = None,
    skip_indivisible: bool = False,
    start: PretrainedStart | None = None,
    storage: BaseStorage = "dense",
    moments: Mapping[str, torch.Tensor] | None = None,
    found: Mapping[str, Start] | None = None,
    overrides: Sequence[Override] = (),
    skip: Sequence[str] = (),
    quantize_head: bool = False,
    kernels: KernelChoice = "auto",
) -> WrapReport:
    """Replace every targeted nn.Linear by an `L4QLinear` in place and freeze everything else.

    Args:
        model: A causal language model; its output embeddings are touched only by `quantize_head`.
        quant: The grid; on a K grid, layers whose rows it does not fill take `QuantConfig.for_layer`'s.
        lora: Rank, scaling and the patterns of target modules.
        init: How scales and offsets start, see `l4q.init`.
        learning: What of the grid trains; everything by default.
        skip_indivisible: Leave layers dense whose in_features the group size does not divide, instead of stopping; on
            a K grid those whose rows its superblocks do not fill, instead of giving them another grid.
        start: The pre-quantized source of the model; where its grid fits, its own scales and zero-points are taken.
        storage: How the frozen weights are kept, see `l4q.base`.
        moments: Of each layer's inputs, from `l4q.calibrate.input_moments`, for init "calibrated".
        found: s and b of layers that need no initialisation, from `l4q.reconstruct`.
        overrides: Other grids for some modules; the first that matches a module holds.
        skip: Patterns of modules that stay dense, whatever the other options say.
        quantize_head: Quantize the output head too, which the target patterns do not reach.
        kernels: How the layers compute, see `l4q.kernels`; "auto" is the fastest that reproduces torch on the device.

    Raises:
        UsageError: A pattern matches nothing, nothing is left to wrap, the group size does not divide a layer, a K grid
            fits no layer, or the storage cannot hold a weight.
        UnsupportedError: The head is to be quantized, and it is the embedding matrix or no linear layer.
    """
    chosen = choose_targets(model, quant, lora.target_modules, overrides=overrides, skip=skip, head=quantize_head)
    wrapped, fallback = fitting(chosen, lora, skip_indivisible=skip_indivisible)
    linears = chosen.linears
    model.requires_grad_(False)
    dense = tuple(name for name in linears if name not in set(wrapped))
    reproduced, notes = [], []
    for name in wrapped:
        settings: dict[str, Any] = {"init": init, "learning": learning, "kernels": kernels}
        linear, grid = linears.pop(name), chosen.grids[name]  # popped, so that a weight that is packed is freed at once
        own = adopt(name, cast(nn.Parameter, linear.weight), grid, start, storage)
        qparams = own.qparams or (found or {}).get(name)
        settings.update(base=own.base, qparams=qparams, moments=(moments or {}).get(name))
        if learning is not None and qparams is None:  # a layer outside the blocks, which has nothing to move with
            settings["learning"] = replace(learning, move_base=False)
        layer = L4QLinear.from_linear(linear, grid, lora, **settings)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
        if own.qparams is not None and reproduces(layer, own.grid):
            reproduced.append(name)
        elif start is not None:
            notes.append((name, own.note or f"base storage {storage} moves weights across rounding boundaries"))
    return WrapReport(
        wrapped=tuple(wrapped), dense=dense, reproduced=tuple(reproduced), notes=tuple(notes), fallback=fallback
    )


def fitting(chosen: Targets, lora: LoraConfig, *, skip_indivisible: bool) -> tuple[list[str], tuple[str, ...]]:
    """The targets to wrap, and those of them that are on a K grid's fallback; see `wrap_linears`."""
    odd, fallback = chosen.indivisible(), chosen.fallback
    if odd and not skip_indivisible:
        raise indivisible(odd, chosen)
    if skip_indivisible:
        odd, fallback = [*odd, *fallback], ()
    wrapped = [name for name in chosen.grids if name not in set(odd)]
    if not wrapped:
        raise UsageError(
            "no linear layer is left to quantize", got=lora.target_modules, expected=list(chosen.linears)[:8]
        )
    return wrapped, fallback


def l4q_layers(model: nn.Module) -> Iterator[tuple[str, L4QLinear]]:
    """The wrapped layers with their dotted names, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, L4QLinear):
            yield name, module


def trained_grid(model: nn.Module) -> QuantConfig:
    """The common grid to record: a K grid if a layer is on one, else that of most; other layers have records."""
    grids = [layer.quant for _, layer in l4q_layers(model)]
    return next((grid for grid in grids if grid.k_grid is not None), Counter(grids).most_common(1)[0][0])


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Let the wrapped layers multiply with W0 + scaling * B A itself; before training, that is the base model."""
    layers = [layer for _, layer in l4q_layers(model) if layer.quantizing]
    for layer in layers:
        layer.quantizing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.quantizing = True


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A, B, s and b of every wrapped layer by full parameter name: all that training changes."""
    return {f"{name}.{part}": getattr(layer, part).detach() for name, layer in l4q_layers(model) for part in TRAINABLE}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a state made by `trainable_state` into a model wrapped the same way.

    Raises:
        UsageError: Names or shapes differ.
    """
    current = trainable_state(model)
    if set(current) != set(state):
        odd = sorted(set(current) ^ set(state))
        raise UsageError("the saved state belongs to another model or other target modules", got=odd[:5])
    for name, tensor in current.items():
        value = state[name]
        if tensor.shape != value.shape:
            raise UsageError(
                "a saved tensor has another shape",
                where=name,
                got=list(value.shape),
                expected=list(tensor.shape),
                remedy="resume with the same --rank, --group-size and model",
            )
        own = own_rows(tensor)
        own.tensor.copy_(value[own.start : own.start + own.tensor.shape[0]])


def freeze_model(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Freeze layer after layer, one in memory at a time; of a sharded model, one block is gathered at a time."""
    for name, weight in freeze_packed(model):
        yield name, weight.unpack()


def freeze_packed(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """As `freeze_model`, the integers packed as they are stored."""
    for members in gathered_units(model):
        for name, layer in members:
            if isinstance(layer, L4QLinear):
                yield name, layer.freeze_packed(name)


def save_l4q(
    model: Any,
    out: str | Path,
    *,
    quant: QuantConfig,
    side_files_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a wrapped transformers model as an L4Q checkpoint folder.

    In a distributed run every process calls it, as a sharded model is gathered on all of them; process 0 writes.

    Args:
        model: A PreTrainedModel after `wrap_linears`.
        out: Folder to create.
        quant: The grid it was wrapped with, overrides aside: those are recorded module by module.
        side_files_from: Folder whose tokenizer, template and licence files are copied.
        overwrite: Replace an existing folder.

    Raises:
        UsageError: The folder exists, or training left non-finite scales.
    """
    layers = dict(l4q_layers(model))
    inside = tuple(f"{name}." for name in layers)
    dense_modules = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config["architectures"] = config.get("architectures") or [type(model).__name__]  # from_config leaves it empty
    weights = freeze_packed(model)
    stored = [(name, tensor) for name, tensor in _dense_tensors(model, layers) if not _is_part(name, inside)]
    dense = ((name, whole(tensor)) for name, tensor in stored)
    if not is_main():
        _follow(model, weights, dense)
        return
    save_checkpoint(
        out,
        config=config,
        weights=weights,
        dense=dense,
        quant=quant,
        grids={name: layer.quant for name, layer in layers.items()},
        modules_to_not_convert=dense_modules,
        side_files=find_side_files(Path(side_files_from)) if side_files_from else (),
        overwrite=overwrite,
        units=None if is_sharded(model) else _units(layers, stored),  # sharded layers come as they are gathered
    )


def _units(layers: Mapping[str, L4QLinear], dense: Sequence[tuple[str, torch.Tensor]]) -> list[Unit]:
    """What the files will hold, in the order in which it is frozen."""
    units = [weight_unit(name, layer.info(), layer.quant) for name, layer in layers.items()]
    return units + [dense_unit(name, tensor) for name, tensor in dense]


def _dense_tensors(model: nn.Module, layers: Mapping[str, L4QLinear]) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent tensors that are not part of a wrapped layer, plus those layers' biases; tied tensors once."""
    named = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - named
    seen: set[object] = set()
    for name, tensor in model.state_dict().items():
        # A process that keeps no row of a sharded tensor has no address to compare: such tensors go by name.
        key = name if is_sharded_tensor(tensor) else tensor.data_ptr()
        if key not in seen and name not in tied:
            seen.add(key)
            yield name, tensor


def _follow(model: nn.Module, *tensors: Iterator[Any]) -> None:
    """Take part in the gathering of a sharded model without keeping anything."""
    if is_sharded(model):
        for _ in chain(*tensors):
            pass


def _is_part(name: str, layers: tuple[str, ...]) -> bool:
    return name.startswith(layers) and not name.endswith(".bias")
