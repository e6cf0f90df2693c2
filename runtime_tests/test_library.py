"""Use as a library: the documented names, prepare and freeze, formats of other packages, and the pytest plugin."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import exporters
import l4q
import runtime_tests
from exporters import export, get_exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from l4q.model import l4q_layers
from runtime_tests.conftest import ASSETS, CheckpointMaker
from runtime_tests.report_runs import Reports

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (l4q, exporters, runtime_tests)
CALL = re.compile(r"^\| `([\w.]+)(?:\(([^)]*)\))?` \|", re.MULTILINE)
PROBE = """
import sys; before = set(sys.modules)
import l4q, exporters, runtime_tests, runtime_tests.plugin
heavy = {'torch', 'transformers', 'numpy', 'onnx', 'gguf', 'vllm'} & (set(sys.modules) - before)
assert not heavy, heavy
"""
USER_SUITE = """
CHECKPOINT, TEXT = {source!r}, {text!r}

def test_mine(l4q_parity):
    l4q_parity(CHECKPOINT, {good!r}, text=TEXT, windows=1, window=64)

def test_foreign(l4q_parity):
    l4q_parity(CHECKPOINT, {bad!r}, text=TEXT, windows=1, window=64)
"""
TOY = '''
"""A format of dequantized weights in one npz."""
import numpy as np
from exporters import ExportPlan, Fidelity, PlannedTensor, RuntimeSupport

def plan(checkpoint, options):
    tensors = []
    for module in checkpoint.modules:
        info = checkpoint.info(module)
        shape = (info.out_features, info.in_features)
        tensors.append(PlannedTensor(name=module, target=module, encoding="F32", shape=shape,
                       nbytes=4 * shape[0] * shape[1], fidelity=Fidelity.EXACT, quantized=True))
    numpy = RuntimeSupport(runtime="NumPy", loads=True)
    return ExportPlan(format="toy", tensors=tuple(tensors), runtimes=(numpy,))

def write(checkpoint, plan, folder, options, on_tensor, record):
    weights = {tensor.name: checkpoint.quantized(tensor.name).dequantize() for tensor in plan.tensors}
    SPOIL
    np.savez(folder / "model.npz", **weights)

def read_back(folder, only=None):
    yield from ((name, value) for name, value in np.load(folder / "model.npz").items() if only is None or name in only)

def usage():
    return "numpy.load it."
'''


def install(folder: Path, source: str, *, name: str = "toy", target: str = "toyformat", owner: str = "toy") -> Path:
    """A package with one export format as pip leaves it: a module and its dist-info."""
    folder.mkdir(exist_ok=True)
    (folder / f"{target}.py").write_text(source)
    info = folder / f"{owner}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {owner}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[l4q.exporters]\n{name} = {target}\n")
    return folder


def run_export(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """l4q-export in a process of its own that has the packages in `site`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-c", "from exporters.cli import main; main()", *map(str, arguments)]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=120)


def documented() -> dict[str, str | None]:
    """Dotted name -> parameters, as the tables of docs/api.md state them."""
    return dict(CALL.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")))


def resolve(dotted: str) -> object:
    """The object of a dotted name, whose last part is an attribute of a module."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_documented_names_are_the_public_ones() -> None:
    """docs/api.md lists exactly the packages' __all__ and the entry point group; each exists and is documented."""
    public = {f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}
    assert set(documented()) == public | {"exporters.plugins.GROUP"}
    for dotted in documented():
        found = resolve(dotted)
        assert isinstance(found, str) or inspect.getdoc(found), dotted


def test_documented_parameters_are_the_real_ones() -> None:
    """Every call in docs/api.md has the parameters of the function, in order, with the same ones by keyword only."""
    calls = {dotted: text for dotted, text in documented().items() if text}
    assert {"l4q.prepare", "l4q.freeze", "exporters.export", "runtime_tests.parity"} <= set(calls)
    for dotted, text in calls.items():
        found = resolve(dotted)
        assert callable(found)
        shown: list[str] = []
        for parameter in inspect.signature(found).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
                shown.append("*")
            shown.append(parameter.name)
        assert [word.strip() for word in text.split(",")] == shown, dotted


def test_unknown_attribute() -> None:
    """A name that is not there is an AttributeError that names the package."""
    for package in PACKAGES:
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing


def test_imports_are_light() -> None:
    """The three packages and the pytest plugin load neither torch nor NumPy nor a runtime."""
    subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, check=True, timeout=60)


