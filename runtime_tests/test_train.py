"""Training: it learns, its options reach what they name, and it stops when it must."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.evaluate import text_windows, windows_perplexity
from l4q.model import trainable_state, wrap_linears
from l4q.train import train
from l4q.train_callbacks import DivergedError
from l4q.train_options import EvalOptions, OptimOptions
from l4q.train_state import is_intact, list_states
from l4q.trainer import parameter_groups
from runtime_tests.train_runs import Options, final_weights, metrics


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_training_improves_held_out_text(glassllm_dir: Path, train_options: Options, zero_point: Any) -> None:
    """30 steps of real text lower loss and held-out perplexity, and the checkpoint opens with the trained grid."""
    texts = glassllm_dir.parent / "text"
    quant = QuantConfig(zero_point=zero_point)
    result = train(
        train_options(
            data=(texts / "heldout.txt",),
            quant=quant,
            lora=LoraConfig(),
            steps=30,
            batch_size=1,
            grad_accum=1,
            max_length=128,
            evaluation=EvalOptions(text=texts / "wiki_demo.txt", windows=4),
        )
    )
    assert result["final_loss"] < result["first_loss"]
    assert result["perplexity"]["trained"] < 0.9 * result["perplexity"]["start"]
    checkpoint = L4QCheckpoint.open(result["checkpoint"])
    assert checkpoint.quant == quant
    assert len(checkpoint.modules) == result["quantized_layers"] == 24


def test_checkpoint_evaluates_as_trained(glassllm_dir: Path, train_options: Options) -> None:
    """The frozen folder, loaded by transformers, has the perplexity that the run reported for the trained model."""
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    result = train(train_options(evaluation=EvalOptions(text=text, windows=4)))
    model = AutoModelForCausalLM.from_pretrained(result["checkpoint"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result["checkpoint"])
    windows = text_windows(tokenizer, text.read_text(encoding="utf-8"), 128, 4)
    measured = windows_perplexity(model, windows).value
    assert measured == pytest.approx(result["perplexity"]["trained"], rel=1e-5)
    assert measured != pytest.approx(result["perplexity"]["start"], rel=1e-5)


def test_plain_loop_trains_a_wrapped_model(glassllm_dir: Path) -> None:
    """A wrapped model is an ordinary module: torch's AdamW and a for loop lower its loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    wrap_linears(model, QuantConfig(), LoraConfig(), skip_indivisible=True)
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(glassllm_dir)("The sea was calm and the whale slept. " * 6)["input_ids"]]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_metrics_name_every_rate(train_options: Options) -> None:
    """Each step's line has loss, three learning rates in the given ratio, speed, memory and ETA."""
    train(train_options(optim=OptimOptions(lr=1e-3, scale_lr=1e-4, offset_lr=2e-5)))
    lines = metrics(train_options().out)
    assert [line["step"] for line in lines] == list(range(1, 11))
    peak = lines[1]
    assert (peak["lr_lora"], peak["lr_scales"], peak["lr_offsets"]) == pytest.approx((1e-3, 1e-4, 2e-5))
    assert {"loss", "grad_norm", "tokens", "tokens_per_s", "memory_mb", "elapsed_s", "eta_s"} <= peak.keys()
    assert lines[-1]["eta_s"] == 0


def test_rates_reach_their_own_parameters(train_options: Options, glassllm_dir: Path) -> None:
    """With a rate of zero for LoRA, or for s and b, exactly those parameters stay as they were."""
    train(
        train_options(
            steps=3,
            out=train_options().out / "grid",
            init="l4q",
            optim=OptimOptions(lr=0.0, scale_lr=1e-4, offset_lr=1e-4),
        )
    )
    train(
        train_options(
            steps=3,
            out=train_options().out / "lora",
            init="l4q",
            optim=OptimOptions(lr=1e-3, scale_lr=0.0, offset_lr=0.0),
        )
    )
    grid, lora = (final_weights(train_options().out / name) for name in ("grid", "lora"))
    assert all(not tensor.any() for name, tensor in grid.items() if name.endswith("lora_B"))
    assert all(tensor.any() for name, tensor in lora.items() if name.endswith("lora_B"))
    assert all(not tensor.any() for name, tensor in lora.items() if name.endswith("offsets"))
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    wrap_linears(model, QuantConfig(zero_point="integer"), LoraConfig(), skip_indivisible=True)
    start = {name: tensor for name, tensor in trainable_state(model).items() if name.endswith("scales")}
    assert all(torch.equal(tensor, lora[name]) for name, tensor in start.items())
    assert not any(torch.equal(tensor, grid[name]) for name, tensor in start.items())


