"""Follow a transformers decoder's own forward with torch.export and translate it to ONNX, weights left out.

For architectures that exporters.onnx.graph does not build. The result has the built graph's inputs and outputs:
input_ids, attention_mask and one key and value per layer of past; logits and the grown past. No weight takes memory:
the model is hollow (exporters.onnx.hollow), and its weights are inputs of the graph afterwards, so that the optimizer
folds none of them. Standard operators, opset 23.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from exporters.onnx.family import parse_config
from exporters.onnx.graph import BATCH, LENGTH, OPSET, PAST, TOTAL
from exporters.onnx.hollow import cache_shapes, check_class, check_rope, context_length, hollow_decoder, refusal
from l4q.errors import UnsupportedError

EXAMPLE_BATCH, EXAMPLE_LENGTH, EXAMPLE_PAST = 2, 3, 5
"""Sizes the forward is followed with: all different and above 1, which torch.export would take for constants."""

INPUTS = ("input_ids", "attention_mask")
PREFIX = "decoder."


@dataclass(frozen=True, kw_only=True)
class TracedDecoder:
    """A graph whose weights are inputs, and the sizes its users need."""

    model: bytes
    """Serialized ModelProto; inputs are `INPUTS`, the past, then the weights under their names in the checkpoint."""
    weights: tuple[str, ...]
    """Names of the weight inputs."""
    tied: Mapping[str, tuple[str, ...]]
    """Weights the model uses under several names, by one of them."""
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    heads: int
    vocab_size: int
    context_length: int
    attention: str
    """"sdpa" became the Attention operator, "eager" single products."""


def trace_decoder(architecture: str, config: Mapping[str, Any]) -> TracedDecoder:
    """Trace the model that transformers builds from a config.json; equal configs are traced once per process.

    Raises:
        UsageError: transformers refuses the config.
        UnsupportedError: transformers, torch.export or torch.onnx cannot do it; the message gives their reason.
        ModuleNotFoundError: onnxscript, which torch.onnx translates with, is not installed.
    """
    import_module("onnxscript")
    return _trace(architecture, json.dumps(dict(config), sort_keys=True))


class _Wrapper(nn.Module):
    """The decoder with a flat list of past keys and values, positions counted from the mask."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        extra = {}
        if self.takes_positions:
            counted = attention_mask.cumsum(-1) - 1
            extra["position_ids"] = counted.clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
        )
        grown = [part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)]
        return (output.logits, *grown)


@lru_cache(maxsize=2)
def _trace(architecture: str, config_json: str) -> TracedDecoder:
    config = parse_config(json.loads(config_json))
    check_rope(config)
    try:
        with _quiet():
            decoder = hollow_decoder(config)
            check_class(decoder, architecture)
            shapes = cache_shapes(decoder)
            model = _translate(_Wrapper(decoder).eval(), shapes)
            heads, hidden_size = int(config.num_attention_heads), int(config.hidden_size)
    except (UnsupportedError, ModuleNotFoundError):
        raise
    except Exception as error:  # whatever a model's forward, torch.export or torch.onnx may raise
        reason = str(error).strip().splitlines() or [""]
        raise refusal(architecture, f"{type(error).__name__}: {reason[0]}") from error
    _check_dynamic(model, architecture)
    names: dict[int, list[str]] = {}
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.graph.name, model.producer_name, model.producer_version = "decoder", "l4q", None
    return TracedDecoder(
        model=ir.to_proto(model).SerializeToString(deterministic=True),
        weights=tuple(str(value.name) for value in model.graph.inputs[len(INPUTS) + 2 * len(shapes) :]),
        tied={group[0]: tuple(group) for group in names.values() if len(group) > 1},
        layers=len(shapes),
        kv_heads=shapes[0][0],
        head_dim=shapes[0][1],
        hidden_size=hidden_size,
        heads=heads,
        vocab_size=config.vocab_size,
        context_length=context_length(config, architecture),
        attention=decoder.config._attn_implementation,
    )


def _translate(wrapper: nn.Module, shapes: list[tuple[int, int]]) -> ir.Model:
    """Run torch.export and torch.onnx, move weights to the inputs, optimize, give inputs and outputs our names."""
    past = [torch.zeros(EXAMPLE_BATCH, heads, EXAMPLE_PAST, size) for heads, size in shapes for _ in range(2)]
    ids = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.long)
    mask = torch.ones(EXAMPLE_BATCH, EXAMPLE_PAST + EXAMPLE_LENGTH, dtype=torch.long)
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            wrapper,
            (ids, mask, past),
            dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, [{0: dynamic, 2: dynamic}] * len(past)),
            strict=False,
        )
        translated: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    graph = translated.model.graph
    stored = set(program.graph_signature.parameters)
    stored |= set(program.graph_signature.buffers) - set(program.graph_signature.non_persistent_buffers)
    for name in sorted(stored & set(graph.initializers)):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    translated.optimize()
    model: ir.Model = translated.model
    _name(model.graph, len(shapes))
    return model


def _name(graph: ir.Graph, layers: int) -> None:
    """Our names for inputs and outputs; torch's stack traces, with the paths of the machine, removed."""
    flows = [f"{{}}.{index}.{part}" for index in range(layers) for part in ("key", "value")]
    inputs = [*INPUTS, *(flow.format("past_key_values") for flow in flows)]
    for value, name in zip(graph.inputs, inputs, strict=False):
        value.name = name
    for value in graph.inputs[len(inputs) :]:
        value.name = str(value.name).removeprefix(PREFIX)
    for value, name in zip(graph.outputs, ["logits", *(flow.format("present") for flow in flows)], strict=True):
        value.name = name
    graph.metadata_props.clear()
    graph.doc_string = None
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None


def _check_dynamic(model: ir.Model, architecture: str) -> None:
    """Free sizes must have stayed free; then they get one name each."""
    graph = model.graph
    caches = [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    presents = list(graph.outputs)[1:]
    free = [(graph.inputs[0], {0: BATCH, 1: LENGTH}), (graph.inputs[1], {0: BATCH, 1: TOTAL})]
    free += [(value, {0: BATCH, 2: PAST}) for value in caches] + [(value, {0: BATCH, 2: TOTAL}) for value in presents]
    free.append((graph.outputs[0], {0: BATCH, 1: LENGTH}))
    for value, names in free:
        shape = list(value.shape or ())
        fixed = [axis for axis in names if axis >= len(shape) or isinstance(shape[axis], int)]
        if fixed:
            raise refusal(architecture, f"{value.name} has a fixed size on axis {fixed[0]}: {value.shape}")
        value.shape = ir.Shape([names.get(axis, size) for axis, size in enumerate(shape)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's tracing remarks from the user: they speak to torch's developers, and an error is raised anyhow."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