def test_prepare_and_freeze(glassllm_dir: Path, tmp_path: Path) -> None:
    """prepare wraps, freeze writes what the layers multiply with, on the grid they have; export takes the folder."""
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    with pytest.raises(UsageError, match="the model has no L4Q layers to freeze"):
        l4q.freeze(model, tmp_path / "none")
    report = l4q.prepare(model, l4q.QuantConfig(group_size=32, bits=3), skip_indivisible=True)
    checkpoint = l4q.freeze(model, tmp_path / "checkpoint", side_files_from=glassllm_dir)
    assert checkpoint.quant == l4q.QuantConfig(group_size=32, bits=3)
    assert set(checkpoint.modules) == set(report.wrapped)
    for name, layer in l4q_layers(model):
        assert torch.equal(torch.from_numpy(checkpoint.quantized(name).dequantize()), layer.quantized_weight())
    result = export(tmp_path / "checkpoint", "gguf", tmp_path / "gguf")
    assert result.verified is not None
    assert result.verified.passed


def test_another_package_adds_a_format(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """An installed package's format is offered, exported to and verified; its twin that writes other weights fails."""
    source = glass_checkpoint("none", group_size=32)
    site = install(tmp_path / "site", TOY.replace("SPOIL", "pass"))
    assert re.search(r"\btoy\b", run_export(site, "--help").stdout)
    finished = run_export(site, source, "--to", "toy", "--out", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    total = len(L4QCheckpoint.open(source).modules)
    assert f"{total} of {total}" in (tmp_path / "out" / "toy" / "README.md").read_text()
    liar = install(tmp_path / "liar", TOY.replace("SPOIL", "weights[plan.tensors[3].name][1, 2] += 1"))
    finished = run_export(liar, source, "--to", "toy", "--out", tmp_path / "other")
    assert finished.returncode == 4
    assert f"toy: {total - 1} of {total} modules decode" in finished.stderr
    assert not (tmp_path / "other" / "toy").exists()


def test_broken_packages_give_one_clear_error(
    glass_checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that cannot be imported, lacks a function, or comes twice is an error that names the package."""
    site = install(tmp_path / "site", "raise ValueError('bad day')")
    install(site, "def plan(): pass", name="half", target="halfformat", owner="half")
    for owner in ("one", "two"):
        install(site, TOY, name="twice", target=f"{owner}format", owner=owner)
    finished = run_export(site, glass_checkpoint("none", group_size=32), "--to", "toy", "--out", tmp_path / "out")
    assert finished.returncode == 2
    assert "a package's export format cannot be loaded" in finished.stderr
    assert "ValueError: bad day" in finished.stderr
    assert "uninstall toy 1.0" in finished.stderr
    assert "Traceback" not in finished.stderr
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UsageError, match=r"(?s)export format is incomplete.*no write, read_back, usage"):
        get_exporter("half")
    with pytest.raises(UsageError, match=r"(?s)two packages bring an export format of the same name.*one 1.0, two 1.0"):
        get_exporter("twice")
    with pytest.raises(UsageError, match=r"(?s)unknown export format.*'gptq', 'half', 'onnx', 'toy', 'twice'"):
        get_exporter("floppy")


def test_pytest_fixture(reports: Reports, tmp_path: Path) -> None:
    """In a suite of its own, the fixture passes for the checkpoint's export, and fails with figures for another."""
    base = reports.good.parent
    values = {"source": str(reports.source), "text": str(ASSETS / "text" / "wiki_demo.txt")}
    exports = {"good": str(base / "good-onnx"), "bad": str(base / "bad-onnx")}
    (tmp_path / "test_user.py").write_text(USER_SUITE.format(**values, **exports))
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "pytest", "-p", "runtime_tests.plugin", "-q", "-rfE", str(tmp_path)]
    finished = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert "1 failed, 1 passed" in finished.stdout, finished.stdout
    assert "test_foreign" in finished.stdout
    assert re.search(r"parity failed\s+got: onnx 0: .*tensors bit-exact", finished.stdout)
    assert "Traceback" not in finished.stdout