def test_weight_decay_spares_the_grid(glassllm_dir: Path) -> None:
    """Only the group of A and B has weight decay; with zero_point none there is no group of offsets."""
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    wrap_linears(model, QuantConfig(), LoraConfig(), skip_indivisible=True)
    groups = parameter_groups(model, OptimOptions(weight_decay=0.5))
    assert {group["name"]: group["weight_decay"] for group in groups} == {"lora": 0.5, "scales": 0.0}
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UsageError, match="norm"):
        parameter_groups(model, OptimOptions())


def test_checkpointing_and_accumulation_keep_the_losses(train_options: Options, tmp_path: Path) -> None:
    """Recomputed activations, and the same batch in smaller parts, give the same losses."""
    plain = {"lora": LoraConfig(rank=4), "steps": 4}
    train(train_options(out=tmp_path / "a", **plain))
    train(train_options(out=tmp_path / "b", gradient_checkpointing=True, **plain))
    train(train_options(out=tmp_path / "c", batch_size=1, grad_accum=4, **plain))
    train(train_options(out=tmp_path / "d", batch_size=1, grad_accum=2, **plain))
    a, b, c, d = ([line["loss"] for line in metrics(tmp_path / name)] for name in "abcd")
    assert b == pytest.approx(a, rel=1e-5)
    assert c == pytest.approx(a, rel=1e-4)
    assert d != pytest.approx(a, rel=1e-2)


def test_bfloat16_base_trains(train_options: Options) -> None:
    """A bfloat16 model trains with float32 A, B, s and b."""
    result = train(train_options(dtype="bfloat16"))
    assert result["final_loss"] > 0
    assert {tensor.dtype for tensor in final_weights(train_options().out).values()} == {torch.float32}


def test_absurd_rate_stops_and_keeps_good_states(train_options: Options) -> None:
    """A diverging run ends with one clear error; what is on disk is intact and finite, and not frozen."""
    with pytest.raises(DivergedError, match=r"(?s)diverged at step \d+.*lower --lr.*last good state"):
        train(train_options(optim=OptimOptions(lr=1e30, max_grad_norm=0), save_every=1))
    states = list_states(train_options().out)
    assert states
    for _, folder in states:
        assert is_intact(folder)
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "trainable.safetensors").values())
    assert not train_options().out.joinpath("checkpoint").exists()


def test_poisoned_weight_stops_at_the_first_step(glassllm_dir: Path, train_options: Options, tmp_path: Path) -> None:
    """A NaN in the model is reported at step 1, before anything was learned from it."""
    poisoned = tmp_path / "poisoned"
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(poisoned)
    AutoTokenizer.from_pretrained(glassllm_dir).save_pretrained(poisoned)
    with pytest.raises(DivergedError, match=r"(?s)diverged at step 1.*loss nan.*no state had been saved"):
        train(train_options(model=str(poisoned)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "model folder does not exist"),
        ({"leave_dense": False}, r"(?s)does not divide.*down_proj.*341"),
        ({"max_length": 4096}, r"(?s)exceeds the model's context.*4096.*128"),
        ({"evaluation": EvalOptions(text=Path("none.txt"))}, "evaluation text cannot be read"),
        ({"data": (Path("none.jsonl"),)}, "cannot be read"),
        ({"lora": LoraConfig(target_modules=("*.nothing",))}, "matches no linear layer"),
    ],
)
def test_bad_input_leaves_no_run(train_options: Options, changes: dict[str, Any], message: str) -> None:
    """Input that cannot be trained is refused before a run folder appears."""
    with pytest.raises(UsageError, match=message):
        train(train_options(**changes))
    assert not train_options().out.exists()


def test_unknown_architecture_is_unsupported(train_options: Options, glassllm_dir: Path, tmp_path: Path) -> None:
    """A model type that transformers has no causal language model for ends with the unsupported error."""
    strange = tmp_path / "strange"
    shutil.copytree(glassllm_dir, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UnsupportedError, match="unheard_of"):
        train(train_options(model=str(strange)))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3, "epochs": 1.0},
        {"resume": True, "overwrite": True},
        {"batch_size": 0},
        {"steps": 0},
        {"data": ()},
        {"dtype": "float16"},
    ],
)
def test_contradicting_options_are_refused(train_options: Options, changes: dict[str, Any]) -> None:
    """Options out of range, or two that exclude each other, are refused when they are made."""
    with pytest.raises(UsageError):
        train_options(**changes)


def test_rates_follow_lr() -> None:
    """Scales and offsets learn at a twentieth of LoRA's rate unless told otherwise."""
    assert (OptimOptions(lr=2e-3).scale_lr, OptimOptions(lr=2e-3).offset_lr) == (1e-4, 1e-4)
    assert OptimOptions(scale_lr=0.0).scale_lr == 0.0
