"""The same checkpoint and options give the same bytes, whatever threads, hash seed, time zone, locale and folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from exporters.driver import EXPORTERS
from l4q.config import QuantConfig, ZeroPoint
from runtime_tests.engines.host import PROJECT
from runtime_tests.reliability import record
from runtime_tests.tiny_llama import tiny_checkpoint

# Arguments: threads, folder of checkpoints, output, then the training command's words for each run.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from exporters.driver import EXPORTERS, export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_train import command

threads, sources, out, *runs = sys.argv[1:]
torch.set_num_threads(int(threads))
for source in sorted(Path(sources).iterdir()):
    checkpoint = L4QCheckpoint.open(source / "l4q")
    for name in EXPORTERS:
        if source.name != "float" or name in ("gguf", "onnx"):
            options = ExportOptions(onnx_runtime_optimized=True)
            export(checkpoint, name, Path(out) / "exports" / source.name / name, options, check="none")
torch.set_num_threads(1)
for words in runs:
    command.main(json.loads(words), standalone_mode=False)
"""

PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8"}
OTHER = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C", "COLUMNS": "40"}


@pytest.fixture(scope="module")
def twice(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two output folders: the same exports and the same training, in two unlike processes."""
    base = tmp_path_factory.mktemp("twice")
    for kind in get_args(ZeroPoint):
        tiny_checkpoint(base / "sources" / kind, QuantConfig(zero_point=kind, group_size=32))
    elsewhere = base / "a folder elsewhere"
    elsewhere.mkdir()
    text = (glassllm_dir.parent / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    (base / "text.txt").write_text(text[:6000], encoding="utf-8")
    words = [str(glassllm_dir), "--data", str(base / "text.txt"), "--steps", "3", "--group-size", "32", "--leave-dense"]
    words += ["--max-length", "32"]
    first, second = base / "first", elsewhere / "second"
    runs = [json.dumps([*words, "--out", str(first / name), "--seed", seed]) for name, seed in (("5", "5"), ("6", "6"))]
    run(1, base / "sources", first, *runs, environment=PLAIN, cwd=PROJECT)
    relative = json.dumps([*words, "--out", "second/5", "--seed", "5"])
    run(2, os.path.relpath(base / "sources", elsewhere), "second", relative, environment=OTHER, cwd=elsewhere)
    return first, second


def run(*words: object, environment: dict[str, str], cwd: Path) -> None:
    """Run PROGRAM in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in {*PLAIN, *OTHER}}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        env={**inherited, **environment, "PYTHONPATH": str(PROJECT)},
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_exports_are_the_same_bytes_everywhere(twice: tuple[Path, Path]) -> None:
    """All formats of three kinds of zero-points agree in every file; a flipped bit would show."""
    first, second = (digests(folder / "exports") for folder in twice)
    assert len({name.split("/")[1] for name in first}) == len(EXPORTERS)
    assert first == second
    changed = next((twice[1] / "exports").rglob("model.onnx.data"))
    whole = changed.read_bytes()
    changed.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert digests(twice[1] / "exports") != first
    changed.write_bytes(whole)
    record("determinism", "1 and 2 threads, other hash seed, time zone, locale, folder", 12, "the same bytes")


def test_training_twice_gives_the_same_bytes(twice: tuple[Path, Path]) -> None:
    """The same seed, data and number of threads give the same checkpoint; another seed gives another."""
    first, second = (digests(folder / "5" / "checkpoint") for folder in twice)
    other = digests(twice[0] / "6" / "checkpoint")
    weights = next(name for name in first if name.endswith(".safetensors"))
    assert first == second
    assert first[weights] != other[weights]
