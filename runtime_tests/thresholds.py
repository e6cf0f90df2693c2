"""What each runtime may differ from the oracle by, with the reason beside every number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime_tests.compare import ParityStats


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound on one figure of `ParityStats`."""

    figure: str
    bound: float
    reason: str
    at_least: bool = False
    """True if the figure must not fall below the bound; otherwise its magnitude must stay below it."""

    def check(self, stats: ParityStats) -> CheckResult:
        """Apply the bound."""
        value = float(getattr(stats, self.figure))
        # NaN compares false both ways, so it fails either form.
        passed = value >= self.bound if self.at_least else abs(value) < self.bound
        return CheckResult(limit=self, value=value, passed=passed)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """A bound and what was found."""

    limit: Limit
    value: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        sign = ">=" if self.limit.at_least else "<"
        return {
            "figure": self.limit.figure,
            "value": self.value,
            "allowed": f"{sign} {self.limit.bound:g}",
            "passed": self.passed,
            "reason": self.limit.reason,
        }


_FP16 = "vLLM computes in fp16: the unquantized model shows the same noise (mean 0.0045 on SmolLM2)"
_INT8 = "the block kernels round activations to int8, so identical weights still differ by 0.1-1 % perplexity"

# GPTQ, AWQ and compressed-tensors feed the same kernels: equal integers give equal numbers, so one row of bounds.
_VLLM = (
    Limit(figure="mean_abs_dlogprob", bound=0.01, reason=_FP16),
    Limit(figure="delta_percent", bound=0.3, reason=_FP16),
)

# (format, variant) -> bounds. The variant is the block type for GGUF and the accuracy level for ONNX.
LIMITS: dict[tuple[str, str], tuple[Limit, ...]] = {
    ("l4q", ""): (
        Limit(figure="mean_abs_dlogprob", bound=1e-4, reason="the same float32 weights in the same library"),
    ),
    ("gptq", ""): _VLLM,
    ("awq", ""): _VLLM,
    ("compressed-tensors", ""): _VLLM,
    ("gguf", "F32"): (
        Limit(
            figure="mean_abs_dlogprob",
            bound=1e-4,
            reason="float32 weights, float32 KV cache and no flash attention leave only summation order",
        ),
    ),
    ("gguf", "quantized"): (
        Limit(figure="delta_percent", bound=2.0, reason=_INT8),
        Limit(figure="kl", bound=0.02, reason=_INT8),
    ),
    ("onnx", "0"): (
        Limit(figure="delta_percent", bound=0.05, reason="accuracy level 0 computes in float32"),
        Limit(figure="top1", bound=0.999, reason="float32 leaves only exact ties to flip", at_least=True),
        Limit(figure="mean_abs_dlogprob", bound=0.002, reason="accuracy level 0 computes in float32"),
    ),
    ("onnx", "4"): (
        Limit(figure="delta_percent", bound=2.0, reason=_INT8),
        Limit(figure="kl", bound=0.02, reason=_INT8),
    ),
}


def limits_for(format_name: str, variant: str) -> tuple[Limit, ...]:
    """The bounds of a (format, variant); GGUF block types share one row, ONNX levels 0-3 are all float32."""
    if format_name == "gguf" and variant != "F32":
        variant = "quantized"
    if format_name == "onnx" and variant != "4":
        variant = "0"
    return LIMITS.get((format_name, variant), LIMITS.get((format_name, ""), ()))
