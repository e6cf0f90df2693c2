"""The MLP of a layer, plain or as a mixture of experts, in standard operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.family import DOWN, EXPERT_STACKS, ROUTER, Experts, ModelSpec
from exporters.onnx.linear import LinearEmitter


@dataclass(frozen=True)
class Mlp:
    """The MLP of one layer: down(activation(gate) * up), summed over the chosen experts if there are any."""

    builder: GraphBuilder
    emitter: LinearEmitter
    spec: ModelSpec
    layer: str
    """Dotted name, model.layers.N."""

    def emit(self, x: ir.Value) -> ir.Value:
        """Map x [batch, length, hidden] to the same shape."""
        if self.spec.experts is not None:
            return self._mixture(x, self.spec.experts)
        gate, up = self.emitter.fused(x, [f"{self.layer}.{name}" for name in self.spec.family.gate_up], None)
        return self.emitter.linear(self._gated(gate, up), f"{self.layer}.{DOWN}")

    def _mixture(self, x: ir.Value, experts: Experts) -> ir.Value:
        """All experts on all tokens, weighted by the router, 0 for those not chosen.

        Standard ONNX cannot skip an expert per token, so this costs experts / chosen times the arithmetic.
        """
        op, scope = self.builder.op, f"{self.layer}.mlp"
        flat = op("Reshape", x, self.builder.integers(-1, self.spec.hidden_size), scope=scope)  # [tokens, hidden]
        weights = self._router_weights(flat, experts)  # [experts, tokens, 1]
        gate_up, down = (self._turned(f"{self.layer}.{name}") for name in EXPERT_STACKS)  # [experts, in, out]
        joined = op("MatMul", flat, gate_up, scope=scope)
        gate, up = self.builder.split(joined, 2, scope=scope)  # [experts, tokens, intermediate]
        outer = op("MatMul", self._gated(gate, up), down, scope=scope)
        weighted = op("Mul", outer, weights, scope=scope)  # [experts, tokens, hidden]
        summed = op("ReduceSum", weighted, self.builder.integers(0), scope=scope, keepdims=0)
        return op("Reshape", summed, op("Shape", x, scope=scope), scope=scope)

    def _turned(self, name: str) -> ir.Value:
        return self.builder.op("Transpose", self.emitter.dense(name), scope=name, perm=[0, 2, 1])

    def _router_weights(self, flat: ir.Value, experts: Experts) -> ir.Value:
        """Softmax of the router, kept for the chosen experts only: float32 [experts, tokens, 1]."""
        op, scope = self.builder.op, f"{self.layer}.{ROUTER}"
        scores = self.emitter.dense_product(flat, self.emitter.dense(f"{scope}.weight"), scope=scope)
        shares = op("Softmax", scores, scope=scope, axis=-1)  # [tokens, experts]
        top, chosen = ir.Value(name=f"{scope}/top"), ir.Value(name=f"{scope}/chosen")
        self.builder.node("TopK", [shares, self.builder.integers(experts.chosen)], [top, chosen], {"axis": -1})
        if experts.renormalized:
            top = op("Div", top, op("ReduceSum", top, self.builder.integers(-1), scope=scope), scope=scope)
        none = op("Sub", shares, shares, scope=scope)
        weights = op("ScatterElements", none, chosen, top, scope=scope, axis=-1)  # [tokens, experts]
        turned = op("Transpose", weights, scope=scope, perm=[1, 0])
        return op("Unsqueeze", turned, self.builder.integers(2), scope=scope)

    def _gated(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        scope = f"{self.layer}.mlp"
        activated = _EMITTERS[self.spec.activation](self.builder, gate, scope)
        return self.builder.op("Mul", activated, up, scope=scope)


def _silu(builder: GraphBuilder, x: ir.Value, scope: str) -> ir.Value:
    return builder.op("Mul", x, builder.op("Sigmoid", x, scope=scope), scope=scope)


def _gelu_tanh(builder: GraphBuilder, x: ir.Value, scope: str) -> ir.Value:
    return builder.op("Gelu", x, scope=scope, approximate="tanh")


_EMITTERS: Mapping[str, Callable[[GraphBuilder, ir.Value, str], ir.Value]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu_pytorch_tanh": _gelu_tanh,
}
