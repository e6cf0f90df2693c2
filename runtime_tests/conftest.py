"""Real models, real text and checkpoints made from them, shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from exporters.judge import JUDGES_VARIABLE
from l4q.config import LoraConfig, QuantConfig
from l4q.model import l4q_layers, save_l4q, wrap_linears
from l4q.train_options import TrainOptions
from runtime_tests.engines.host import JUDGES
from runtime_tests.fault_exports import Exports
from runtime_tests.fault_worker import FaultWorker
from runtime_tests.report_runs import Reports, make_reports
from runtime_tests.train_runs import Options, base_options
from tools.fetch_judges import JUDGES as FOREIGN
from tools.fetch_judges import is_installed

ASSETS = Path(__file__).resolve().parent.parent / "build" / "assets"

# Examples are timed against no clock: a busy machine is not a defect. Failures repeat, because examples are derived.
settings.register_profile("l4q", deadline=None, derandomize=True)
# Every mutant runs the tests of its function: fewer examples each (make mutation).
settings.register_profile("mutation", settings.get_profile("l4q"), max_examples=15)
settings.load_profile("l4q")

# A shell that runs the suite in the background ignores these, and children inherit that: some tests interrupt one.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

CheckpointMaker = Callable[..., Path]


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make assets` first (make test does)")
    return path


@pytest.fixture(scope="session")
def glassllm_dir() -> Path:
    """A real 0.85M-parameter llama with real weights; down_proj has the odd in_features 341."""
    return _asset("glassllm")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in float32."""
    return _asset("smollm2")


@pytest.fixture(scope="session")
def wiki_text() -> str:
    """Held-out Wikipedia articles."""
    return _asset("text/wiki_demo.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def judges() -> Path:
    """Folder of the foreign readers that cannot live in the environment."""
    missing = [name for name in FOREIGN if not is_installed(name, JUDGES)]
    if missing:
        pytest.fail(f"{missing} are missing in {JUDGES}: run `make judges` first (make test does)")
    return JUDGES


@pytest.fixture
def dense_judge(judges: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compressed-tensors that reads dense 3-bit words, made known to the exporters."""
    monkeypatch.setenv(JUDGES_VARIABLE, str(judges / "compressed-tensors"))
    return judges / "compressed-tensors"


@pytest.fixture(scope="module")
def train_base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Options of a short training run with everything random switched on."""
    return base_options(glassllm_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def train_options(train_base: TrainOptions, tmp_path: Path) -> Options:
    """The same options for a folder of the test's own; keywords change them."""

    def make(**changes: Any) -> TrainOptions:
        return replace(train_base, **{"out": tmp_path / "run", **changes})

    return make


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move A, B, s and b as a short training would: no step-0 special case (B = 0, s at the extreme) survives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in l4q_layers(model):
            layer.lora_B.normal_(0, 2e-4, generator=generator)
            layer.scales.mul_(0.9 + 0.15 * torch.rand(layer.scales.shape, generator=generator))
            if layer.offsets.requires_grad:
                noise = torch.randn(layer.offsets.shape, generator=generator)
                layer.offsets.copy_(0.6 * noise * layer.scales)


def make_checkpoint(source: Path, target: Path, **grid: Any) -> Path:
    """Load a model, wrap it, disturb it, freeze it."""
    from transformers import AutoModelForCausalLM

    quant = QuantConfig(**grid)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wrap_linears(model, quant, LoraConfig(rank=4), skip_indivisible=True)
    disturb(model)
    save_l4q(model, target, quant=quant, side_files_from=source)
    return target


def _maker(source: Path, base: Path) -> CheckpointMaker:
    made: dict[str, Path] = {}

    def make(zero_point: str = "none", **grid: Any) -> Path:
        name = "-".join([zero_point, *(f"{key}_{value}" for key, value in sorted(grid.items()))])
        if name not in made:
            made[name] = make_checkpoint(source, base / name, zero_point=zero_point, **grid)
        return made[name]

    return make


@pytest.fixture(scope="session")
def glass_checkpoint(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """Maker of L4Q checkpoints of glassllm, for example ("integer", group_size=32); do not write into them."""
    return _maker(glassllm_dir, tmp_path_factory.mktemp("glass"))


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """As glass_checkpoint, for SmolLM2: 210 quantized linears."""
    return _maker(smollm2_dir, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def reports(glass_checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """l4q-parity's reports on an ONNX export of the checkpoint, and on one of another grid of the same model."""
    text = _asset("text/wiki_demo.txt")
    checkpoints = glass_checkpoint("integer", group_size=32), glass_checkpoint("none", group_size=32)
    return make_reports(*checkpoints, text, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def fault_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultWorker]:
    """A process that forks commands, to be killed at chosen moments."""
    with FaultWorker(tmp_path_factory.mktemp("fault-logs")) as worker:
        yield worker


@pytest.fixture(scope="session")
def exports(fault_worker: FaultWorker, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports of a tiny checkpoint by that process."""
    return Exports(tmp_path_factory.mktemp("fault-exports"), fault_worker)
