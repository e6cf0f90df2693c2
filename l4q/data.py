"""Training data: files -> token ids and labels.

Plain texts are joined (each ended by EOS) and cut into blocks of `max_length` tokens, every token a target. Prompt
pairs, instructions and conversations become one example each, with label -100 on everything that is not an answer.
Nothing here is random: order comes from the files, shuffling is the sampler's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4q.data_chat import Dialogue, record_dialogue
from l4q.data_records import hash_files, read_records
from l4q.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100
"""The label torch's cross entropy skips."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sequence; input_ids and labels have equal length, labels are token ids or -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that carry loss. The first token never does: nothing precedes it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The examples of a run with the facts that identify them."""

    examples: list[Example]
    sha256: str
    """Over all files' contents, in order."""
    records: dict[str, int]
    """Number of records read, by kind."""
    truncated: int
    """Examples cut at max_length."""
    dropped: int
    """Examples left without a target after the cut."""

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def targets(self) -> int:
        """Tokens that carry loss in all examples."""
        return sum(example.targets for example in self.examples)

    def spread(self, count: int) -> list[list[int]]:
        """Token ids of up to `count` examples from the whole of the data, not its first document."""
        step = max(1, len(self.examples) // count)
        return [example.input_ids for example in self.examples[::step][:count]]

    def facts(self) -> dict[str, Any]:
        """Counts and hash as plain JSON values."""
        return {
            "sha256": self.sha256,
            "records": self.records,
            "examples": len(self.examples),
            "tokens": self.tokens,
            "targets": self.targets,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }

    def words(self) -> str:
        """The counts in a sentence, for the log."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.records.items())
        said = f"{len(self.examples):,} examples of {self.tokens:,} tokens, loss on {self.targets:,}; records: {kinds}"
        return f"{said}; {self.truncated:,} cut at --max-length, {self.dropped:,} without a target dropped"


def load_training_data(paths: Sequence[Path], tokenizer: Tokenizer, *, max_length: int) -> TrainingData:
    """Read, tokenize, pack and label the training files.

    Args:
        paths: .txt, .jsonl or .json files.
        tokenizer: The model's own tokenizer.
        max_length: Tokens per example at most.

    Raises:
        UsageError: A file or record is malformed, or nothing is left to learn from.
        UnsupportedError: A conversation that the tokenizer's chat template cannot express.
    """
    if max_length < 2:
        raise UsageError("max_length leaves nothing to predict", where="max_length", got=max_length, expected=">= 2")
    counts: Counter[str] = Counter()
    stream: list[int] = []
    dialogues: list[Example] = []
    for path in paths:
        for record in read_records(path):
            counts[record.kind] += 1
            if record.kind == "text":
                stream += document_ids(tokenizer, record.fields["text"])
            else:
                dialogues.append(encode_dialogue(tokenizer, record_dialogue(record, tokenizer)))
    cut = [cut_example(example, max_length) for example in dialogues]
    kept = [example for example in cut if example.targets > 0]
    examples = kept + pack_blocks(stream, max_length)
    if not examples:
        raise UsageError(
            "the training files leave no token to predict",
            where=", ".join(map(str, paths)),
            got=f"{sum(counts.values())} records, {len(cut)} of them without an answer within {max_length} tokens",
            expected="at least one example with a target",
            remedy="raise --max-length or shorten the prompts",
        )
    return TrainingData(
        examples=examples,
        sha256=hash_files(paths),
        records=dict(counts),
        truncated=sum(len(example.input_ids) > max_length for example in dialogues),
        dropped=len(cut) - len(kept),
    )


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of one document: the tokenizer's usual opening (BOS if it has one), the text, one EOS."""
    return [*_opening_ids(tokenizer, text), *_end_ids(tokenizer)]


def encode_dialogue(tokenizer: Tokenizer, dialogue: Dialogue) -> Example:
    """Tokenize segment by segment, so that a context's ids are the very ids a runtime sees before it answers."""
    input_ids: list[int] = []
    labels: list[int] = []
    for index, (text, learn) in enumerate(dialogue.segments):
        opening = index == 0 and not dialogue.templated
        ids = _opening_ids(tokenizer, text) if opening else _plain_ids(tokenizer, text)
        input_ids += ids
        labels += ids if learn else [IGNORED] * len(ids)
    if not dialogue.templated:
        input_ids += _end_ids(tokenizer)
        labels += _end_ids(tokenizer)
    return Example(input_ids=input_ids, labels=labels)


def cut_example(example: Example, max_length: int) -> Example:
    """Keep the first `max_length` tokens."""
    return Example(input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])


def require_known(data: TrainingData, rows: int) -> None:
    """Refuse token ids beyond the model's embedding, which an index into it would not survive.

    Args:
        data: The examples.
        rows: Rows of the embedding.

    Raises:
        UsageError: The tokenizer is not the model's.
    """
    largest = max(max(example.input_ids) for example in data.examples)
    if largest >= rows:
        raise UsageError(
            "the tokenizer gives ids that the model has no embedding for",
            where="tokenizer",
            got=largest,
            expected=f"at most {rows - 1}",
            remedy="put the tokenizer that belongs to the model into its folder",
        )


def pack_blocks(stream: Sequence[int], max_length: int) -> list[Example]:
    """Cut a token stream into consecutive blocks; the last may be shorter, a single left-over token is dropped."""
    blocks = [list(stream[start : start + max_length]) for start in range(0, len(stream), max_length)]
    return [Example(input_ids=block, labels=list(block)) for block in blocks if len(block) > 1]


def make_collator(pad_id: int) -> Callable[[Iterable[Example]], dict[str, torch.Tensor]]:
    """A collator that pads on the right: input_ids with `pad_id`, labels with -100, attention_mask with 0."""
    import torch

    def collate(batch: Iterable[Example]) -> dict[str, torch.Tensor]:
        rows = list(batch)
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        input_ids = torch.full(shape, pad_id, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[index, :length] = torch.tensor(row.input_ids, dtype=torch.long)
            labels[index, :length] = torch.tensor(row.labels, dtype=torch.long)
            attention_mask[index, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    return collate


def padding_id(tokenizer: Tokenizer) -> int:
    """The id to pad with: pad, else EOS, else 0; the attention mask hides it and its label is -100."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in candidates if token is not None), 0)


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opening_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # Some tokenizers close every text with EOS; a prompt must stay open.
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _end_ids(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
