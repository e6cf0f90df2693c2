"""`LogprobComparison`: how far a runtime's next-token distributions are from the oracle's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from l4q.errors import VerificationError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ParityStats:
    """Figures over all scored tokens; logarithms are natural."""

    tokens: int
    """Scored tokens: every window's first token is context only."""
    oracle_perplexity: float
    perplexity: float
    delta_percent: float
    """(perplexity / oracle_perplexity - 1) * 100."""
    mean_abs_dlogprob: float
    """Mean |log p_runtime - log p_oracle| of the text's own tokens."""
    max_abs_dlogprob: float
    kl: float
    """Mean KL(oracle || runtime) over the full vocabulary, in nats."""
    top1: float
    """Share of positions where both put the same token first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTrace:
    """What both sides answered for every scored token, [tokens] each, in the order of the windows."""

    oracle: F32
    """log p of the text's own token."""
    runtime: F32
    oracle_top: I64
    """The token each put first."""
    runtime_top: I64


class LogprobComparison:
    """Accumulates windows in float64; add every window, then read `stats`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._oracle_nll = self._nll = self._abs = self._kl = 0.0
        self._max = 0.0
        self._same = 0
        self._traces: list[tuple[F32, F32, I64, I64]] = []

    def add(self, token_ids: list[int], oracle: F32, runtime: F32) -> None:
        """Compare one window.

        Args:
            token_ids: The window, length n.
            oracle: [n, vocab], row t = log p( . | token_ids[: t + 1]) of the reference.
            runtime: The runtime's, same shape; extra vocabulary padding at the end is not allowed.

        Raises:
            VerificationError: Shapes differ, or the runtime's answers contain NaN.
        """
        if oracle.shape != runtime.shape or len(oracle) != len(token_ids):
            raise VerificationError(
                "log-probabilities have the wrong shape",
                got=list(runtime.shape),
                expected=f"{[len(token_ids), oracle.shape[1]]}, as the oracle",
            )
        targets = np.asarray(token_ids[1:], dtype=np.int64)
        rows = np.arange(len(targets))
        expected, got = oracle[:-1], runtime[:-1]
        wanted = expected[rows, targets].astype(np.float64)
        reached = got[rows, targets].astype(np.float64)
        if np.isnan(reached).any():
            raise VerificationError(
                "the runtime answered NaN", got=f"{int(np.isnan(reached).sum())} of {len(reached)} log-probabilities"
            )
        difference = np.abs(reached - wanted)
        self._tokens += len(targets)
        self._oracle_nll -= wanted.sum()
        self._nll -= reached.sum()
        self._abs += difference.sum()
        self._max = max(self._max, float(difference.max(initial=0.0)))
        tops = expected.argmax(-1), got.argmax(-1)
        self._same += int((tops[0] == tops[1]).sum())
        self._traces.append((wanted.astype(np.float32), reached.astype(np.float32), *tops))
        self._kl += _kl_divergence(expected, got)

    @property
    def stats(self) -> ParityStats:
        """The figures so far.

        Raises:
            VerificationError: No token was compared.
        """
        if not self._tokens:
            raise VerificationError("nothing was compared", expected="at least one window of two tokens")
        oracle = _exp(self._oracle_nll / self._tokens)
        reached = _exp(self._nll / self._tokens)
        return ParityStats(
            tokens=self._tokens,
            oracle_perplexity=oracle,
            perplexity=reached,
            delta_percent=(reached / oracle - 1) * 100,
            mean_abs_dlogprob=float(self._abs / self._tokens),
            max_abs_dlogprob=self._max,
            kl=self._kl / self._tokens,
            top1=self._same / self._tokens,
        )

    @property
    def trace(self) -> TokenTrace:
        """Every scored token so far.

        Raises:
            VerificationError: No token was compared.
        """
        _ = self.stats
        oracle, runtime, oracle_top, runtime_top = (np.concatenate(parts) for parts in zip(*self._traces, strict=True))
        return TokenTrace(oracle=oracle, runtime=runtime, oracle_top=oracle_top, runtime_top=runtime_top)


def _kl_divergence(expected: F32, got: F32) -> float:
    """Sum over rows of KL(expected || got), 128 rows at a time to bound memory."""
    total = 0.0
    for start in range(0, len(expected), 128):
        block = np.asarray(expected[start : start + 128], dtype=np.float64)
        # A runtime that rounds a probability to zero answers -inf; -1e4 nats keeps the sum finite and unmistakable.
        other = np.maximum(np.asarray(got[start : start + 128], dtype=np.float64), -1e4)
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(block), 0.0, np.exp(block) * (block - other))
        total += float(terms.sum())
    return total


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
