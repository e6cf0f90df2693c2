"""Refusals that no other test reaches: damaged GPTQ folders, formats and packages that are missing, saved states."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.card import update_parity
from exporters.driver import EXPORTERS, export, get_exporter, make_plan
from exporters.inspect.facts import Grids
from exporters.inspect.runtimes import of_folder
from exporters.inspect.show import _code_rows
from exporters.plan import ExportOptions
from exporters.verify import compare_bits, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import PeerError, UsageError, VerificationError
from l4q.optim import Bf16AdamW
from l4q.train_state import load_optimizer, load_rng, save_optimizer, save_rng
from runtime_tests.hf_exports import edit_config
from runtime_tests.tiny_llama import tiny_checkpoint

MODULE = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[L4QCheckpoint, Path]:
    """A checkpoint and its GPTQ export; tests copy it before they damage it."""
    base = tmp_path_factory.mktemp("gptq")
    checkpoint = tiny_checkpoint(base, QuantConfig(group_size=32), num_hidden_layers=1)
    return checkpoint, export(checkpoint, "gptq", base / "out").folder


def without(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Drop a tensor of MODULE."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{MODULE}.{suffix}"]

    return drop


def half_the_scales(tensors: dict[str, torch.Tensor]) -> None:
    """Drop half of MODULE's groups."""
    name = f"{MODULE}.scales"
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("qzeros"), rf"(?s)a quantized module is incomplete.*where: {MODULE}.*qzeros"),
        (half_the_scales, rf"(?s)the tensors of a module disagree in shape.*where: {MODULE}.*got: .*expected: "),
    ],
)
def test_damaged_gptq_tensors_are_named(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, gptq: tuple[L4QCheckpoint, Path], tmp_path: Path
) -> None:
    """A missing or short tensor is a failed verification that names the module, not an exception of a decoder."""
    checkpoint, folder = gptq
    copied = copy(folder, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    damage(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=message):
        verify(checkpoint, get_exporter("gptq"), copied)


def test_a_rule_that_calls_a_packed_module_dense(gptq: tuple[L4QCheckpoint, Path], tmp_path: Path) -> None:
    """A `dynamic` rule that skips a quantized module is found, as GPTQModel would read the module as dense."""
    copied = copy(gptq[1], tmp_path / "copy")
    edit_config(lambda section: section.update(dynamic={f"-:^{MODULE}$": {}}))(copied)
    (copied / "quantize_config.json").unlink()
    with pytest.raises(VerificationError, match=r"(?s)dynamic rules say that a quantized module is dense.*k_proj"):
        verify(gptq[0], get_exporter("gptq"), copied)


def test_short_awq_tensors_are_named(tmp_path: Path) -> None:
    """AWQ tensors that contradict each other in shape are refused by name."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32), num_hidden_layers=1)
    folder = export(checkpoint, "awq", tmp_path / "out").folder
    tensors = load_file(folder / "model.safetensors")
    half_the_scales(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"(?s)the tensors of a module disagree in shape.*k_proj"):
        verify(checkpoint, get_exporter("awq"), folder)


def copy(folder: Path, target: Path) -> Path:
    """A copy of an export, one level of files."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_comparisons_name_what_differs() -> None:
    """Another dtype or shape is no equality, and neither is another sign of zero."""
    zeros = np.zeros((2, 3), dtype=np.float32)
    assert compare_bits(zeros, zeros.copy()) is None
    wide: Any = zeros.astype(np.float64)
    assert compare_bits(wide, zeros) == "decoded float64 (2, 3), expected float32 (2, 3)"
    assert compare_bits(zeros[:1], zeros) == "decoded float32 (1, 3), expected float32 (2, 3)"
    signed = zeros.copy()
    signed[1, 2] = -0.0
    assert "1 of 6 weights differ, first at [1, 2]" in str(compare_bits(signed, zeros))


def test_a_module_too_many_fails(gptq: tuple[L4QCheckpoint, Path], tmp_path: Path) -> None:
    """A quantized module that the checkpoint does not have is reported, although all others are exact."""
    checkpoint, folder = gptq
    copied = copy(folder, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    extra = {name.replace("k_proj", "x_proj"): t.clone() for name, t in tensors.items() if MODULE in name}
    save_file({**tensors, **extra}, copied / "model.safetensors", metadata={"format": "pt"})
    report = verify(checkpoint, get_exporter("gptq"), copied)
    assert (report.exact, report.passed) == (report.total, False)
    assert "x_proj: not a quantized module of the checkpoint" in report.differing[0]


def test_formats_and_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unknown format lists the known ones; a format whose package is absent says what to install."""
    with pytest.raises(UsageError, match=r"(?s)unknown export format.*got: exl2.*'awq', 'compressed-tensors'"):
        get_exporter("exl2")
    monkeypatch.setitem(EXPORTERS, "awq", "no_such_package_of_ours")
    with pytest.raises(UsageError, match=r"(?s)needs a package that is not installed.*no_such.*'l4q\[awq\]'"):
        get_exporter("awq")
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(), num_hidden_layers=1)

    class Late:
        @staticmethod
        def plan(*_: object) -> None:
            raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    monkeypatch.setattr("exporters.driver.get_exporter", lambda name: Late)
    with pytest.raises(UsageError, match=r"(?s)got: onnx_ir.*'l4q\[onnx\]'"):
        make_plan(checkpoint, "onnx", ExportOptions())


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("rank", True), ("dropout", 1.0), ("dropout", -0.1), ("target_modules", ())]
)
def test_lora_options_out_of_range(field: str, value: Any) -> None:
    """Each field is refused by name with what it takes."""
    with pytest.raises(UsageError, match=rf"(?s){field}.*got: .*expected: "):
        LoraConfig(**{field: value})


def test_small_facts(tmp_path: Path) -> None:
    """Folders without a card, what runs 2-bit GPTQ and plain folders, codes in runs, and a peer's exit code."""
    assert update_parity(tmp_path, "table") is False
    assert [r.runtime for r in of_folder("safetensors", Grids()) if r.loads] == ["transformers", "vLLM", "l4q-train"]
    refused = of_folder("gptq", Grids(bits={2: 1}, kinds={"none": 1}))[0]
    assert (refused.loads, refused.reason) == (False, "refuses GPTQ of 2 or 3 bits")
    rows = _code_rows(list(range(256)))
    assert sum(many for _, many in rows) == sum(range(256))
    assert rows[0][0].startswith("0-")
    assert PeerError(4).exit_code == 4


def optimizer_of(*sizes: int) -> tuple[Bf16AdamW, dict[torch.Tensor, str]]:
    """An optimizer over parameters of these sizes, and their names."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    names: dict[torch.Tensor, str] = {parameter: f"p{index}" for index, parameter in enumerate(parameters)}
    return Bf16AdamW(parameters, lr=0.1), names


def test_a_closure_and_a_parameter_without_gradient() -> None:
    """`step(closure)` returns the loss as torch's optimizers do; what has no gradient keeps its value."""
    optimizer, names = optimizer_of(3, 2)
    used, unused = names

    def closure() -> torch.Tensor:
        loss = (used * 2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 6.0
    assert bool((used < 1).all())
    assert torch.equal(unused, torch.ones(2))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Resuming with another model or another order of parameters is named before anything is loaded."""
    optimizer, names = optimizer_of(3, 2)
    save_optimizer(tmp_path, optimizer, names)
    other, _ = optimizer_of(3, 2, 1)
    more = {p: f"p{i}" for i, p in enumerate(other.param_groups[0]["params"])}
    with pytest.raises(UsageError, match=r"(?s)saved optimizer belongs to other parameters.*got: \['p2'\]"):
        load_optimizer(tmp_path, other, more)
    swapped = dict(zip(names, ("p1", "p0"), strict=True))
    with pytest.raises(UsageError, match="the same parameters in another order"):
        load_optimizer(tmp_path, optimizer, swapped)


def test_generators_of_a_process_that_was_not_there(tmp_path: Path) -> None:
    """A state of one process gives process 0 its random numbers again and refuses process 1."""
    save_rng(tmp_path, 0)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    load_rng(tmp_path, 0)
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == expected
    with pytest.raises(UsageError, match=r"(?s)saved by fewer processes.*no generator state for process 1"):
        load_rng(tmp_path, 1)
