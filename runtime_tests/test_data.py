"""Training data: formats, label masks judged by decoding them, packing, and refusals that name the place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from l4q.data import IGNORED, Example, TrainingData, load_training_data, make_collator
from l4q.data_chat import ALPACA_PROMPT
from l4q.errors import UnsupportedError, UsageError

CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue, like the sea."},
    {"role": "user", "content": "And a number?"},
    {"role": "assistant", "content": "Forty-two."},
]


@pytest.fixture(scope="module")
def glass_tokenizer(glassllm_dir: Path) -> Any:
    """A tokenizer without a chat template."""
    return AutoTokenizer.from_pretrained(glassllm_dir)


@pytest.fixture
def chat_tokenizer(smollm2_dir: Path) -> Any:
    """A tokenizer with a chat template; fresh, so that a test may change the template."""
    return AutoTokenizer.from_pretrained(smollm2_dir)


def load(
    folder: Path, tokenizer: Any, content: str | list[Any], *, max_length: int = 512, name: str = ""
) -> TrainingData:
    """Write one training file and load it."""
    path = folder / (name or ("data.txt" if isinstance(content, str) else "data.jsonl"))
    text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
    path.write_text(text, encoding="utf-8")
    return load_training_data([path], tokenizer, max_length=max_length)


def learned(tokenizer: Any, example: Example) -> str:
    """The text that carries loss."""
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def context(tokenizer: Any, example: Example) -> str:
    """The text that carries no loss."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return str(tokenizer.decode([token for token, label in pairs if label == IGNORED]))


def test_text_is_packed_without_loss(tmp_path: Path, glass_tokenizer: Any) -> None:
    """Blocks of max_length hold the document's ids in order, closed by EOS, and every token is a target."""
    text = "The whale is the largest animal. It lives in the sea.\n" * 30
    data = load(tmp_path, glass_tokenizer, text, max_length=64)
    flat = [token for example in data.examples for token in example.input_ids]
    assert flat == [*glass_tokenizer(text)["input_ids"], glass_tokenizer.eos_token_id]
    assert [len(example.input_ids) for example in data.examples[:-1]] == [64] * (len(data.examples) - 1)
    assert all(example.labels == example.input_ids for example in data.examples)
    assert data.tokens == len(flat)


def test_text_records_share_blocks(tmp_path: Path, glass_tokenizer: Any) -> None:
    """Short {text} records fill blocks together, each ended by EOS."""
    data = load(tmp_path, glass_tokenizer, [{"text": f"Sentence number {n}."} for n in range(20)], max_length=32)
    flat = [token for example in data.examples for token in example.input_ids]
    assert flat.count(glass_tokenizer.eos_token_id) == 20
    assert len(data.examples) < 20


def test_completion_alone_carries_loss(tmp_path: Path, glass_tokenizer: Any) -> None:
    """In a prompt pair exactly the completion and EOS are targets."""
    data = load(tmp_path, glass_tokenizer, [{"prompt": "The sky is", "completion": " blue today."}])
    assert context(glass_tokenizer, data.examples[0]) == "The sky is"
    assert learned(glass_tokenizer, data.examples[0]) == " blue today." + glass_tokenizer.eos_token


def test_shifted_mask_is_noticed(tmp_path: Path, glass_tokenizer: Any) -> None:
    """The decoding check above fails for a mask that is off by one token."""
    example = load(tmp_path, glass_tokenizer, [{"prompt": "The sky is", "completion": " blue today."}]).examples[0]
    start = example.labels.index(next(label for label in example.labels if label != IGNORED))
    shifted = [IGNORED] * (start - 1) + example.input_ids[start - 1 :]
    assert learned(glass_tokenizer, Example(input_ids=example.input_ids, labels=shifted)) != learned(
        glass_tokenizer, example
    )


def test_instruction_without_template(tmp_path: Path, chat_tokenizer: Any) -> None:
    """Without a chat template an instruction is put into the Alpaca prompt, with and without input."""
    chat_tokenizer.chat_template = None
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "three"},
        {"instruction": "Say yes.", "input": "", "output": "yes"},
    ]
    data = load(tmp_path, chat_tokenizer, records)
    first, second = (context(chat_tokenizer, example) for example in data.examples)
    assert "further context" in first
    assert first.endswith("### Input:\n1 and 2\n\n### Response:\n")
    assert second == ALPACA_PROMPT.format(instruction="Say yes.")
    assert learned(chat_tokenizer, data.examples[0]) == "three" + chat_tokenizer.eos_token


