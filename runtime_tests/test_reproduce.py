"""The small reproduction compares what it says: baselines by their formulas, models as deployed, blanks where blank."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.evaluate import windows_perplexity
from l4q.model import freeze_model, wrap_linears
from tools.bench_models import QATLoRALinear
from tools.reproduce import command, pending
from tools.reproduction.bench import Workbench
from tools.reproduction.data import Tokens, load_tokens
from tools.reproduction.gptq import gptq_weight
from tools.reproduction.methods import DEPLOYABLE, METHODS, OURS
from tools.reproduction.qa_lora import QALoRALinear, shifted, with_integer_zeros
from tools.reproduction.quantizers import Grid, codes_on, minmax_grid, pack, round_to_nearest, torchao_grid
from tools.reproduction.recipe import MODELS, Cell, plan_cells
from tools.reproduction.tables import Results, Row, gap_closed, headline, markdown

TINY = replace(MODELS["glassllm"], steps=2, batch=2, eval_windows=4, calibration=4)


@pytest.fixture(scope="module")
def tokens(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Real text as token ids, tokenized once."""
    return load_tokens(TINY, glassllm_dir.parent, tmp_path_factory.mktemp("tokens"))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [3, 4])
def test_round_to_nearest_is_torchs_own_fake_quantization(bits: int) -> None:
    """Group by group, our codes on the min-max grid dequantize to torch.fake_quantize_per_channel_affine."""
    weight = seeded(8, 64)
    ours = torch.from_numpy(round_to_nearest(weight, bits, 32).dequantize())
    grid = minmax_grid(weight, bits, 32)
    theirs = torch.fake_quantize_per_channel_affine(
        weight.view(16, 32), grid.scales.flatten(), grid.zeros.flatten().int(), 0, 0, (1 << bits) - 1
    )
    torch.testing.assert_close(ours.view(16, 32), theirs, rtol=0, atol=1e-6)
    moved = Grid(grid.scales, (grid.zeros + 1).clamp(max=(1 << bits) - 1))
    wrong = torch.from_numpy(pack(codes_on(weight, moved, bits), grid, bits, "").dequantize())
    assert not torch.allclose(wrong.view(16, 32), theirs, atol=1e-3)


def test_torchaos_grid_is_symmetric_and_uses_every_code() -> None:
    """Its scale is max|W| / 3.5 at 3 bits and its zero-point the middle code."""
    weight = seeded(4, 32)
    grid = torchao_grid(weight, 3, 32)
    torch.testing.assert_close(grid.scales[:, 0], weight.abs().amax(1) / 3.5, rtol=1e-3, atol=0)
    assert (grid.zeros == 4).all()
    assert set(codes_on(weight, grid, 3).unique().tolist()) <= set(range(8))


def test_gptq_beats_rounding_only_on_the_inputs_it_was_given() -> None:
    """Its output error on correlated inputs is below round-to-nearest's; with another Hessian the advantage is gone."""
    weight, mix = seeded(32, 64), seeded(64, 64, seed=1) @ torch.diag(torch.linspace(3, 0.05, 64))
    x = seeded(512, 64, seed=2) @ mix.T

    def error(quantized: np.ndarray) -> float:
        return float(((weight - torch.from_numpy(quantized)) @ x.T).square().mean())

    plain = error(round_to_nearest(weight, 3, 32).dequantize())
    solved = error(gptq_weight(weight, x.T @ x, 3, 32, "layer").dequantize())
    other = seeded(512, 64, seed=3) @ torch.flip(mix, (0,)).T
    fooled = error(gptq_weight(weight, other.T @ other, 3, 32, "layer").dequantize())
    assert solved < 0.6 * plain
    assert fooled > 1.5 * solved


def test_qa_lora_merges_into_float_zero_points_and_not_into_integer_ones() -> None:
    """The merged float grid gives the trained layer's outputs; rounding its zero-points does not."""
    linear = nn.Linear(64, 16, bias=False)
    weight = round_to_nearest(seeded(16, 64), 4, 32)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.dequantize()))
    layer = QALoRALinear(linear, 2, 4, 1.0)
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * seeded(16, 4, seed=1))
    x = seeded(8, 64, seed=2)
    merged = shifted(weight, layer.shift())
    expected = layer(x).detach()
    torch.testing.assert_close(x @ torch.from_numpy(merged.dequantize()).T, expected, rtol=0, atol=2e-2)
    rounded = with_integer_zeros(merged)
    assert not torch.allclose(x @ torch.from_numpy(rounded.dequantize()).T, expected, atol=0.2)


