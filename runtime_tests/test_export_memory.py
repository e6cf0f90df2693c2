"""Memory of freezing, exporting, verifying and evaluating does not depend on the number of layers; nor do imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = ("gptq", "awq", "compressed-tensors", "gguf", "onnx")


@pytest.fixture(scope="module")
def peaks(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What was done -> peak in bytes for the small and the large model, see runtime_tests/memory_child.py."""
    work = tmp_path_factory.mktemp("peaks")
    command = [sys.executable, "-m", "runtime_tests.memory_child", str(glassllm_dir), str(work)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=800)
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def more(peaks: dict[str, list[int]], name: str) -> int:
    """Bytes that the large model's peak lies above the small model's."""
    return peaks[name][1] - peaks[name][0]


@pytest.mark.parametrize("name", ["freeze", *FORMATS])
def test_peak_is_independent_of_size(peaks: dict[str, list[int]], name: str) -> None:
    """A checkpoint of seventeen times the layers needs no more memory, to within a fraction of what it is larger."""
    larger = more(peaks, "bytes")
    assert larger > 30 << 20
    assert more(peaks, name) < larger / 2, peaks


def test_evaluating_holds_no_float_weights(peaks: dict[str, list[int]]) -> None:
    """One layer is dequantized at a time. The mapped codes may come in again, where the system had dropped them."""
    larger = more(peaks, "bytes")
    assert more(peaks, "evaluate") < 1.5 * larger < more(peaks, "dequantize") / 3, peaks


def test_the_measurement_sees_what_is_held(peaks: dict[str, list[int]]) -> None:
    """Keeping all packed codes, or all float weights, shows as what it is."""
    assert more(peaks, "hold") > 0.8 * more(peaks, "bytes")
    assert more(peaks, "dequantize") > 5 * more(peaks, "bytes")


IMPORTS = """
import sys
from click.testing import CliRunner
HEAVY = {"torch", "transformers", "numpy", "onnx", "onnx_ir", "onnxruntime", "gguf", "vllm", "compressed_tensors"}
def loaded(): return ",".join(sorted(HEAVY & set(sys.modules)))
from exporters.cli import command
assert "--to" in CliRunner().invoke(command, ["--help"]).output
print(loaded())
for package in ("gptq", "awq", "compressed_tensors", "gguf", "onnx"):
    __import__(f"exporters.{package}")
    print(loaded())
from exporters.onnx import trace
print(loaded())
"""


def test_a_format_loads_what_it_needs() -> None:
    """--help loads no array library at all, a format's package its own library only; torch comes with the tensors."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True, timeout=300)
    helped, gptq, awq, packed, gguf, onnx, traced = done.stdout.splitlines()
    assert (helped, gptq, awq, packed) == ("", "numpy", "numpy", "numpy")
    assert (gguf, onnx) == ("gguf,numpy", "gguf,numpy,onnx,onnx_ir")
    assert "torch" in traced  # the list does see what is loaded