def test_alpaca_file_through_template(chat_tokenizer: Any, smollm2_dir: Path) -> None:
    """Each of 999 real instructions has its whole answer, its end of turn, and nothing else as target."""
    path = smollm2_dir.parent / "text" / "alpaca_en_demo.json"
    data = load_training_data([path], chat_tokenizer, max_length=8192)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert len(data.examples) == len(records) == 999
    assert data.truncated == 0
    for record, example in zip(records, data.examples, strict=True):
        assert learned(chat_tokenizer, example) == record["output"] + "<|im_end|>\n"
        question = "\n\n".join(filter(None, [record["instruction"], record["input"]]))
        assert context(chat_tokenizer, example).endswith(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_every_answer_of_a_chat_carries_loss(tmp_path: Path, chat_tokenizer: Any) -> None:
    """In a conversation both answers are targets, and the ids are those of the template's own rendering."""
    example = load(tmp_path, chat_tokenizer, [{"messages": CHAT}]).examples[0]
    assert learned(chat_tokenizer, example) == "Blue, like the sea.<|im_end|>\nForty-two.<|im_end|>\n"
    assert example.input_ids == chat_tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


def test_text_after_the_last_answer_is_dropped(tmp_path: Path, chat_tokenizer: Any) -> None:
    """A trailing question adds no tokens."""
    longer = [*CHAT, {"role": "user", "content": "Thanks!"}]
    data = load(tmp_path, chat_tokenizer, [{"messages": CHAT}, {"messages": longer}])
    assert data.examples[0] == data.examples[1]


def test_template_that_rewrites_history_is_refused(tmp_path: Path, chat_tokenizer: Any) -> None:
    """A template that changes earlier turns as the conversation grows gives an error, not a wrong mask."""
    chat_tokenizer.chat_template = "{{ messages|length }}:{% for m in messages %}{{ m['content'] }};{% endfor %}"
    with pytest.raises(UnsupportedError, match="rewrites earlier turns"):
        load(tmp_path, chat_tokenizer, [{"messages": CHAT}])


def test_template_refusal_is_reported(tmp_path: Path, chat_tokenizer: Any) -> None:
    """A template's own complaint reaches the user with file and line."""
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"(?s)line 1.*roles must alternate"):
        load(tmp_path, chat_tokenizer, [{"messages": CHAT}])


def test_chat_needs_a_template(tmp_path: Path, glass_tokenizer: Any) -> None:
    """A conversation for a tokenizer without chat template is refused with a remedy."""
    with pytest.raises(UnsupportedError, match=r"(?s)the model's tokenizer has no chat template.*prompt, completion"):
        load(tmp_path, glass_tokenizer, [{"messages": CHAT}])


def test_long_examples_are_cut_and_counted(tmp_path: Path, glass_tokenizer: Any) -> None:
    """An answer beyond max_length is cut; an example whose answer is cut away entirely is dropped, both counted."""
    records = [
        {"prompt": "Go on:", "completion": " and on" * 50},
        {"prompt": "word " * 50, "completion": "never seen"},
        {"prompt": "A", "completion": " short one"},
    ]
    data = load(tmp_path, glass_tokenizer, records, max_length=24)
    assert (len(data.examples), data.truncated, data.dropped) == (2, 2, 1)
    assert re.fullmatch(r"2 examples of \d+ tokens, .* 3 \w+; 2 cut at --max-length, 1 without.*", data.words())
    assert max(len(example.input_ids) for example in data.examples) == 24
    with pytest.raises(UsageError, match="no token to predict"):
        load(tmp_path, glass_tokenizer, records[1:2], max_length=24)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not valid JSON"),
        ('{"text": "a", "messages": []}', r"(?s)no known format.*keys \['messages', 'text'\].*exactly"),
        ('{"question": "a"}', r"(?s)no known format.*question"),
        ('["a"]', "(?s)no known format.*list"),
        ('{"text": 3}', "(?s)not a string.*int"),
        ('{"prompt": "a", "completion": null}', "(?s)not a string.*NoneType"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "(?s)unknown role.*robot"),
        ('{"messages": [{"role": "user"}]}', "malformed"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
    ],
)
def test_bad_record_names_its_line(tmp_path: Path, glass_tokenizer: Any, line: str, message: str) -> None:
    """A malformed record stops with file, line, what was found and what was expected."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        load_training_data([path], glass_tokenizer, max_length=64)
    assert f"{path}, line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"a,b", r"(?s)not known.*\.csv"),
        ("data.txt", b" \n", "empty"),
        ("data.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("data.json", b'{"text": "a"}', "(?s)must hold a list.*dict"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, glass_tokenizer: Any, name: str, content: bytes, message: str) -> None:
    """A file of another kind, without content, or in another encoding is refused by name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_training_data([tmp_path / name], glass_tokenizer, max_length=64)


def test_missing_file_is_refused(tmp_path: Path, glass_tokenizer: Any) -> None:
    """A file that is not there gives one clear error."""
    with pytest.raises(UsageError, match="cannot be read"):
        load_training_data([tmp_path / "none.txt"], glass_tokenizer, max_length=64)


def test_loading_is_deterministic_and_hashed(tmp_path: Path, glass_tokenizer: Any) -> None:
    """The same files give the same examples and hash; one changed byte gives another hash."""
    records: list[Any] = [{"text": "One."}, {"prompt": "Two", "completion": " three"}]
    first, again = (load(tmp_path, glass_tokenizer, records) for _ in range(2))
    assert first == again
    assert first.records == {"text": 1, "prompt": 1}
    assert load(tmp_path, glass_tokenizer, [{"text": "One!"}, records[1]]).sha256 != first.sha256


def test_line_separators_inside_strings(tmp_path: Path, glass_tokenizer: Any) -> None:
    """U+2028 inside a JSON string does not end the record."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_training_data([path], glass_tokenizer, max_length=64).records == {"text": 1}


def test_collator_pads_on_the_right() -> None:
    """Shorter rows end in pad ids that the mask and the labels hide."""
    rows = [Example(input_ids=[5, 6, 7], labels=[IGNORED, 6, 7]), Example(input_ids=[8], labels=[8])]
    batch = make_collator(pad_id=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
