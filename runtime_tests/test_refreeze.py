"""l4q-freeze: any saved step, another grid by snap and recode, and figures that are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from l4q.checkpoint import L4QCheckpoint
from l4q.cli_refreeze import command, format_result
from l4q.config import QuantConfig
from l4q.errors import UsageError
from l4q.linear import L4QLinear
from l4q.model import l4q_layers, load_trainable_state
from l4q.refreeze import FreezeOptions, refreeze, regrid_model
from l4q.state_tensors import saved_tensors
from l4q.train import train
from l4q.train_model import load_model, wrap_model
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions
from l4q.train_state import TRAINABLE, state_folder
from runtime_tests.test_linear import clipped_layer
from runtime_tests.train_runs import base_options


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A finished run with float zero-points, a LoRA warm-up of 4 steps, and offsets that have moved far."""
    made = replace(
        base_options(glassllm_dir, tmp_path_factory.mktemp("runs")),
        quant=QuantConfig(bits=3, group_size=32, zero_point="float"),
        init="asymm",
        optim=OptimOptions(offset_lr=3e-3),
        lora_warmup_steps=4,
        steps=8,
        save_every=2,
    )
    train(made)
    return made


def trained_model(made: TrainOptions, step: int) -> Any:
    """The run's model with the state of a step."""
    model, _ = load_model(made)
    wrap_model(model, made)
    load_trainable_state(model, saved_tensors(state_folder(made.out, step) / TRAINABLE))
    return model


def same_files(left: Path, right: Path) -> bool:
    """Whether two checkpoints have the same names and bytes."""
    names = [{path.name for path in folder.iterdir()} for folder in (left, right)]
    return names[0] == names[1] and all((left / name).read_bytes() == (right / name).read_bytes() for name in names[0])


def test_newest_step_is_the_runs_checkpoint(base: TrainOptions, tmp_path: Path) -> None:
    """Without options the folder is RUN/checkpoint again, byte for byte."""
    result = refreeze(FreezeOptions(run=base.out, out=tmp_path / "again"))
    assert (result["step"], result["weight_loss"], result["perplexity"]) == (8, [], {})
    assert same_files(tmp_path / "again", base.out / "checkpoint")


def test_any_saved_step(base: TrainOptions, tmp_path: Path) -> None:
    """An earlier step gives that step's weights bit for bit, which are not the last step's."""
    refreeze(FreezeOptions(run=base.out, out=tmp_path / "six", step=6))
    frozen, last = L4QCheckpoint.open(tmp_path / "six"), L4QCheckpoint.open(base.out / "checkpoint")
    for name, layer in l4q_layers(trained_model(base, 6)):
        values = frozen.quantized(name).dequantize()
        assert np.array_equal(values.view(np.uint32), layer.quantized_weight().numpy().view(np.uint32))
        assert not np.array_equal(values, last.quantized(name).dequantize())


@pytest.mark.parametrize("step", [2, 4])
def test_step_of_the_warmup(base: TrainOptions, tmp_path: Path, step: int) -> None:
    """A state of the LoRA warm-up is frozen as the next step would begin: on a grid of its merged weights."""
    refreeze(FreezeOptions(run=base.out, out=tmp_path / "early", step=step))
    frozen = L4QCheckpoint.open(tmp_path / "early")
    for name, layer in l4q_layers(trained_model(base, step)):
        stale = layer.quantized_weight().numpy()
        layer.start_quantization()
        assert np.array_equal(frozen.quantized(name).dequantize(), layer.quantized_weight().numpy())
        assert not np.array_equal(frozen.quantized(name).dequantize(), stale)


def expected_recoding(layer: L4QLinear, quant: QuantConfig) -> tuple[np.ndarray, np.ndarray]:
    """METHOD's snap and recode in numpy: z' = round(-m / s'), codes = clamp(round(W / s' + z')); also z'."""
    params = layer.grid()
    merged = (layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A).detach().double().numpy()  # type: ignore[operator]
    scales = params.scales.detach().double().numpy()
    if quant.scale_grid == "fp16_s7":
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.round(mantissa * 128) / 128, exponent)
    offsets = params.mins.detach().double().numpy() + quant.midpoint * params.scales.detach().double().numpy()
    zeros = np.clip(np.round(quant.midpoint - offsets / scales), 1, quant.max_code)
    groups = merged.reshape(*scales.shape, -1)
    codes = np.clip(np.round(groups / scales[..., None] + zeros[..., None]), 0, quant.max_code)
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(merged.shape), zeros


