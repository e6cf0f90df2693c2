"""Ollama's Modelfile beside the GGUF: `ollama create NAME -f Modelfile` takes the file with its template and stops.

Ollama writes prompts with Go templates, so the model's Jinja template is taken apart (`exporters.gguf.chat`) and its
parts are written as one; what cannot be taken apart is left to Ollama, which then looks at the template in the GGUF.
Syntax: https://docs.ollama.com/modelfile and https://docs.ollama.com/template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporters.gguf.chat import ChatParts, Messages, take_apart
from l4q.checkpoint import L4QCheckpoint

MODELFILE_NAME = "Modelfile"
_UNREADABLE = ("{{", '"""')  # what cannot stand inside a Modelfile's triple quotes as plain text
_NO_PARTS = "the model's chat template is more than text around messages: Ollama picks one by what is in the GGUF"
_NO_SYSTEM = "the model's chat template has no system role: system messages are left out"


def write_modelfile(checkpoint: L4QCheckpoint, folder: Path, gguf: str, *, adds_bos: bool) -> None:
    """Write the Modelfile of a GGUF file with a text vocabulary.

    Args:
        checkpoint: The source; its folder has the tokenizer.
        folder: Where the file goes.
        gguf: The GGUF file's name.
        adds_bos: Whether the runtime puts a BOS token before every prompt, so that the template must not.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    parts = take_apart(_renderer(tokenizer)) if tokenizer.chat_template else None
    bos = str(tokenizer.bos_token or "") if adds_bos else ""
    lines = [f"FROM ./{gguf}"]
    if parts is not None:
        lines += [] if "system" in parts.roles else [f"# {_NO_SYSTEM}"]
        lines.append(f'TEMPLATE """{go_template(parts, bos)}"""')
    elif tokenizer.chat_template:
        lines.append(f"# {_NO_PARTS}")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')  # a base model continues what it is given
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops(checkpoint, tokenizer, parts)]
    (folder / MODELFILE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(parts: ChatParts, bos: str = "") -> str:
    """The parts as a Go template over .Messages; `bos` is dropped where the parts begin with it."""
    branches = []
    for role, around in sorted(parts.roles.items()):
        before = around.before.removeprefix(bos) if role == "system" else around.before
        branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{around.after}{{{{ ')
    head = parts.head.removeprefix(bos)
    shown = f"{{{{ if not .System }}}}{head}{{{{ end }}}}" if "system" in parts.roles and head else head
    return f"{shown}{{{{ range .Messages }}}}{{{{ {'else '.join(branches)}end }}}}{{{{ end }}}}{parts.prompt}"


def stops(checkpoint: L4QCheckpoint, tokenizer: Any, parts: ChatParts | None) -> list[str]:
    """Texts that end an answer: the EOS tokens of generation_config.json and config.json, and what follows answers."""
    found = [str(tokenizer.convert_ids_to_tokens(index)) for index in _eos_ids(checkpoint)]
    after = parts.roles["assistant"].after.strip() if parts is not None else ""
    return list(dict.fromkeys([*found, *([after] if after else [])]))


def _eos_ids(checkpoint: L4QCheckpoint) -> Iterator[int]:
    path = checkpoint.path / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for config in (generation, checkpoint.config):
        value = config.get("eos_token_id")
        yield from [] if value is None else [value] if isinstance(value, int) else value


def _renderer(tokenizer: Any) -> Any:
    def render(messages: Messages, ask: bool) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        if any(odd in text for odd in _UNREADABLE):
            raise ValueError("text that a Modelfile cannot hold")
        return str(text)

    return render
