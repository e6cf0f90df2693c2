"""The tokenizer of a checkpoint as GGUF metadata.

llama.cpp implements a fixed list of pre-tokenizers and picks one by the name in `tokenizer.ggml.pre`. Here that name
comes from the pre-tokenizer steps in tokenizer.json, not from a hash over the ids of a sample text: such a hash depends
on the vocabulary (an own vocabulary is always unknown) and cannot see steps that do not matter for the sample (the
SmolLM2 tokenizer with and without its digit splitter has the same hash and different ids on "a  1").
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import gguf

from exporters.gguf.metadata import MetadataValue
from l4q.errors import UsageError
from l4q.guards import foreign
from l4q.json_files import TOKENIZER_BYTES, check_json_files, file_stamp, read_object

Json = dict[str, Any]

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

BYTE_LEVEL: Final = "byte-level"
BYTE_LEVEL_GPT2: Final = "byte-level with the GPT-2 pattern"
DIGITS: Final = "digits one by one"

PRE_TOKENIZERS: Final[dict[tuple[tuple[str, ...], bool], str]] = {
    ((BYTE_LEVEL_GPT2,), False): "gpt-2",
    ((DIGITS, BYTE_LEVEL_GPT2), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", BYTE_LEVEL), True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", BYTE_LEVEL), False): "qwen2",
}
"""`tokenizer.ggml.pre` by the pre-tokenizer's steps and the BPE model's ignore_merges."""

SETTINGS: Final = ("tokenizer_config.json", "config.json", "generation_config.json")
"""What gguf-py's SpecialVocab reads beside tokenizer.json."""

IDS_ONLY: Final = "the file has no text vocabulary: give llama.cpp token ids, not text"
_SPACE: Final = "▁"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What goes into the `tokenizer.` keys."""

    metadata: tuple[MetadataValue, ...]
    special: gguf.SpecialVocab | None
    """Merges, special ids and chat template; None when there is no text vocabulary."""
    notes: tuple[str, ...]
    """What a reader of the plan should know."""

    def token(self, index: int) -> str:
        """The text of a token of a text vocabulary."""
        (tokens,) = (entry.value for entry in self.metadata if entry.key == gguf.Keys.Tokenizer.LIST)
        return str(tokens[index])


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a checkpoint folder, padded to the rows of the embedding.

    A byte-level BPE becomes llama.cpp's "gpt2", a BPE with byte fallback its "llama" (SentencePiece). llama.cpp can
    hold nothing else for this family, so any other tokenizer, or none, becomes "no_vocab", with a note.

    Raises:
        UsageError: tokenizer.json is not readable, or has more tokens than the embedding has rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _ids_only("no tokenizer.json in the checkpoint")
    with foreign("the tokenizer cannot be read", where=path, remedy="copy the tokenizer files again"):
        check_json_files(tuple(folder / name for name in SETTINGS if (folder / name).exists()))
        files = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
        return _read_vocabulary(folder, path, vocab_size, tuple((file.name, *file_stamp(file)) for file in files))


@lru_cache(maxsize=1)
def _read_vocabulary(folder: Path, path: Path, vocab_size: int, stamps: tuple[Hashable, ...]) -> Vocabulary:
    """Kept from plan to writing while no file of the folder changes; SpecialVocab reads merges and templates too."""
    tokenizer = _read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        return _ids_only(f"llama.cpp cannot run a {model.get('type')} tokenizer for this architecture")
    steps = pre_tokenizer_steps(tokenizer.get("pre_tokenizer"))
    if BYTE_LEVEL in steps or BYTE_LEVEL_GPT2 in steps:
        return _byte_level(folder, tokenizer, steps, vocab_size)
    if model.get("byte_fallback"):
        return _sentencepiece(folder, tokenizer, vocab_size)
    # Its SentencePiece gives the right ids inside the alphabet and ends the process at the first character outside.
    return _ids_only("llama.cpp cannot run a character BPE without byte fallback")


def pre_tokenizer_steps(node: Json | None) -> tuple[str, ...]:
    """A tokenizer.json pre_tokenizer as a flat tuple of canonical steps; unknown ones keep their JSON."""
    if node is None:
        return ()
    if node["type"] == "Sequence":
        return tuple(step for child in node["pretokenizers"] for step in pre_tokenizer_steps(child))
    if node["type"] == "ByteLevel" and not node.get("add_prefix_space"):
        return (BYTE_LEVEL_GPT2 if node.get("use_regex", True) else BYTE_LEVEL,)
    if node["type"] == "Digits" and node.get("individual_digits"):
        return (DIGITS,)
    if node["type"] == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        return (str(node["pattern"].get("Regex")),)
    return (json.dumps(node, sort_keys=True),)


def _byte_level(folder: Path, tokenizer: Json, steps: tuple[str, ...], vocab_size: int) -> Vocabulary:
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    pre = PRE_TOKENIZERS.get((steps, bool(tokenizer["model"].get("ignore_merges"))))
    notes = [f"tokenizer: byte-level BPE, llama.cpp pre-tokenizer {pre or 'default'}"]
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS.values())
        notes.append(
            f"llama.cpp has no known match for this pre-tokenizer (known: {known}): text may be cut differently there, "
            "token ids are safe"
        )
    if tokenizer.get("normalizer"):
        notes.append(f"llama.cpp does not apply the tokenizer's {tokenizer['normalizer'].get('type')} normalizer")
    tokens, types = _tokens_and_types(tokenizer, vocab_size)
    metadata = [
        _text(gguf.Keys.Tokenizer.MODEL, "gpt2"),
        _text(gguf.Keys.Tokenizer.PRE, pre or "default"),
        _array(gguf.Keys.Tokenizer.LIST, tokens),
        _array(gguf.Keys.Tokenizer.TOKEN_TYPE, types),
        _flag(gguf.Keys.Tokenizer.ADD_PREFIX, False),
    ]
    return _complete(metadata, special, notes)


def _sentencepiece(folder: Path, tokenizer: Json, vocab_size: int) -> Vocabulary:
    special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=vocab_size)
    tokens, types = _tokens_and_types(tokenizer, vocab_size)
    metadata = [
        _text(gguf.Keys.Tokenizer.MODEL, "llama"),
        _text(gguf.Keys.Tokenizer.PRE, "default"),
        _array(gguf.Keys.Tokenizer.LIST, tokens),
        _array(gguf.Keys.Tokenizer.SCORES, merge_scores(tokenizer["model"], tokens)),
        _array(gguf.Keys.Tokenizer.TOKEN_TYPE, types),
        _flag(gguf.Keys.Tokenizer.ADD_PREFIX, _prepends_space(tokenizer)),
    ]
    return _complete(metadata, special, ["tokenizer: BPE with byte fallback, llama.cpp's SentencePiece"])


def merge_scores(model: Json, tokens: list[str]) -> list[float]:
    """SentencePiece scores that reproduce BPE's merge order: minus the rank of the first merge that makes the token."""
    merges = model["merges"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _tokens_and_types(tokenizer: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or ()}
    vocabulary = {**tokenizer["model"]["vocab"], **{content: entry["id"] for content, entry in added.items()}}
    if max(vocabulary.values(), default=-1) >= vocab_size:
        raise UsageError(
            "the tokenizer has more tokens than the embedding has rows",
            where="tokenizer.json",
            got=max(vocabulary.values()) + 1,
            expected=f"at most {vocab_size}",
            remedy="put the tokenizer that belongs to the model into the checkpoint",
        )
    byte_fallback = bool(tokenizer["model"].get("byte_fallback"))
    unknown = tokenizer["model"].get("unk_token")
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = _token_type(token, added.get(token), unknown, byte_fallback)
    return tokens, types


def _token_type(token: str, added: Json | None, unknown: str | None, byte_fallback: bool) -> int:
    if token == unknown:
        return int(gguf.TokenType.UNKNOWN if byte_fallback else gguf.TokenType.CONTROL)
    if added is not None:
        return int(gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED)
    is_byte = byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)