def test_qat_lora_freezes_what_it_trained_and_its_merge_is_another_function() -> None:
    """Without the branch the integers are the forward's weight; with B A merged they are not."""
    torch.manual_seed(0)
    quant = QuantConfig(bits=3, group_size=32, zero_point="integer")
    layer = QATLoRALinear(nn.Linear(64, 16, bias=False), quant, LoraConfig(rank=4))
    with torch.no_grad():
        layer.lora_B.copy_(0.1 * seeded(16, 4))
        layer.scales.mul_(0.9)
    own = layer.quantized().detach().numpy()
    np.testing.assert_allclose(layer.freeze("a", merged=False).dequantize(), own, rtol=0, atol=1e-6)
    assert not np.allclose(layer.freeze("a", merged=True).dequantize(), own, atol=1e-3)


def test_a_deployed_l4q_model_is_the_trained_one(glassllm_dir: Path, tokens: Tokens) -> None:
    """Perplexity with frozen integers equals that of the model in training, and a doubled scale shows."""
    cell = Cell(method="l4q-integer", bits=3, seed=0)
    bench = Workbench(cell, TINY, tokens, (3,), glassllm_dir.parent, "integer")
    model = bench.load()
    wrap_linears(model, QuantConfig(bits=3, group_size=32, zero_point="integer"), bench.lora, skip_indivisible=True)
    bench.train(model, [p for p in model.parameters() if p.requires_grad])
    trained = windows_perplexity(model, tokens.held_out["wiki_demo"].tolist(), batch_size=2).value
    weights = dict(freeze_model(model))
    deployed = bench.deployed_quantized("L4Q integer", weights)
    assert deployed.perplexity["wiki_demo"] == pytest.approx(trained, rel=1e-6)
    assert 3.0 < deployed.bits_per_weight < 4.5
    name, weight = next(iter(weights.items()))
    broken = {**weights, name: replace(weight, scales=(2 * weight.scales).astype(np.float16))}
    assert bench.deployed_quantized("", broken).perplexity["wiki_demo"] != pytest.approx(trained, rel=1e-4)


def test_calibration_and_steps_share_no_sequence_and_follow_the_seed(tokens: Tokens) -> None:
    """Equal seeds give equal batches in the same order for every method; other seeds others."""
    calibration, steps = tokens.batches(TINY, 0)
    seen = {tuple(row) for batch in calibration for row in batch.tolist()}
    assert not seen & {tuple(row) for batch in steps for row in batch.tolist()}
    assert all(torch.equal(a, b) for a, b in zip(steps, tokens.batches(TINY, 0)[1], strict=True))
    assert not torch.equal(steps[0], tokens.batches(TINY, 1)[1][0])


def test_cells_are_planned_seed_by_seed_and_unknown_methods_refused() -> None:
    """Methods that do not depend on bits or seeds run once."""
    cells = plan_cells(("base", "lora", "l4q-none"), (4, 3), (0, 1))
    assert [cell.name for cell in cells] == [
        "base-all-seed0",
        "lora-all-seed0",
        "l4q-none-4bit-seed0",
        "l4q-none-3bit-seed0",
        "lora-all-seed1",
        "l4q-none-4bit-seed1",
        "l4q-none-3bit-seed1",
    ]
    with pytest.raises(UsageError, match="unknown method"):
        plan_cells(("l5q",), (4,), (0,))
    assert set(DEPLOYABLE) | set(OURS) <= {row for method in METHODS.values() for row in method.rows}


def row(*values: float) -> Row:
    """A row with one headline perplexity per seed."""
    made = Row()
    made.perplexity["wiki_demo"] += values
    return made


