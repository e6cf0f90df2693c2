"""A model's tokenizer through transformers: no code of the model's, no files too large, every failure an `L4QError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4q.errors import UsageError
from l4q.guards import foreign
from l4q.json_files import TOKENIZER_BYTES, read_object

# JSON files a tokenizer is read from
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def read_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id.

    Args:
        model: Folder or hub id.
        trust_remote_code: Run a tokenizer class that the model brings.

    Raises:
        UsageError: A file is damaged, too large, or no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    for name in JSON_FILES:
        if (folder / name).exists():
            read_object(folder / name, name, most_bytes=TOKENIZER_BYTES)
    with foreign(
        "the tokenizer cannot be read",
        where=model,
        expected="tokenizer files that transformers reads without code of the model's",
        remedy="copy the tokenizer files again",
    ):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def require_tokenizer(tokenizer: Any, where: object) -> Any:
    """The tokenizer itself, if it makes token ids of a text: transformers also returns ones without a vocabulary.

    Raises:
        UsageError: It does not.
    """
    with foreign("the tokenizer does not work", where=where, remedy="copy the tokenizer files again"):
        ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise UsageError("the tokenizer gives no token ids", where=where, got=ids, remedy="copy its files again")
    return tokenizer
