"""Turns prompt pairs, instructions and conversations into segments: (text, learn) in the order the model reads them.

A segment with learn=True is an answer: its tokens carry the loss. Conversations go through the tokenizer's own chat
template; an answer is what the template adds to the rendering of everything before it (a prefix difference), so the
mask needs no knowledge of any particular template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from l4q.data_records import Record, RecordKind
from l4q.errors import UnsupportedError, UsageError
from l4q.guards import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# The two prompts of the Stanford Alpaca recipe, for tokenizers without a chat template.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Segment(NamedTuple):
    """A stretch of text that is either context (learn=False) or an answer."""

    text: str
    learn: bool


class Dialogue(NamedTuple):
    """The segments of one record, and whether a template already wrote the special tokens (BOS, end of turn)."""

    segments: list[Segment]
    templated: bool


def record_dialogue(record: Record, tokenizer: Tokenizer) -> Dialogue:
    """The segments of a prompt, instruction or chat record.

    Raises:
        UnsupportedError: A chat record with a tokenizer that has no chat template, or a template whose rendering of a
            conversation does not start with its rendering of the conversation's beginning.
        UsageError: The template refuses the conversation (for example, roles that do not alternate).
    """
    return _DIALOGUES[record.kind](record, tokenizer)


def chat_segments(messages: list[dict[str, str]], tokenizer: Tokenizer, where: str) -> list[Segment]:
    """Split a conversation into context and answers; text after the last answer is dropped, as it teaches nothing."""
    segments: list[Segment] = []
    seen = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], where, ask=True)
        answered = _render(tokenizer, messages[: index + 1], where, ask=False)
        for shorter, longer in ((seen, prompt), (prompt, answered)):
            if not longer.startswith(shorter):
                raise _unstable_template(where, index, shorter, longer)
        segments.append(Segment(prompt[len(seen) :], learn=False))
        segments.append(Segment(answered[len(prompt) :], learn=True))
        seen = answered
    return segments


def _pair_dialogue(record: Record, tokenizer: Tokenizer) -> Dialogue:
    segments = [Segment(record.fields["prompt"], learn=False), Segment(record.fields["completion"], learn=True)]
    return Dialogue(segments, templated=False)


def _instruction_dialogue(record: Record, tokenizer: Tokenizer) -> Dialogue:
    fields = {"input": "", **record.fields}
    if tokenizer.chat_template is None:
        prompt = (ALPACA_INPUT_PROMPT if fields["input"] else ALPACA_PROMPT).format(**fields)
        return Dialogue([Segment(prompt, learn=False), Segment(fields["output"], learn=True)], templated=False)
    question = "\n\n".join(part for part in (fields["instruction"], fields["input"]) if part)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]
    return Dialogue(chat_segments(messages, tokenizer, record.where), templated=True)


def _chat_dialogue(record: Record, tokenizer: Tokenizer) -> Dialogue:
    if tokenizer.chat_template is None:
        raise UnsupportedError(
            "the model's tokenizer has no chat template, so a conversation has no defined text",
            where=record.where,
            got="a {messages} record",
            expected="a tokenizer with a chat template",
            remedy="use {prompt, completion} records, or an instruction-tuned model",
        )
    return Dialogue(chat_segments(record.fields["messages"], tokenizer, record.where), templated=True)


_DIALOGUES: dict[RecordKind, Callable[[Record, Tokenizer], Dialogue]] = {
    "prompt": _pair_dialogue,
    "instruction": _instruction_dialogue,
    "chat": _chat_dialogue,
}


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], where: str, *, ask: bool) -> str:
    """The conversation as text, by transformers' renderer, which runs templates in jinja2's immutable sandbox."""
    from jinja2.exceptions import TemplateError

    roles = [message["role"] for message in messages]
    try:
        with foreign(
            "the chat template fails", where=f"{where}, roles {roles}", remedy=None, passed=(TemplateError, ValueError)
        ):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except (TemplateError, ValueError) as error:  # transformers itself refuses a first turn by the assistant
        raise UsageError(
            "the chat template refuses the conversation",
            where=where,
            got=f"{error}, for roles {roles}",
            expected="roles in the order the template supports",
        ) from error


def _unstable_template(where: str, index: int, shorter: str, longer: str) -> UnsupportedError:
    common = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    return UnsupportedError(
        "the chat template rewrites earlier turns, so answers cannot be told from context",
        where=f"{where}, message {index + 1}",
        got=f"{longer[common : common + 40]!r} at character {common}",
        expected=f"{shorter[common : common + 40]!r}",
        remedy="use {prompt, completion} records with the text spelled out, one answer each",
    )
