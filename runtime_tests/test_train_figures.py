"""What a run measures on the way: held-out perplexity and the grid's movements, also after a resume, and reporters."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoModelForCausalLM

from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.grid_watch import ROWS
from l4q.model import l4q_layers, load_trainable_state, wrap_linears
from l4q.train import train
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions
from runtime_tests.train_runs import base_options, final_weights, metrics, rewind, same_bits

Options = Callable[..., TrainOptions]
STEPS = 6


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A short run whose zero-points move, with every step saved, from a start that needs no data to be made again."""
    options = base_options(glassllm_dir, tmp_path_factory.mktemp("figures"))
    optim = OptimOptions(lr=2e-3, scale_lr=5e-4, offset_lr=5e-3, warmup_ratio=0.0)
    return replace(options, init="l4q", steps=STEPS, save_every=1, grad_accum=1, optim=optim)


@pytest.fixture(scope="module")
def watched(base: TrainOptions, glassllm_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a run that measures every fourth step and reports to TensorBoard."""
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    evaluation = EvalOptions(text=text, window=64, windows=2, every=4)
    result = train(replace(base, evaluation=evaluation, report_to=("tensorboard",)))
    return base.out, result


@pytest.fixture
def options(base: TrainOptions, tmp_path: Path) -> Options:
    """The same options without an evaluation, for a folder of the test's own."""

    def make(**changes: Any) -> TrainOptions:
        return replace(base, **{"out": tmp_path / "run", **changes})

    return make


def test_held_out_perplexity(watched: tuple[Path, dict[str, Any]], options: Options) -> None:
    """It stands at the steps asked for and the last one, ends as the result says, and training does not notice it."""
    run, result = watched
    lines = metrics(run)
    held_out = {line["step"]: line["held_out_perplexity"] for line in lines if "held_out_perplexity" in line}
    assert set(held_out) == {4, STEPS}
    assert held_out[STEPS] == result["perplexity"]["trained"]
    assert held_out[4] != held_out[STEPS]
    train(options())
    assert same_bits(final_weights(run), final_weights(options().out))
    assert not any("held_out_perplexity" in line for line in metrics(options().out))


def saved_models(glassllm_dir: Path, run: Path, steps: list[int]) -> Iterator[Any]:
    """The wrapped model as it was after some steps; 0 is the start."""
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    wrap_linears(model, QuantConfig(zero_point="integer"), LoraConfig(rank=4), skip_indivisible=True)
    for step in steps:
        if step:
            load_trainable_state(model, load_file(run / f"state-{step}/trainable.safetensors"))
        yield model


def sampled(values: np.ndarray) -> np.ndarray:
    """The rows that are looked at."""
    return values[:: max(1, len(values) // ROWS)]


def test_grid_figures_are_those_of_the_saved_states(watched: tuple[Path, dict[str, Any]], glassllm_dir: Path) -> None:
    """Drift, clipped share and zero-point moves agree with NumPy on saved states and frozen integers."""
    run, _ = watched
    scales, zeros, beyond = [], [], []
    for model in saved_models(glassllm_dir, run, [0, STEPS - 1, STEPS]):
        layers = dict(l4q_layers(model))
        scales.append(np.concatenate([sampled(layer.scales.detach().numpy()).ravel() for layer in layers.values()]))
        frozen = {name: layer.freeze() for name, layer in layers.items()}
        zeros.append(np.concatenate([sampled(weight.integer_zeros()).ravel() for weight in frozen.values()]))
        beyond.append(np.concatenate([positions(layers[name], frozen[name]).ravel() for name in layers]))
    line = metrics(run)[STEPS - 1]
    drift = np.abs(scales[-1].astype(np.float64) / scales[0] - 1).mean()
    assert line["scale_drift"] == pytest.approx(drift, rel=1e-4)
    assert line["zero_point_moves"] == np.mean(zeros[-1] != zeros[-2])
    assert line["zero_point_moves"] > 0
    clipped = np.mean((beyond[-1] < 0) | (beyond[-1] > 15))
    assert line["clipped"] == pytest.approx(clipped, abs=2e-4)  # weights at the very end of the grid
    assert 0.001 < line["clipped"] < 0.5
    # The twin: an earlier state gives other figures.
    assert line["scale_drift"] != pytest.approx(np.abs(scales[1].astype(np.float64) / scales[0] - 1).mean(), rel=1e-3)
    assert line["clipped"] != pytest.approx(np.mean((beyond[0] < 0) | (beyond[0] > 15)), abs=5e-4)


def positions(layer: Any, frozen: Any) -> np.ndarray:
    """W / s + z of the sampled rows, in float64, from A, B and the frozen scales and zero-points."""
    update = layer.lora.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    merged = sampled((layer.weight.detach().double() + update).numpy())
    grouped = merged.reshape(len(merged), frozen.groups, -1)
    return grouped / sampled(frozen.scales)[:, :, None].astype(np.float64) + sampled(frozen.integer_zeros())[:, :, None]


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_resumed_run_has_the_same_figures(options: Options, tmp_path: Path, warmup: int) -> None:
    """A run resumed at step 4 has every step once, and the grid's figures of the run that was not interrupted."""
    whole = options(lora_warmup_steps=warmup)
    train(whole)
    resumed = rewind(whole.out, tmp_path / "resumed", 4)
    train(replace(whole, out=resumed, resume=True))
    names = ("step", "loss", "scale_drift", "clipped", "zero_point_moves")
    before, after = (
        [{name: line.get(name) for name in names} for line in metrics(run)] for run in (whole.out, resumed)
    )
    assert [line["step"] for line in after] == list(range(1, STEPS + 1))
    assert after == before
    assert [line["scale_drift"] is None for line in after] == [step <= warmup for step in range(1, STEPS + 1)]
    older = rewind(whole.out, tmp_path / "older", STEPS - 1)  # as if started by a version without these figures
    (older / "grid-start.safetensors").unlink()
    train(replace(whole, out=older, resume=True))
    assert "scale_drift" not in metrics(older)[-1]


def test_symmetric_grids_have_no_zero_point_moves(options: Options) -> None:
    """Without trained zero-points their figure is absent, the others are there."""
    train(options(quant=QuantConfig(zero_point="none"), steps=2))
    line = metrics(options().out)[-1]
    assert "zero_point_moves" not in line
    assert line["scale_drift"] > 0
    assert line["clipped"] > 0


def events(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars of TensorBoard's files in a folder, by tag and step, read with the format's own messages."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_gets_the_figures(watched: tuple[Path, dict[str, Any]]) -> None:
    """RUN/tensorboard holds loss, held-out perplexity and the grid's figures of metrics.jsonl, step by step."""
    run, _ = watched
    found = events(run / "tensorboard")
    for name in ("loss", "grad_norm", "held_out_perplexity", "scale_drift", "clipped", "zero_point_moves"):
        expected = {line["step"]: line[name] for line in metrics(run) if name in line}
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name


def test_missing_reporters_are_named_at_once(options: Options) -> None:
    """A reporter whose package is not installed is refused before anything is loaded or written."""
    with pytest.raises(
        UsageError, match=r"(?s)--report-to needs.*--report-to wandb.*expected: wandb.*pip install wandb"
    ):
        train(options(report_to=("wandb",)))
    assert not options().out.exists()
    with pytest.raises(UsageError, match=r"(?s)report_to.*carrier pigeon.*tensorboard.*wandb"):
        options(report_to=("carrier pigeon",))


@pytest.mark.parametrize("evaluation", [{"every": 5}, {"every": 0, "text": Path("t")}])
def test_evaluation_needs_a_text_and_steps(evaluation: dict[str, Any]) -> None:
    """--eval-every without a text, or of no steps, is refused."""
    with pytest.raises(UsageError, match=r"(?s)unsupported value.*eval_every"):
        EvalOptions(**evaluation)


def test_autocast_is_taken_off_for_evaluations() -> None:
    """A forward that accelerate wrapped is replaced by the plain one inside, and is back afterwards."""
    from l4q.train_callbacks import without_autocast

    model: Any = torch.nn.Linear(2, 2)
    original = model.forward
    model._original_forward, model.forward = original, lambda x: original(x) + 1
    with torch.no_grad():
        wrapped = model(torch.ones(2))
        with without_autocast(model):
            plain = model(torch.ones(2))
        again = model(torch.ones(2))
    assert torch.equal(plain + 1, wrapped)
    assert torch.equal(again, wrapped)
