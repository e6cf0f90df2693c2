"""The mistakes of unofficial converters, made on purpose: our verification catches each of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UsageError
from l4q.weight import QuantizedWeight
from runtime_tests.converter_mistakes import MISTAKES, Mistake
from runtime_tests.hf_exports import write_export, wrong_modules
from runtime_tests.tiny_llama import tiny_checkpoint


class Exports:
    """Correct exports by what they need, made once."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def checkpoint(self, mistake: Mistake) -> L4QCheckpoint:
        """A tiny llama on the mistake's grid."""
        folder = self.base / mistake.zero_point
        if not (folder / "l4q").exists():
            tiny_checkpoint(folder, QuantConfig(zero_point=mistake.zero_point, group_size=32))
        return L4QCheckpoint.open(folder / "l4q")

    def copy(self, mistake: Mistake, target: Path) -> Path:
        """The correct export, to be spoilt."""
        name = "-".join([mistake.format, mistake.zero_point, *mistake.options.values()])
        if not (self.base / name).exists():
            write_export(self.checkpoint(mistake), mistake.format, self.base / name, **mistake.options)
        return Path(shutil.copytree(self.base / name, target))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Shared by all mistakes."""
    return Exports(tmp_path_factory.mktemp("correct"))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_mistake_is_caught(exports: Exports, mistake: Mistake, tmp_path: Path) -> None:
    """The correct folder passes; the mistaken one lists the modules that differ, or says what contradicts what."""
    checkpoint, folder = exports.checkpoint(mistake), exports.copy(mistake, tmp_path / "out")
    assert wrong_modules(checkpoint, mistake.format, folder) == []
    mistake.edit(folder)
    found = wrong_modules(checkpoint, mistake.format, folder)
    assert found
    if mistake.message:
        assert mistake.message in found[0]
    else:
        assert all("model.layers." in line for line in found)


def test_a_zero_point_of_zero_never_gets_into_a_file() -> None:
    """GPTQ v1 stores z - 1, which wraps at 0 and is read as 16 or 0 by different programs: l4q's grid starts at 1."""
    codes, scales = np.zeros((2, 32), np.uint8), np.ones((2, 1), np.float16)
    with pytest.raises(UsageError, match=r"zeros.*\n.*got: \[0, 1\].*\n.*expected: \[1, 15\]"):
        QuantizedWeight(
            codes=codes, scales=scales, zeros=np.array([[0], [1]], np.uint8), bits=4, group_size=32, name="x"
        )


def test_formats_are_all_represented() -> None:
    """Every format has its mistakes."""
    assert {mistake.format for mistake in MISTAKES.values()} == {"gptq", "awq", "compressed-tensors", "gguf", "onnx"}
