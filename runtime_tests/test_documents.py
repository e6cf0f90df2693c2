"""README.md and docs/: what they tell a reader to type works, on a small model and few steps."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from l4q.checkpoint import L4QCheckpoint
from runtime_tests import page_commands as pages
from runtime_tests.serving.page import block
from runtime_tests.start_files import byte_tokenizer
from runtime_tests.tiny_llama import tiny_llama

README = pages.PROJECT / "README.md"
TUTORIAL = pages.PROJECT / "docs" / "tutorial.md"
DOCUMENTS = sorted([README, *(pages.PROJECT / "docs").glob("*.md")])
# Appended to a command: of an option given twice the last one counts. The MLP's 341 columns fit no group and no vLLM
# kernel, so only attention is quantized.
SMALL = {
    "l4q-train": "--steps 2 --max-length 64 --eval-windows 1 --eval-window 64 --skip *.mlp.*",
    "l4q-inspect": "",
    "l4q-export": "",
    "l4q-parity": "--windows 1 --window 64 --new-tokens 4 --threads 1",
}
# Programs whose lines are run by bash as they stand.
SHELL = ("cat", "cp")
# Lines whose parts are checked instead: they would install, or start what runtime_tests/test_serving.py starts.
CHECKED = ("python3.11", ".", "pip", "make", "export")
SERVERS = {
    "vllm.entrypoints.openai.api_server": "vllm",
    "runtime_tests.serving.llamacpp_server": "llamacpp",
    "tools.serve_check": "serve-check",
}


def run_line(line: str, model: Path) -> None:
    """One command of the tutorial, in the current folder."""
    words = shlex.split(line)
    if words[0] in SHELL:
        subprocess.run(["bash", "-euc", line], check=True)
        return
    program = words[2] if words[:2] == ["python", "-m"] else words[0]
    start = 3 if words[0] == "python" else 1
    words = [str(model) if word.startswith("HuggingFaceTB/") else word for word in words[start:]]
    command = pages.command_of(program)
    assert command is not None
    command.main([*words, *SMALL[program].split()], standalone_mode=False)


def test_the_tutorial_from_text_to_server(
    glassllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the tutorial that installs nothing runs, training, three exports and their parity."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(pages.PROJECT / "docs")
    (tmp_path / "README.md").symlink_to(README)
    ran = []
    for line in pages.commands(TUTORIAL):
        words = shlex.split(line)
        if words[0] in CHECKED or (words[:2] == ["python", "-m"] and words[2] in SERVERS):
            continue
        run_line(line, glassllm_dir)
        ran.append(words[2] if words[0] == "python" else words[0])
    assert ran == ["cat", "cp", "l4q-train", "l4q-inspect", *["l4q-export"] * 2, "l4q-parity"]
    report = json.loads((tmp_path / "parity" / "report.json").read_text())
    assert [row["problems"] for row in report["rows"]] == [[], [], [], []]  # ONNX Runtime has a row per level
    assert {Path(row["folder"]).name for row in report["rows"]} == {"gptq", "gguf", "onnx"}
    assert (tmp_path / "parity" / "report.html").is_file()
    assert len(L4QCheckpoint.open(tmp_path / "RUN" / "checkpoint").modules) == 16
    assert "perplexity, trained" in capsys.readouterr().out


def test_the_readmes_commands_are_the_tutorials() -> None:
    """Each of README's own-model commands is one the tutorial's test runs, word for word."""
    ours = [line for line in pages.commands(README) if line.startswith("l4q-")]
    run = pages.commands(TUTORIAL)
    assert [line.split()[0] for line in ours] == ["l4q-train", "l4q-export", "l4q-parity"]
    assert all(any(pages.is_part_of(line, other) for other in run) for line in ours)
    assert not any(pages.is_part_of(f"{ours[0]} --rank 4", other) for other in run)


def test_the_tutorials_servers_are_those_of_the_serving_page() -> None:
    """Its commands that serve stand word for word in docs/serving.md, whose test starts them on SmolLM2."""
    text = TUTORIAL.read_text(encoding="utf-8")
    assert all(block(name) in text for name in SERVERS.values())


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=lambda page: page.name)
def test_lines_that_install_name_what_exists(page: Path) -> None:
    """`make` lines name targets, `pip` lines extras and this checkout, and no line is of an unknown kind."""
    known = (*CHECKED, *SHELL, "python")
    for line in pages.commands(page):
        words = shlex.split(line)
        assert words[0] in known or words[0].startswith("l4q-"), line
        if words[0] == "make":
            assert set(words[1:]) <= pages.make_targets(), line
        if words[0] == "pip":
            wanted = re.fullmatch(r"\.\[([\w,-]+)\]", words[2])
            assert words[1] == "install", line
            assert wanted is not None, line
            assert set(wanted[1].split(",")) <= pages.extras(), line


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_option_on_a_page_exists(page: Path) -> None:
    """Whatever a page writes after one of our commands, in blocks and in running text, the command accepts."""
    wrong = [(name, pages.unknown_options(name, options)) for name, options in pages.invocations(page)]
    assert [(name, options) for name, options in wrong if options] == []


@pytest.mark.parametrize("page", [README, *sorted(pages.PROJECT.glob("[CS]*.md"))], ids=lambda page: page.name)
def test_links_and_pictures_outside_the_site_are_there(page: Path) -> None:
    """What README.md and its neighbours link to or show is in the repository; the site's own check has the rest."""
    targets = pages.relative_targets(page)
    assert [target for target in targets if not (page.parent / target).exists()] == []
    if page == README:
        assert {"docs/images/report-light.png", "docs/images/report-dark.png"} <= set(targets)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    """The twin: links and pictures are found in Markdown and in HTML, other hosts and anchors are not asked for."""
    page = tmp_path / "page.md"
    page.write_text(
        '[a](gone.md#x) ![b](b.png) <img src="c.png" alt=""> <source srcset="d.png"> [e](https://e.org) [f](#f)'
    )
    assert pages.relative_targets(page) == ["gone.md", "b.png", "c.png", "d.png"]


def test_a_wrong_option_on_a_page_is_seen(tmp_path: Path) -> None:
    """The check of options finds one that does not exist, in a block and in a sentence."""
    page = tmp_path / "page.md"
    page.write_text("```\nl4q-train M --data t \\\n  --bit 4 --out R\n```\nUse `l4q-export C --formats gguf`.\n")
    found = [pages.unknown_options(*use) for use in pages.invocations(page)]
    assert found == [["--bit"], ["--formats"]]


def test_the_data_example_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/own_data.md's program writes is read as two prompts."""
    from l4q.data_records import read_records

    text = (pages.PROJECT / "docs" / "own_data.md").read_text(encoding="utf-8")
    program = tmp_path / "make_data.py"
    program.write_text(text.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program))
    assert [record.kind for record in read_records(tmp_path / "my_data.jsonl")] == ["prompt", "prompt"]


def test_the_readmes_program_makes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's Python program runs as printed on a small model, and the result loads where the next sentence says."""
    import torch
    from transformers import AutoModelForCausalLM

    program = README.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    model = tmp_path / "my" / "model"
    tiny_llama(model)
    byte_tokenizer(model)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    checkpoint = L4QCheckpoint.open(tmp_path / "checkpoint")
    name = checkpoint.modules[0]
    weight = loaded.dequantize().get_submodule(name).weight
    assert torch.equal(weight.detach(), torch.from_numpy(checkpoint.quantized(name).dequantize()))