def test_the_gap_is_0_at_rounding_and_1_at_lora_and_blanks_stay_blank() -> None:
    """The headline names the best of each side; what was not measured is null in JSON and empty in the table."""
    results: Results = {
        ("round-to-nearest", 3): row(100.0),
        ("16-bit LoRA", 16): row(20.0, 20.0),
        ("L4Q integer", 3): row(28.0, 28.0),
        ("L4Q none", 3): row(36.0),
        ("16-bit LoRA, merged, GPTQ", 3): row(60.0),
        ("GPTQ + LoRA (mixed)", 3): row(21.0),  # not one file: shown, but no contender
    }
    assert gap_closed(results, "round-to-nearest", 3) == 0.0
    assert gap_closed(results, "16-bit LoRA", 3) == 1.0
    found = headline(results, (3, 4))
    assert found["bits3"]["gap_closed"] == pytest.approx(0.9)
    assert found["bits3"]["l4q"] == "L4Q integer"
    assert found["bits3"]["best_baseline_gap_closed"] == pytest.approx(0.5)
    assert found["bits4"]["gap_closed"] is None
    lines = markdown(results, TINY, (3,), (0, 1)).splitlines()
    assert next(line for line in lines if line.startswith("| L4Q float")).split("|")[3].strip() == ""
    assert "28.0 ± 0.0" in next(line for line in lines if line.startswith("| L4Q integer"))


def test_results_of_another_recipe_or_without_resume_are_refused(tmp_path: Path) -> None:
    """A finished cell is skipped only under its own recipe; a torn file is reported, not redone silently."""
    cells = plan_cells(("l4q-none",), (3,), (0,))
    path = tmp_path / "l4q-none-3bit-seed0.json"
    path.write_text(json.dumps({"recipe_key": TINY.key("l4q-none"), "recipe": TINY.to_dict(), "all_bits": [3]}))
    assert pending(cells, tmp_path, TINY, (3,), resume=True) == []
    with pytest.raises(UsageError, match="already holds"):
        pending(cells, tmp_path, TINY, (3,), resume=False)
    with pytest.raises(UsageError, match="another recipe"):
        pending(cells, tmp_path, replace(TINY, steps=3), (3,), resume=True)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        pending(cells, tmp_path, TINY, (3,), resume=True)


def test_a_setting_concerns_the_methods_that_read_it(glassllm_dir: Path, tokens: Tokens) -> None:
    """A moving base changes what L4Q float ends with and asks for that cell again, and for no other."""
    recipe = replace(TINY, reconstruct_settle=1.0)
    moving = replace(recipe, moving_lr=(1e-3, 1e-3))
    changed = [name for name in METHODS if recipe.key(name) != moving.key(name)]
    assert changed == ["l4q-float"]
    found = {}
    for method in ("l4q-float", "l4q-integer"):
        cell, variant = Cell(method=method, bits=3, seed=0), method.removeprefix("l4q-")
        for each in (recipe, moving):
            bench = Workbench(cell, each, tokens, (3,), glassllm_dir.parent, variant)
            found[method, each is moving] = METHODS[method].runner()(bench)[0].perplexity
    assert found["l4q-float", True] != found["l4q-float", False]
    assert found["l4q-integer", True] == found["l4q-integer", False]


def test_the_command_runs_cells_resumes_and_ends_with_json(glassllm_dir: Path, tmp_path: Path) -> None:
    """Two trained cells and the base run in processes of their own; a second run repeats none of them."""
    options = ["--bits", "3", "--seeds", "0", "--steps", "1", "--methods", "base,lora,l4q-integer"]
    options += ["--assets", str(glassllm_dir.parent), "--out", str(tmp_path)]
    first = subprocess.run(
        [sys.executable, "-m", "tools.reproduce", *options], capture_output=True, text=True, check=False
    )
    assert first.returncode == 0, first.stderr
    figures = json.loads(first.stdout.strip().splitlines()[-1])["bits3"]
    assert figures["l4q"] == "L4Q integer"
    assert figures["best_baseline"]
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(made) == 3
    again = CliRunner().invoke(command, [*options, "--resume"])
    assert again.exit_code == 0, again.output
    assert made == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert json.loads(again.stdout.strip().splitlines()[-1])["bits3"] == figures


def test_without_results_the_tables_are_blank_and_the_json_null(tmp_path: Path) -> None:
    """--table-only runs nothing."""
    done = CliRunner().invoke(command, ["--table-only", "--bits", "3", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| L4Q none | yes |  |  |  |" in done.stdout
    assert json.loads(done.stdout.strip().splitlines()[-1])["bits3"]["gap_closed"] is None
    assert not list(tmp_path.iterdir())
