"""Ollama's Modelfile beside the GGUF: `ollama create NAME -f Modelfile` takes the file with its template and stops.

Ollama writes prompts with Go templates, so the model's Jinja template is taken apart (`exporters.gguf.chat`) and its
parts are written as one; what cannot be taken apart is left to Ollama, which then looks at the template in the GGUF.
Syntax: https://docs.ollama.com/modelfile and https://docs.ollama.com/template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exporters.gguf.chat import ChatParts, Messages, Render, take_apart
from exporters.gguf.vocab import Vocabulary
from l4q.checkpoint import L4QCheckpoint

MODELFILE_NAME = "Modelfile"
_UNREADABLE = ("{{", '"""')  # what cannot stand inside a Modelfile's triple quotes as plain text
_NO_PARTS = "the model's chat template is more than text around messages: Ollama picks one by what is in the GGUF"
_NO_SYSTEM = "the model's chat template has no system role: system messages are left out"


def write_modelfile(checkpoint: L4QCheckpoint, folder: Path, gguf: str, vocabulary: Vocabulary) -> None:
    """Write the Modelfile of a GGUF file; none if the file has no text vocabulary.

    Args:
        checkpoint: The source.
        folder: Where the file goes.
        gguf: The GGUF file's name.
        vocabulary: What the file says of the tokenizer.
    """
    special = vocabulary.special
    if special is None:
        return
    words = {kind: vocabulary.token(index) for kind, index in special.special_token_ids.items()}
    template = special.chat_template
    if template is not None and not isinstance(template, str):  # several, by name
        template = next((str(entry["template"]) for entry in template if entry.get("name") == "default"), None)
    parts = take_apart(_renderer(template, words)) if template else None
    bos = words.get("bos", "") if special.add_special_token.get("bos") else ""
    lines = [f"FROM ./{gguf}"]
    if parts is not None:
        lines += [] if "system" in parts.roles else [f"# {_NO_SYSTEM}"]
        lines.append(f'TEMPLATE """{go_template(parts, bos)}"""')
    elif template:
        lines.append(f"# {_NO_PARTS}")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')  # a base model continues what it is given
    ends = stops([vocabulary.token(index) for index in _eos_ids(checkpoint)], parts)
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
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


def stops(ends: Sequence[str], parts: ChatParts | None) -> list[str]:
    """Texts that end an answer: the EOS tokens, and what the template writes after an answer."""
    after = parts.roles["assistant"].after.strip() if parts is not None else ""
    return list(dict.fromkeys([*ends, *([after] if after else [])]))


def _eos_ids(checkpoint: L4QCheckpoint) -> Iterator[int]:
    path = checkpoint.path / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for config in (generation, checkpoint.config):
        value = config.get("eos_token_id")
        yield from [] if value is None else [value] if isinstance(value, int) else value


def _renderer(template: str, words: Mapping[str, str]) -> Render:
    # transformers' environment without what only tools and training masks use: importing transformers takes longer
    # than exporting a small model
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update({f"{kind}_token": word for kind, word in words.items()})
    environment.globals["raise_exception"] = _refuse

    def render(messages: Messages, ask: bool) -> str:
        talk = [dict(message) for message in messages]
        text = environment.from_string(template).render(messages=talk, add_generation_prompt=ask)
        if any(odd in text for odd in _UNREADABLE):
            raise ValueError("text that a Modelfile cannot hold")
        return text

    return render


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
