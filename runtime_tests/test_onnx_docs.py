"""docs/onnx.md: its loop runs as printed, and its option table is the command's."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.cli import command
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from runtime_tests.onnx_models import CASES, export_onnx, make_checkpoint, torch_logits, torch_model

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "onnx.md"
MARKER = "<!-- run by runtime_tests/test_onnx_docs.py -->\n```python\n"

Loop = Callable[[Path], list[int]]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Loop:
    """The page's loop, run inside a folder: the tokens it prints."""
    script = tmp_path / "loop.py"
    script.write_text(DOCUMENT.read_text(encoding="utf-8").split(MARKER)[1].split("```")[0])

    def run(folder: Path) -> list[int]:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        runpy.run_path(str(script))
        return [int(number) for number in re.findall(r"\d+", capsys.readouterr().out)]

    return run


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Torch's continuation, a full forward per token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(torch_logits(model, np.array([tokens]))[0, -1].argmax()))
    return tokens


def test_the_loop_generates_what_torch_does(loop: Loop, tmp_path: Path) -> None:
    """Sixteen greedy tokens through the cache are those of full forwards; with two rows swapped they are not."""
    checkpoint = make_checkpoint(CASES["none-tied"], tmp_path / "checkpoint")
    expected = greedy(torch_model(checkpoint), [5, 17, 42], 16)
    assert loop(export_onnx(checkpoint, tmp_path / "onnx")) == expected
    weights = {module: checkpoint.quantized(module) for module in checkpoint.modules}
    last = checkpoint.modules[-1]
    weights[last] = replace(weights[last], codes=weights[last].codes[::-1].copy())
    dense = ((name, checkpoint.dense(name)) for name in checkpoint.dense_names)
    save_checkpoint(
        tmp_path / "wrong", config=checkpoint.config, weights=weights.items(), dense=dense, quant=checkpoint.quant
    )
    wrong = export_onnx(L4QCheckpoint.open(tmp_path / "wrong"), tmp_path / "wrong-onnx")
    assert loop(wrong) != expected


def test_the_options_of_the_page_are_the_commands() -> None:
    """Every --onnx option stands in the page's table, and none that does not exist."""
    offered = {name for option in command.params for name in option.opts if name.startswith("--onnx-")}
    named = set(re.findall(r"^\| `(--onnx-[a-z-]+)", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named == offered
    assert len(offered) == 5
