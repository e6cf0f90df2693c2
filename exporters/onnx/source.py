"""Where the graph of a checkpoint comes from: built by hand, or exported from transformers' model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from exporters.onnx.family import EMBEDDING, FAMILIES, ModelSpec, read_spec
from exporters.onnx.graph import build_model
from exporters.plan import ExportOptions, OnnxGraph
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError

EXPERTS_NOTE = (
    "experts stay dense (3-D tensors, not linear modules) and every token passes through all of them: standard ONNX "
    "cannot skip an expert per token"
)
LONGROPE_NOTE = (
    "rope type longrope: keys cached in a sequence of up to {limit} tokens keep the short rotation, so a caller whose "
    "generation passes {limit} tokens should start again without a cache there, as transformers' generate does"
)
EXPORTED_NOTE = (
    "the graph was exported from transformers' {architecture} by torch.onnx, attention as {attention}: measure it with "
    "l4q-parity before you ship it"
)
ATTENTION_WORDS = {"sdpa": "one Attention operator per layer", "eager": "single products"}


class DecoderSizes(Protocol):
    """What onnxruntime-genai wants to know of a decoder."""

    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def context_length(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """A graph that has not been built yet, and which weights it takes."""

    kind: OnnxGraph
    """"built" or "exported"."""
    sizes: DecoderSizes
    required: frozenset[str]
    """Weights the graph reads; a quantized linear counts under `<module>.weight`."""
    optional: frozenset[str]
    """Biases it adds where the checkpoint has them."""
    linears: frozenset[str]
    """Modules that may hold integers."""
    notes: tuple[str, ...]
    build: Callable[[ExportOptions, Mapping[str, str]], ir.Model]
    """(options, metadata) -> model with lazily read weights."""


def choose_source(checkpoint: L4QCheckpoint, wanted: OnnxGraph) -> GraphSource:
    """The graph to use: the built one where it covers the model, unless the other is asked for.

    Raises:
        UnsupportedError: Neither covers the model, or the one asked for does not.
        UsageError: transformers refuses config.json.
    """
    if wanted == "exported":
        return exported_source(checkpoint)
    try:
        return built_source(checkpoint)
    except UnsupportedError as error:
        if wanted == "built":
            raise
        built_error = error
    try:
        return exported_source(checkpoint)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"neither ONNX graph covers this model: {error.what}",
            where=checkpoint.architecture,
            got=f"{_details(error)}\n  built graph: {built_error.what}; {_details(built_error)}",
            expected=f"one of {sorted(FAMILIES)}, or a decoder that torch.onnx exports",
            remedy="export to gguf or gptq, or add the architecture to exporters/onnx/family.py",
        ) from error


def built_source(checkpoint: L4QCheckpoint) -> GraphSource:
    """The graph of exporters.onnx.graph.

    Raises:
        UnsupportedError: It does not cover the model.
    """
    spec = read_spec(checkpoint.architecture, checkpoint.config)

    def build(options: ExportOptions, metadata: Mapping[str, str]) -> ir.Model:
        half = options.onnx_scales == "float16"
        return build_model(checkpoint, spec, block_size=options.onnx_block_size, half_scales=half, metadata=metadata)

    limits = sorted({rotation.long_from for rotation in spec.rotations.values() if rotation.long_inv_freq is not None})
    notes = [LONGROPE_NOTE.format(limit=limit) for limit in limits]
    if spec.experts is not None:
        notes.append(EXPERTS_NOTE)
    linears = frozenset(spec.linear_names())
    return GraphSource(
        kind="built",
        sizes=spec,
        required=frozenset(expected_names(spec)),
        optional=frozenset(f"{module}.bias" for module in linears),
        linears=linears,
        notes=tuple(notes),
        build=build,
    )


def exported_source(checkpoint: L4QCheckpoint) -> GraphSource:
    """The graph that torch.onnx makes of transformers' model.

    Raises:
        UnsupportedError: transformers, torch.export or torch.onnx cannot do it.
        UsageError: transformers refuses config.json.
        ModuleNotFoundError: onnxscript is not installed.
    """
    from exporters.onnx.rewrite import build_traced, linear_names, stored_names
    from exporters.onnx.trace import trace_decoder

    traced = trace_decoder(checkpoint.architecture, checkpoint.config)
    own_names = stored_names(checkpoint, traced)

    def build(options: ExportOptions, metadata: Mapping[str, str]) -> ir.Model:
        half = options.onnx_scales == "float16"
        return build_traced(checkpoint, traced, block_size=options.onnx_block_size, half_scales=half, metadata=metadata)

    words = ATTENTION_WORDS[traced.attention]
    return GraphSource(
        kind="exported",
        sizes=traced,
        required=frozenset(own_names.values()),
        optional=frozenset(),
        linears=frozenset(own_names[f"{module}.weight"].removesuffix(".weight") for module in linear_names(traced)),
        notes=(EXPORTED_NOTE.format(architecture=checkpoint.architecture, attention=words),),
        build=build,
    )


def expected_names(spec: ModelSpec) -> Iterator[str]:
    """Names of the weights the built graph reads; a quantized linear counts under `<module>.weight`."""
    yield f"{EMBEDDING}.weight"
    for module in (*spec.norm_names(), *spec.linear_names()):
        yield f"{module}.weight"
    yield from spec.expert_names()


def _details(error: UnsupportedError) -> str:
    """An error's own lines after the first, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines()[1:])
