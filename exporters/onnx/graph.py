"""The decoder of a llama-like model as a graph of standard ONNX operators, opset 23 (no contrib operator in the file).

    input_ids [batch, length] -> Gather -> layers x (RMSNormalization, q/k/v, RotaryEmbedding, Attention, o,
    RMSNormalization, gate/up/down) -> RMSNormalization -> logits [batch, length, vocab]

Inputs `past_key_values.<i>.key|value` and outputs `present.<i>.key|value` are [batch, kv_heads, length, head_dim]. The
attention mask [batch, past + length] gives positions (its running count), so left-padded batches are right: a runtime's
own grouped-query operator counts from the right and is not. Sizes are dynamic in batch and length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.builder import Attribute, GraphBuilder, tensor_input
from exporters.onnx.family import EMBEDDING, FINAL_NORM, HEAD, ModelSpec, Rotation
from exporters.onnx.linear import LinearEmitter, as_float32
from exporters.onnx.mlp import Mlp
from l4q.checkpoint import L4QCheckpoint

OPSET = 23
IR_VERSION = 11
"""The IR version opset 23 was released with; ONNX Runtime reads both from 1.24 on."""

BATCH, LENGTH, PAST, TOTAL = "batch", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """Values every layer reads."""

    rotations: Mapping[str, tuple[ir.Value, ir.Value]]
    """Cos and sin [batch, length, rotary_dim / 2] by kind of layer."""
    full_mask: ir.Value
    """Bool [batch, 1, length, past + length]; True takes part."""
    sliding_mask: ir.Value | None


def build_model(
    checkpoint: L4QCheckpoint,
    spec: ModelSpec,
    *,
    block_size: int | None,
    half_scales: bool = False,
    metadata: Mapping[str, str],
) -> ir.Model:
    """Build the model with lazily read weights.

    Raises:
        UsageError: `block_size` does not fit a layer's groups.
    """
    builder = GraphBuilder()
    emitter = LinearEmitter(builder, checkpoint, block_size, half_scales=half_scales)
    input_ids = tensor_input("input_ids", ir.DataType.INT64, [BATCH, LENGTH])
    attention_mask = tensor_input("attention_mask", ir.DataType.INT64, [BATCH, TOTAL])
    shared = _shared_inputs(builder, spec, input_ids, attention_mask)

    embedding = emitter.dense(f"{EMBEDDING}.weight")
    hidden = _embedded(builder, spec, embedding, input_ids)
    pasts: list[ir.Value] = []
    presents: list[ir.Value] = []
    for index in range(spec.layers):
        past = _cache_values(spec, f"past_key_values.{index}", PAST)
        present = _cache_values(spec, f"present.{index}", TOTAL)
        hidden = _Layer(builder, emitter, spec, index).emit(hidden, shared, past, present)
        pasts += past
        presents += present
    hidden = _norm(builder, emitter, spec, hidden, FINAL_NORM)
    product = emitter.dense_product(hidden, embedding, scope=HEAD) if spec.tied else emitter.linear(hidden, HEAD)
    logits = tensor_input("logits", ir.DataType.FLOAT, [BATCH, LENGTH, spec.vocab_size])
    builder.node("Identity", [_capped(builder, product, spec.logit_softcap)], [logits], {})

    graph = ir.Graph(
        [input_ids, attention_mask, *pasts],
        [logits, *presents],
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET},
        name="decoder",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="l4q", metadata_props=dict(metadata))


def _cache_values(spec: ModelSpec, prefix: str, length: str) -> list[ir.Value]:
    shape: list[int | str] = [BATCH, spec.kv_heads, length, spec.head_dim]
    return [tensor_input(f"{prefix}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]


def _shared_inputs(
    builder: GraphBuilder, spec: ModelSpec, input_ids: ir.Value, attention_mask: ir.Value
) -> SharedInputs:
    scope = "inputs"
    length = builder.op("Shape", input_ids, scope=scope, start=1, end=2)  # [1]
    total = builder.op("Shape", attention_mask, scope=scope, start=1, end=2)  # [1]
    past = builder.op("Sub", total, length, scope=scope)
    positions = _positions(builder, attention_mask, (past, total))
    rotations = {kind: _rotation(builder, kind, rotation, positions) for kind, rotation in spec.rotations.items()}
    columns, rows = _indices(builder, past, total)
    causal = builder.op("LessOrEqual", columns, rows, scope=scope)  # [length, total]
    own = builder.op("Equal", columns, rows, scope=scope)
    valid = builder.op("Cast", attention_mask, scope=scope, to=int(ir.DataType.BOOL))
    valid = builder.op("Unsqueeze", valid, builder.integers(1, 2), scope=scope)  # [batch, 1, 1, total]
    # A padding row may see itself: a row that sees nothing is undefined in older runtimes, and nothing reads it.
    full = builder.op("And", causal, builder.op("Or", valid, own, scope=scope), scope=scope)
    sliding = None
    if spec.window is not None and any(spec.sliding):
        first = builder.op("Sub", rows, builder.scalar(spec.window), scope=scope)
        sliding = builder.op("And", full, builder.op("Greater", columns, first, scope=scope), scope=scope)
    return SharedInputs(rotations=rotations, full_mask=full, sliding_mask=sliding)


def _indices(builder: GraphBuilder, past: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Column numbers [1, total] of the keys and [length, 1] of the queries."""
    scope = "inputs"
    first, last = (builder.op("Squeeze", value, builder.integers(0), scope=scope) for value in (past, total))
    columns = builder.op("Range", builder.scalar(0), last, builder.scalar(1), scope=scope)
    rows = builder.op("Range", first, last, builder.scalar(1), scope=scope)
    return (
        builder.op("Unsqueeze", columns, builder.integers(0), scope=scope),
        builder.op("Unsqueeze", rows, builder.integers(1), scope=scope),
    )