def _prepends_space(tokenizer: Json) -> bool:
    """Whether the tokenizer puts a space before the text: a Prepend normalizer, or a Metaspace that is told to."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), tokenizer.get("pre_tokenizer") or {}]
    return any(
        (step.get("type") == "Prepend" and step.get("prepend") == _SPACE)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _complete(metadata: list[MetadataValue], special: gguf.SpecialVocab, notes: list[str]) -> Vocabulary:
    # llama.cpp's defaults for absent keys depend on the vocabulary type, so both are always written.
    for kind in ("bos", "eos"):
        special.add_special_token.setdefault(kind, False)
    if "eos" not in special.special_token_ids:
        notes.append("no EOS token is declared: llama.cpp then assumes one by position")
    return Vocabulary(metadata=tuple(metadata), special=special, notes=tuple(notes))


def _ids_only(reason: str) -> Vocabulary:
    metadata = (_text(gguf.Keys.Tokenizer.MODEL, "no_vocab"),)
    return Vocabulary(metadata=metadata, special=None, notes=(f"{reason}; {IDS_ONLY}",))


def _read_json(path: Path) -> Json:
    content = read_object(path, "tokenizer.json", most_bytes=TOKENIZER_BYTES)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = vocabulary.values() if isinstance(vocabulary, dict) else (None,)
    if isinstance(model, dict) and model.get("type") == "BPE" and not all(type(at) is int and at >= 0 for at in ids):
        raise _damaged(path, "model.vocab", "an object of token ids, whole numbers >= 0")
    fits = added is None or (isinstance(added, list) and all(_is_added(entry) for entry in added))
    if not fits:
        raise _damaged(path, "added_tokens", "a list of {content, id}, whole ids >= 0")
    return content


def _is_added(entry: Any) -> bool:
    named = isinstance(entry, dict) and isinstance(entry.get("content"), str)
    return named and type(entry.get("id")) is int and entry["id"] >= 0


def _damaged(path: Path, part: str, expected: str) -> UsageError:
    return UsageError(
        "the tokenizer cannot be read", where=f"{path}: {part}", expected=expected, remedy="copy its files again"
    )


def _text(key: str, value: str) -> MetadataValue:
    return MetadataValue(key=key, value=value, type=gguf.GGUFValueType.STRING)


def _flag(key: str, value: bool) -> MetadataValue:
    return MetadataValue(key=key, value=value, type=gguf.GGUFValueType.BOOL)


def _array(key: str, value: list[Any]) -> MetadataValue:
    return MetadataValue(key=key, value=value, type=gguf.GGUFValueType.ARRAY)
