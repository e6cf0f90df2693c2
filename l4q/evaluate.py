"""Perplexity of a causal language model on non-overlapping windows of real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4q.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(mean negative log-likelihood) with what it was measured on."""

    nll: float
    """Summed negative log-likelihood in nats, accumulated in float64."""
    tokens: int
    """Predicted tokens: window - 1 per window."""

    @property
    def value(self) -> float:
        """The perplexity; inf if the model's answers are not finite."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int, count: int) -> list[list[int]]:
    """`count` consecutive windows of `window` token ids from the middle of a text, without special tokens.

    The middle avoids titles and licence notes that open and close a text.

    Raises:
        UsageError: The text has fewer than `window * count` tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    needed = window * count
    if window < 2 or count < 1 or len(ids) < needed:
        raise UsageError(
            "the evaluation text does not hold the windows asked for",
            got=f"{len(ids)} tokens",
            expected=f"{count} x {window} = {needed} tokens, windows of at least 2",
            remedy="use a longer text, or fewer or shorter windows",
        )
    start = (len(ids) - needed) // 2
    return [ids[at : at + window] for at in range(start, start + needed, window)]


def perplexity(model: Any, token_ids: Sequence[int], window: int, *, batch_size: int = 1) -> Perplexity:
    """Perplexity over the whole windows of `token_ids`; a shorter rest at the end is left out.

    Args:
        model: A transformers causal language model, called as ``model(input_ids=...).logits``.
        token_ids: One long sequence.
        window: Tokens per window; the first of each is context only.
        batch_size: Windows per forward pass.

    Raises:
        UsageError: `token_ids` is shorter than one window.
    """
    if window < 2 or len(token_ids) < window:
        raise UsageError(
            "too few tokens for one evaluation window", got=len(token_ids), expected=f"at least {max(window, 2)}"
        )
    last = len(token_ids) - window
    windows = [token_ids[start : start + window] for start in range(0, last + 1, window)]
    return windows_perplexity(model, windows, batch_size=batch_size)


def windows_perplexity(
    model: Any,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    on_windows: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity over windows of equal length, each read on its own; the model's train/eval mode is restored.

    Args:
        model: A transformers causal language model.
        windows: Token ids, [count, window].
        batch_size: Windows per forward pass.
        on_windows: Called with the number of windows done after every forward pass.

    Raises:
        UsageError: No window, or windows of different lengths.
    """
    import torch

    lengths = {len(window) for window in windows}
    if len(lengths) != 1 or min(lengths) < 2:
        raise UsageError("evaluation windows must have one length", got=sorted(lengths), expected="one length >= 2")
    device = next(model.parameters()).device
    was_training = bool(model.training)
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(windows), batch_size):
                ids = torch.tensor(
                    windows[start : start + batch_size], dtype=torch.long, device=device
                )  # [batch, window]
                total += _sum_nll(model(input_ids=ids, use_cache=False).logits, ids)
                count += ids.shape[0] * (ids.shape[1] - 1)
                if on_windows is not None:
                    on_windows(ids.shape[0])
    finally:
        model.train(was_training)
    return Perplexity(nll=total, tokens=count)


def _sum_nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    from torch.nn.functional import cross_entropy

    # [batch, window, vocab] -> [batch * (window - 1), vocab]; per-token losses in float32, summed in float64
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    return float(losses.double().sum().item())