def test_float_onto_integer_is_snap_and_recode(base: TrainOptions, tmp_path: Path) -> None:
    """The re-frozen weights are those of the equations, on integer zero-points and 7-bit scales, in the files."""
    result = refreeze(FreezeOptions(run=base.out, out=tmp_path / "integer", zero_point="integer"))
    frozen = L4QCheckpoint.open(tmp_path / "integer")
    assert frozen.quant == QuantConfig(bits=3, group_size=32, zero_point="integer", scale_grid="fp16_s7")
    assert result["grid"]["frozen"] == frozen.quant.to_dict()
    differing, zeros_seen = 0, set()
    for name, layer in l4q_layers(trained_model(base, 8)):
        expected, zeros = expected_recoding(layer, frozen.quant)
        weight = frozen.quantized(name)
        assert weight.zeros is not None
        assert np.array_equal(weight.zeros, zeros)
        zeros_seen |= set(zeros.ravel().tolist())
        step = np.repeat(weight.scales.astype(np.float32), 32, axis=1)
        away = np.abs(weight.dequantize() - expected)
        assert np.all(away <= step * 1.001)
        differing += int((away > step / 2).sum())  # a tie may fall either way in another precision
    assert len(zeros_seen) > 2
    assert differing <= 3


@torch.no_grad()
def test_recoding_beats_rounding_the_offsets(base: TrainOptions) -> None:
    """Recoded weights are closer to W0 + scaling B A than the trained codes on snapped offsets."""
    quant = QuantConfig(bits=3, group_size=32, zero_point="integer")
    recoded, kept, merged_size = 0.0, 0.0, 0.0
    for _, layer in l4q_layers(trained_model(base, 8)):
        merged = (layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A).detach()  # type: ignore[operator]
        codes = torch.from_numpy(layer.freeze().codes).float().view(*layer.scales.shape, -1)
        layer.regrid(quant)
        params = layer.grid()
        kept_weight = ((codes - params.zeros.unsqueeze(-1)) * params.scales.unsqueeze(-1)).view_as(merged)
        recoded += float((layer.quantized_weight() - merged).square().sum())
        kept += float((kept_weight - merged).square().sum())
        merged_size += float(merged.square().sum())
    assert recoded < 0.9 * kept
    assert recoded < 0.3**2 * merged_size


@pytest.mark.parametrize("source", ["none", "integer", "float"])
@pytest.mark.parametrize("target", ["none", "integer", "float"])
def test_regrid_freezes_exactly(source: Any, target: Any) -> None:
    """After a change of grid, dequantize(freeze(layer)) is the forward's weight bit for bit, of the new kind."""
    layer = clipped_layer(4, source, dtype=torch.float32)
    before = layer.quantized_weight()
    layer.regrid(QuantConfig(bits=4, group_size=32, zero_point=target))
    frozen = layer.freeze()
    assert frozen.zero_point == target
    values = frozen.dequantize()
    assert torch.equal(layer(torch.eye(64)).T, torch.from_numpy(values))
    kept = torch.equal(before, torch.from_numpy(values))
    # Nothing is lost where the new grid holds the old one: itself, and float offsets of what has 7-bit scales.
    assert kept is (
        source == target or (source, target) == ("integer", "float") or (source, target) == ("none", "float")
    )
    frozen.codes[3, 5] ^= 1
    assert not torch.equal(layer(torch.eye(64)).T, torch.from_numpy(frozen.dequantize()))


def test_bits_cannot_change() -> None:
    """A trained grid keeps its bits and group size; the error says so."""
    with pytest.raises(UsageError, match=r"(?s)cannot change.*3 bits.*4 bits"):
        clipped_layer(4, "none").regrid(QuantConfig(bits=3, group_size=32))