def _positions(builder: GraphBuilder, attention_mask: ir.Value, span: tuple[ir.Value, ir.Value]) -> ir.Value:
    """Positions of the new tokens, float32 [batch, length, 1]."""
    scope = "rotary"
    counted = builder.op("CumSum", attention_mask, builder.scalar(1), scope=scope)
    positions = builder.op("Sub", counted, builder.scalar(1), scope=scope)
    positions = builder.op("Max", positions, builder.scalar(0), scope=scope)  # padding would be -1
    positions = builder.op("Slice", positions, *span, builder.integers(1), scope=scope)  # [batch, length]
    positions = builder.op("Cast", positions, scope=scope, to=int(ir.DataType.FLOAT))
    return builder.op("Unsqueeze", positions, builder.integers(2), scope=scope)  # [batch, length, 1]


def _rotation(builder: GraphBuilder, kind: str, rotation: Rotation, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cos and sin [batch, length, rotary_dim / 2] of the new tokens.

    Computed from positions rather than looked up: no table whose end limits the context, none to store.
    """
    scope = f"rotary/{kind}"
    inv_freq = builder.constant(f"{scope}/inv_freq", rotation.inv_freq[None, None, :])  # [1, 1, rotary_dim / 2]
    if rotation.long_inv_freq is not None:
        # As in transformers' forward: the longest row of the batch decides, and cached keys keep their rotation.
        last = builder.op("ReduceMax", positions, scope=scope, keepdims=0)
        limit = builder.constant(f"{scope}/long_from", as_float32(rotation.long_from - 0.5))
        long_inv_freq = builder.constant(f"{scope}/long_inv_freq", rotation.long_inv_freq[None, None, :])
        is_long = builder.op("Greater", last, limit, scope=scope)
        inv_freq = builder.op("Where", is_long, long_inv_freq, inv_freq, scope=scope)
    angles = builder.op("Mul", positions, inv_freq, scope=scope)
    cos, sin = (builder.op(name, angles, scope=scope) for name in ("Cos", "Sin"))
    if rotation.scaling == 1.0:
        return cos, sin
    factor = builder.constant(f"{scope}/scaling", as_float32(rotation.scaling))
    return builder.op("Mul", cos, factor, scope=scope), builder.op("Mul", sin, factor, scope=scope)


def _norm(builder: GraphBuilder, emitter: LinearEmitter, spec: ModelSpec, x: ir.Value, module: str) -> ir.Value:
    weight = emitter.dense(f"{module}.weight", plus=1.0 if spec.family.norm_plus_one else 0.0)
    return builder.op("RMSNormalization", x, weight, scope=module, axis=-1, epsilon=spec.eps, stash_type=1)


def _embedded(builder: GraphBuilder, spec: ModelSpec, embedding: ir.Value, input_ids: ir.Value) -> ir.Value:
    hidden = builder.op("Gather", embedding, input_ids, scope=EMBEDDING, axis=0)
    if not spec.family.scaled_embedding:
        return hidden
    factor = builder.constant(f"{EMBEDDING}/scale", as_float32(spec.hidden_size**0.5))
    return builder.op("Mul", hidden, factor, scope=EMBEDDING)


def _capped(builder: GraphBuilder, logits: ir.Value, cap: float | None) -> ir.Value:
    """cap * tanh(logits / cap)."""
    if cap is None:
        return logits
    limit = builder.constant(f"{HEAD}/cap", as_float32(cap))
    bent = builder.op("Tanh", builder.op("Div", logits, limit, scope=HEAD), scope=HEAD)
    return builder.op("Mul", bent, limit, scope=HEAD)


@dataclass(frozen=True)
class _Layer:
    builder: GraphBuilder
    emitter: LinearEmitter
    spec: ModelSpec
    index: int

    def emit(self, hidden: ir.Value, shared: SharedInputs, past: list[ir.Value], present: list[ir.Value]) -> ir.Value:
        name = self.spec.layer(self.index)
        norms = [f"{name}.{norm}" for norm in self.spec.family.layer_norms]
        # Two norms stand before attention and MLP; four stand before and after each of them.
        before, after = (norms[0::2], norms[1::2]) if len(norms) == 4 else (norms, [])
        x = _norm(self.builder, self.emitter, self.spec, hidden, before[0])
        attended = self._attention(x, f"{name}.self_attn", shared, past, present)
        hidden = self._added(hidden, attended, after[:1], f"{name}.self_attn")
        x = _norm(self.builder, self.emitter, self.spec, hidden, before[1])
        change = Mlp(self.builder, self.emitter, self.spec, name).emit(x)
        return self._added(hidden, change, after[1:], f"{name}.mlp")

    def _added(self, hidden: ir.Value, change: ir.Value, norm: list[str], scope: str) -> ir.Value:
        for module in norm:
            change = _norm(self.builder, self.emitter, self.spec, change, module)
        return self.builder.op("Add", hidden, change, scope=scope)

    def _attention(
        self, x: ir.Value, name: str, shared: SharedInputs, past: list[ir.Value], present: list[ir.Value]
    ) -> ir.Value:
        spec = self.spec
        sizes = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        modules = [f"{spec.layer(self.index)}.{module}" for module in spec.family.qkv]
        query, key, value = self.emitter.fused(x, modules, sizes)
        rotation = shared.rotations[spec.kinds[self.index]]
        query = self._rotated(query, f"{name}.q", spec.heads, rotation)
        key = self._rotated(key, f"{name}.k", spec.kv_heads, rotation)
        mask = shared.sliding_mask if spec.sliding[self.index] else shared.full_mask
        output = ir.Value(name=f"{name}/Attention")
        attributes: dict[str, Attribute] = {
            "q_num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.attention_scale,
        }
        if spec.attention_softcap is not None:
            attributes["softcap"] = float(spec.attention_softcap)
        self.builder.node("Attention", [query, key, value, mask, *past], [output, *present], attributes)
        return self.emitter.linear(output, f"{name}.o_proj")

    def _rotated(self, x: ir.Value, prefix: str, heads: int, rotation: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Query or key [batch, length, heads * head_dim], normed per head if the family does so, then rotated."""
        if self.spec.family.qk_norm:
            split = self.builder.integers(0, 0, heads, self.spec.head_dim)
            x = self.builder.op("Reshape", x, split, scope=f"{prefix}_norm")
            x = _norm(self.builder, self.emitter, self.spec, x, f"{prefix}_norm")
            joined = self.builder.integers(0, 0, heads * self.spec.head_dim)
            x = self.builder.op("Reshape", x, joined, scope=f"{prefix}_norm")
        columns = 2 * self.spec.rotations[self.spec.kinds[self.index]].inv_freq.size
        partial = {"rotary_embedding_dim": columns} if columns != self.spec.head_dim else {}
        return self.builder.op("RotaryEmbedding", x, *rotation, scope=f"{prefix}_proj", num_heads=heads, **partial)
