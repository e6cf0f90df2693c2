"""Judge a server's answers by the oracle: torch in float32 on the dequantized checkpoint.

The rule of greedy text. A server must give the oracle's token unless its own is so near that the runtime's noise can
swap them: within twice the noise of the oracle's best, which decides a token when it leads by more. Every token's
logprob, that of the token where they part included, must be the oracle's within the noise; what comes after a parting
answers another text and is not compared. If all ids agree, so must the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4q.errors import UnsupportedError
from runtime_tests.serving.client import Answer, Client, Messages

QUESTIONS = (
    "What is the capital of France?",
    "Say the days of the week.",
    "What is the chemical symbol for water?",
    "What is the currency of the United States?",
)
CANDIDATES = 64
"""Tokens kept per position; one beyond them is far from the best."""
CHATS: tuple[Messages, ...] = tuple([{"role": "user", "content": question}] for question in QUESTIONS)
"""Short chats whose greedy answers even a small model is sure about."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """The oracle's greedy answer to one chat."""

    messages: Messages
    prompt_ids: tuple[int, ...]
    """The chat through transformers' template and tokenizer."""
    token_ids: tuple[int, ...]
    text: str
    candidates: tuple[Mapping[int, float], ...]
    """For each of token_ids: natural log-probabilities of the CANDIDATES best tokens there, best first."""

    @property
    def margins(self) -> list[float]:
        """How far each of token_ids leads the second best, in nats."""
        return [best - second for best, second, *_ in (list(row.values()) for row in self.candidates)]


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """What a server did right and wrong."""

    problems: tuple[str, ...]
    texts: tuple[str, ...]
    tokens_equal: int
    tokens: int
    """Tokens of the oracle's answers; `tokens_equal` of them came from the server, too."""
    worst_dlogprob: float
    """Largest difference of a compared token's logprob, in nats."""

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def expect(checkpoint: Path, max_tokens: int, chats: Sequence[Messages] = CHATS) -> list[Expected]:
    """The oracle's greedy answers to chats of plain messages.

    Raises:
        UnsupportedError: The checkpoint has no chat template.
    """
    from transformers import AutoTokenizer

    from runtime_tests.engines.torch_engine import Engine

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if not tokenizer.chat_template:
        raise UnsupportedError(
            "the checkpoint has no chat template",
            where=checkpoint,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="train from a model with a chat template, or put one into the folder",
        )
    oracle = Engine(str(checkpoint))
    return [_expect_one(oracle, tokenizer, messages, max_tokens) for messages in chats]


def _expect_one(oracle: Any, tokenizer: Any, messages: Messages, max_tokens: int) -> Expected:
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    prompt = [int(token) for token in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    new, _ = oracle.generate(prompt, max_tokens)
    rows = oracle.prompt_logprobs(prompt + new)[len(prompt) - 1 : -1]  # [len(new), vocab]
    best = np.argsort(-rows, axis=-1, kind="stable")[:, :CANDIDATES]
    return Expected(
        messages=messages,
        prompt_ids=tuple(prompt),
        token_ids=tuple(new),
        text=tokenizer.decode(new, skip_special_tokens=True),
        candidates=tuple({int(i): float(row[i]) for i in ids} for row, ids in zip(rows, best, strict=True)),
    )


def judge(client: Client, name: str, expected: Sequence[Expected], max_tokens: int, noise: float) -> ServeReport:
    """Ask a server everything and compare.

    Args:
        client: Connected to the server.
        name: What the server calls the model.
        expected: The oracle's answers.
        max_tokens: Longest answer, the same as the oracle's.
        noise: See `runtimes.Runtime.noise`.
    """
    chats = [one.messages for one in expected]
    alone = [client.chat(messages, max_tokens) for messages in chats]
    together = client.chat_together(chats, max_tokens)
    problems = [] if client.models() == [name] else [f"/v1/models lists {client.models()}, expected {name}"]
    equal, worst = 0, 0.0
    for one, answer, beside in zip(expected, alone, together, strict=True):
        streamed = client.stream(one.messages, max_tokens)
        found, agreed, deviation = compare_answer(one, answer, noise)
        found += prompt_problems(one, client.prompt_ids(one.messages))
        found += [f"streamed: {text}" for text in same_answer(one, answer, streamed, noise)]
        found += [f"one of {len(chats)} at once: {text}" for text in same_answer(one, answer, beside, noise)]
        problems += [f"{one.messages[-1]['content']!r}: {text}" for text in found]
        equal, worst = equal + agreed, max(worst, deviation)
    return ServeReport(
        problems=tuple(problems),
        texts=tuple(answer.text for answer in alone),
        tokens_equal=equal,
        tokens=sum(len(one.token_ids) for one in expected),
        worst_dlogprob=worst,
    )


def prompt_problems(one: Expected, prompt_ids: Sequence[int]) -> list[str]:
    """The server's template and tokenizer must give transformers' ids."""
    if tuple(prompt_ids) == one.prompt_ids:
        return []
    return [f"the prompt's {len(prompt_ids)} token ids differ from transformers' {len(one.prompt_ids)}"]


def compare_answer(one: Expected, answer: Answer, noise: float) -> tuple[list[str], int, float]:
    """(problems, tokens equal to the oracle's, largest difference of a logprob), by the rule above."""
    if len(answer.logprobs) != len(answer.token_ids):
        return [f"{len(answer.logprobs)} logprobs for {len(answer.token_ids)} tokens"], 0, 0.0
    agreed = common_length(one.token_ids, answer.token_ids)
    problems = difference(one, agreed, answer.token_ids, noise)
    # up to the parting and including it; a token that is no candidate is a problem already
    compared = list(zip(one.candidates, answer.token_ids, answer.logprobs, strict=False))[: agreed + 1]
    deviations = [abs(row[token] - logprob) for row, token, logprob in compared if token in row]
    worst = float(np.max(deviations, initial=0.0))
    if not worst <= noise:  # NaN fails, too
        problems.append(f"logprob of token {int(np.argmax(deviations))} differs by {worst:.3g}, allowed {noise:g}")
    if answer.token_ids == one.token_ids and answer.text != one.text:
        problems.append(f"text {answer.text!r}, expected {one.text!r}")
    return problems, agreed, worst


def same_answer(one: Expected, answer: Answer, other: Answer, noise: float) -> list[str]:
    """Two answers of one server to the same request must be equal, or part where the oracle allows it."""
    without_stop = answer.token_ids[:-1] if answer.stopped and other.stopped else answer.token_ids
    if other.token_ids in (answer.token_ids, without_stop):
        return [] if answer.text == other.text else [f"text {other.text!r}, expected {answer.text!r}"]
    parted = common_length(answer.token_ids, other.token_ids)
    if parted > common_length(one.token_ids, answer.token_ids):
        return []  # both had left the oracle's path before, where it allows that
    return difference(one, parted, other.token_ids, noise)


def difference(one: Expected, position: int, token_ids: Sequence[int], noise: float) -> list[str]:
    """Nothing if the sequences are equal, or part at a token within twice the noise of the oracle's best."""
    if position == len(one.token_ids) == len(token_ids):
        return []
    if position >= len(one.token_ids):
        return [f"token {position} is {token_ids[position]}, expected the end"]
    wanted, row = one.token_ids[position], one.candidates[position]
    if position >= len(token_ids):
        return [f"token {position} is missing, expected {wanted}"]
    got = token_ids[position]
    behind = row[wanted] - row.get(got, -np.inf)
    if behind <= 2 * noise:
        return []
    return [f"token {position} is {got}, expected {wanted}, which leads it by {behind:.3g} nats"]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