def test_weight_losses_are_relative_rms() -> None:
    """Each figure is the RMS computed from the weights themselves; overall pools all layers' squares."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(clipped_layer(4, "float", seed=1), clipped_layer(4, "float", seed=2)).float()
    merged, before, after = [], [], []
    for _, layer in l4q_layers(model):
        merged.append((layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A).detach().ravel())  # type: ignore[operator]
        before.append(layer.quantized_weight().ravel())
    losses = regrid_model(model, lambda grid: QuantConfig(bits=4, group_size=32, zero_point="integer"))
    after = [layer.quantized_weight().ravel() for _, layer in l4q_layers(model)]
    pools = [*zip(merged, before, after, strict=True), tuple(torch.cat(part) for part in (merged, before, after))]
    assert [loss.name for loss in losses] == ["0", "1", "overall"]
    for loss, (w, old, new) in zip(losses, pools, strict=True):
        assert loss.trained == pytest.approx(float((old - w).norm() / w.norm()), rel=1e-5)
        assert loss.frozen == pytest.approx(float((new - w).norm() / w.norm()), rel=1e-5)
        assert loss.change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        assert loss.change > 0


def test_command_prints_weight_error_and_perplexity(base: TrainOptions, glassllm_dir: Path, tmp_path: Path) -> None:
    """The command's table has every layer, overall and both perplexities; the frozen one is the checkpoint's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from l4q.evaluate import text_windows, windows_perplexity

    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    arguments = [str(base.out), "--out", str(tmp_path / "int"), "--zero-point", "integer", "--json"]
    arguments += ["--eval-text", str(text), "--eval-windows", "3"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    lines = [line.split() for line in format_result(result).splitlines()]
    rows = {line[0]: line[1:] for line in lines if line[0].startswith(("model.", "overall"))}
    assert len(rows) == 24 + 1
    for loss in result["weight_loss"]:
        assert rows[loss["name"]] == [f"{loss[key]:.5f}" for key in ("trained", "frozen", "change")]
    assert ["perplexity,", "frozen", f"{result['perplexity']['frozen']:.4f}"] in lines
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "int")
    measured = windows_perplexity(model, text_windows(tokenizer, text.read_text(encoding="utf-8"), 128, 3)).value
    assert measured == pytest.approx(result["perplexity"]["frozen"], rel=1e-5)
    assert measured != pytest.approx(result["perplexity"]["trained"], rel=1e-5)


def test_bad_requests_write_nothing(base: TrainOptions, tmp_path: Path) -> None:
    """No run, no such step, a damaged state, an existing folder, a lost base model: one error each, and no folder."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"(?s)no run of l4q-train.*not its checkpoint"):
        refreeze(FreezeOptions(run=base.out / "checkpoint", out=out))
    with pytest.raises(UsageError, match=r"(?s)no such state.*step 5.*\[2, 4, 6, 8\].*--save-every"):
        refreeze(FreezeOptions(run=base.out, out=out, step=5))
    with pytest.raises(UsageError, match="model folder does not exist"):
        refreeze(FreezeOptions(run=base.out, out=out, model="/no/such/model"))
    with pytest.raises(UsageError, match="already exists"):
        refreeze(FreezeOptions(run=base.out, out=base.out / "checkpoint"))
    with pytest.raises(UsageError, match="evaluation text cannot be read"):
        refreeze(FreezeOptions(run=base.out, out=out, evaluation=EvalOptions(text=tmp_path / "none.txt")))
    state = state_folder(base.out, 2) / TRAINABLE
    whole = state.read_bytes()
    try:
        state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UsageError, match=r"(?s)damaged.*step 2"):
            refreeze(FreezeOptions(run=base.out, out=out, step=2))
    finally:
        state.write_bytes(whole)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"), [(["--help"], 0, ""), (["/no/such/run", "--out", "x"], 2, "/no/such/run")]
)
def test_help_and_usage_errors_are_light(arguments: list[str], code: int, message: str) -> None:
    """`l4q freeze` explains itself and refuses a missing folder without importing torch."""
    program = (
        "import atexit, sys; from l4q.cli import main; atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "freeze", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.endswith("False\n")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
