"""Ollama's Modelfile: its Go template writes what the model's own chat template writes, for the kinds that can be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from transformers import AutoTokenizer

from exporters.driver import export
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.start_files import SPECIAL, byte_tokenizer
from runtime_tests.tiny_llama import tiny_checkpoint

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "Be helpful.<|im_end|>\n{% endif %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message.role + '<|end|>\n\n' + message.content | trim"
    " + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ '<turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content"
    " + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
INSIDE_USER = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[I]' + (system if loop.index0 < 2 else '') + message.content + '[/I]' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
NUMBERS = "{% for message in messages %}{{ loop.index ~ message.content ~ '\n' }}{% endfor %}"
BRACES = "{% for message in messages %}{{ '{{' + message.role + '}}' + message.content + '\n' }}{% endfor %}"

Talk = list[dict[str, str]]
TALKS: tuple[Talk, ...] = tuple(
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("user", "Who are you?")],
        [("user", "One\n\ntwo"), ("assistant", "Three {{"), ("user", 'four "five"')],
        [("system", "Speak Latin."), ("user", "Salve"), ("assistant", "Ave"), ("user", "Vale")],
    )
)

# Go's action -> Jinja's; text/template and Jinja agree on what these mean
JINJA = {
    "range .Messages": "{% for m in messages %}",
    "if not .System": "{% if not system %}",
    ".Content": "{{ m.content }}",
}


def run_go(template: str, messages: Talk) -> str:
    """What Go makes of a template, action by action in Jinja; an action not in the table is an error."""
    opened: list[str] = []

    def action(match: re.Match[str]) -> str:
        word = match[1]
        role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', word)
        if word == "end":
            return f"{{% end{opened.pop()} %}}"
        if word.startswith(("range", "if")):
            opened.append("for" if word.startswith("range") else "if")
        return f"{{% {'elif' if role[1] else 'if'} m.role == '{role[2]}' %}}" if role else JINJA[word]

    written = re.sub(r"\{\{ (.*?) \}\}", action, template)
    assert not opened
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    plain = Environment(keep_trailing_newline=True, autoescape=False)  # noqa: S701 -- not HTML
    return plain.from_string(written).render(messages=messages, system=system)


Make = Callable[..., tuple[str, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Export a tiny model whose tokenizer has this chat template: (the Modelfile, the tokenizer)."""

    def write(template: str | None, **names: object) -> tuple[str, Any]:
        source = tiny_checkpoint(tmp_path / "tiny", QuantConfig(), bos_token_id=0, eos_token_id=0).path
        byte_tokenizer(source)
        config = json.loads((source / "tokenizer_config.json").read_text())
        content = {**config, "chat_template": template, **names}
        kept = {key: value for key, value in content.items() if value is not None}
        (source / "tokenizer_config.json").write_text(json.dumps(kept))
        folder = export(L4QCheckpoint.open(source), "gguf", tmp_path / "gguf").folder
        return (folder / "Modelfile").read_text(), AutoTokenizer.from_pretrained(source)

    return write


def template_of(modelfile: str) -> str:
    """The text between TEMPLATE's triple quotes."""
    found = re.search(r'^TEMPLATE """(.*)"""$', modelfile, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA], ids=["chatml", "llama3", "gemma"])
def test_template_writes_what_the_model_was_trained_on(make: Make, template: str) -> None:
    """With and without a system message (where there may be one), over several turns; a changed template does not."""
    content, tokenizer = make(template)
    got = template_of(content)
    for talk in TALKS:
        if talk[0]["role"] == "system" and template is GEMMA:
            assert "# the model's chat template has no system role" in content
            continue
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert run_go(got, talk) == expected
        assert run_go(got.replace("user", "User"), talk) != expected
    assert re.match(r"FROM \./[\w.-]+-Q4_0\.gguf\n", content)
    assert f'PARAMETER stop "{SPECIAL}"' in content


def test_bos_is_written_once(make: Make) -> None:
    """Where llama.cpp puts the BOS token itself, the template leaves it out, with a system message and without."""
    content, tokenizer = make(LLAMA3, add_bos_token=True)
    for talk in TALKS:
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert f"{SPECIAL}{run_go(template_of(content), talk)}" == expected
    assert 'PARAMETER stop "<|eot|>"' in content


@pytest.mark.parametrize("template", [INSIDE_USER, NUMBERS, BRACES], ids=["system inside user", "numbers", "braces"])
def test_other_templates_are_left_to_ollama(make: Make, template: str) -> None:
    """A template that is more than text around messages gives no TEMPLATE, and a line that says so."""
    content, _ = make(template)
    assert "TEMPLATE" not in content
    assert "# the model's chat template is more than text around messages" in content


def test_base_model_continues_its_prompt(make: Make, tmp_path: Path) -> None:
    """Without a chat template, Ollama is told to hand on the prompt; the file it names is the one beside it."""
    content, _ = make(None)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    assert content == f'FROM ./{file.name}\nTEMPLATE """{{{{ .Prompt }}}}"""\nPARAMETER stop "{SPECIAL}"\n'


def test_no_modelfile_without_a_text_vocabulary(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A GGUF that takes token ids only is of no use to Ollama."""
    folder = export(glass_checkpoint("none", group_size=32), "gguf", tmp_path / "gguf").folder
    assert not (folder / "Modelfile").exists()
