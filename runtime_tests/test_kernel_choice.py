"""Which kernels are used: the fastest that reproduce torch, the ones asked for, or a clear refusal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from l4q.cli_train import command as train_command
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import L4QError, UnsupportedError, UsageError, VerificationError
from l4q.kernels import select
from l4q.kernels.fused import FusedKernels
from l4q.kernels.select import kernels_for
from l4q.linear import L4QLinear
from l4q.model import wrap_linears
from l4q.refreeze import FreezeOptions, recorded_options
from runtime_tests.conftest import ASSETS
from runtime_tests.kernel_runs import Broken
from runtime_tests.train_runs import base_options
from tools.bench_cases import CASES
from tools.bench_kernels import command as bench_command
from tools.bench_steps import measure


def forget() -> None:
    """Drop the remembered choices."""
    kernels_for.cache_clear()
    select.require_kernels.cache_clear()


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """No remembered choice, before and after."""
    forget()
    yield
    forget()


def test_auto_takes_the_fastest() -> None:
    """float32 on a CPU is Numba's; other dtypes and devices, and a compiled model, are left to torch."""
    assert kernels_for("auto", "cpu").name == "numba"
    assert kernels_for("auto", "cpu", torch.float64).name == "eager"
    assert kernels_for("auto", "meta").name == "eager"
    layer = L4QLinear.from_linear(nn.Linear(64, 32), QuantConfig(), LoraConfig(rank=2))
    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.usefixtures("fresh_choice")
def test_wrong_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that differ from torch on this machine: auto warns and goes on without them, a choice of them stops."""
    monkeypatch.setattr(select, "load", lambda _name: FusedKernels(Broken("mask")))
    with caplog.at_level(logging.WARNING, logger="l4q"):
        assert kernels_for("auto", "cpu").name == "eager"
    assert "the numba kernels are not used, because on this machine the gradient of a is off" in caplog.text
    with pytest.raises(VerificationError, match="do not reproduce torch"):
        kernels_for("numba", "cpu")


@pytest.mark.usefixtures("fresh_choice")
def test_kernels_that_fail_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that is installed but broken costs speed, not the run; asked for by name it stops with its error."""
    failures: list[Exception] = [OSError("no C compiler"), ImportError("numba needs NumPy 2.4 or less")]

    def fail(_name: str) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(select, "load", fail)
    with caplog.at_level(logging.WARNING, logger="l4q"):
        assert kernels_for("auto", "cpu").name == "eager"
    assert "they fail: OSError: no C compiler" in caplog.text
    with pytest.raises(ImportError, match="needs NumPy"):
        kernels_for("numba", "cpu")


@pytest.mark.usefixtures("fresh_choice")
def test_refused_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do not exist, are not installed, or do not run on the device are refused with the way out."""
    with pytest.raises(UnsupportedError, match="float32 on cpu"):
        kernels_for("numba", "cuda")
    with pytest.raises(UnsupportedError, match="float64 on cpu"):
        kernels_for("numba", "cpu", torch.float64)
    with pytest.raises(UsageError, match=r"one of .*eager.*numba"):
        wrap_linears(nn.Sequential(nn.Linear(64, 64)), QuantConfig(), LoraConfig(), kernels="fast")  # type: ignore[arg-type]
    forget()
    monkeypatch.setattr(select, "installed", lambda _name: False)
    assert kernels_for("auto", "cpu").name == "eager"
    with pytest.raises(UsageError, match=r"(?s)the kernels need a package that is not installed.*'l4q\[cuda\]'"):
        L4QLinear.from_linear(nn.Linear(64, 32), QuantConfig(), LoraConfig(), kernels="triton")


def test_kernels_option(glassllm_dir: Path, tmp_path: Path) -> None:
    """--kernels reaches the options, is refused where unknown, and does not decide whether a run can be resumed."""
    options = base_options(glassllm_dir, tmp_path)
    assert options.kernels == "auto"
    assert replace(options, kernels="eager").identity() == options.identity()
    with pytest.raises(UsageError, match="kernels"):
        replace(options, kernels="fast")  # type: ignore[arg-type]
    arguments = [str(glassllm_dir), "--data", str(options.data[0]), "--out", str(tmp_path / "run"), "--kernels"]
    assert train_command.make_context("train", [*arguments, "numba"]).params["kernels"] == "numba"
    refused = CliRunner().invoke(train_command, [*arguments, "fast"])
    assert refused.exit_code == 2
    assert "'fast' is not one of 'auto', 'eager', 'numba', 'triton'" in refused.output


def test_a_run_can_be_frozen_without_its_kernels(tmp_path: Path, glassllm_dir: Path) -> None:
    """l4q-freeze does not insist on the kernels of the run, which may have trained on a GPU."""
    options = replace(base_options(glassllm_dir, tmp_path), kernels="triton")
    options.out.mkdir()
    (options.out / "config.json").write_text(json.dumps({"options": options.to_dict()}))
    assert recorded_options(FreezeOptions(run=options.out, out=tmp_path / "frozen")).kernels == "auto"


def test_the_training_benchmark_takes_kernels() -> None:
    """The kernels of a case reach L4Q's layers: those that cannot run stop its first step."""
    case = replace(CASES["quick"][0], length=8, kernels="triton")
    with pytest.raises(L4QError, match="where: kernels"):
        measure("l4q", case, ASSETS)


def test_the_benchmark_checks_and_measures() -> None:
    """tools.bench_kernels ends with the ratios of eager and Numba kernels, all positive."""
    done = CliRunner().invoke(bench_command, ["--device", "cpu", "--tokens", "8", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"eager", "numba"}
    assert set(found["eager"].values()) > {1.0}
    assert all(value > 0 for ratios in found.values() for value in ratios.values())
