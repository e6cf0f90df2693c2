"""Distillation from W0: the teacher is the original model, the loss torch's own divergence, the run exact to resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from l4q import distill
from l4q.config import LoraConfig, QuantConfig
from l4q.distill import IGNORED, divergence, learned_positions, original, teacher_logits
from l4q.errors import UsageError
from l4q.model import wrap_linears
from l4q.train import train
from l4q.train_options import OptimOptions
from runtime_tests.conftest import disturb
from runtime_tests.train_runs import Options, final_weights, metrics, rewind, same_bits, same_checkpoints
from tools.reproduction.bench import training_loss


@pytest.fixture
def wrapped(glassllm_dir: Path) -> tuple[Any, Any]:
    """The tiny real model, and the same after it was wrapped and trained a little."""
    plain, model = (AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32) for _ in range(2))
    wrap_linears(model, QuantConfig(bits=3, group_size=32), LoraConfig(rank=4), skip_indivisible=True)
    disturb(model)
    return plain, model


@pytest.mark.parametrize("warm", [False, True])
def test_the_teacher_is_the_original_model(wrapped: tuple[Any, Any], warm: bool) -> None:
    """Its logits are the unwrapped model's, bit for bit, in a LoRA warm-up too; the student's are others again."""
    plain, model = wrapped
    ids = torch.arange(40).view(2, 20)
    if warm:
        for module in model.modules():
            if hasattr(module, "start_warmup"):
                module.start_warmup()
    student = model(input_ids=ids).logits
    assert torch.equal(teacher_logits(model, {"input_ids": ids, "labels": ids}), plain(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, student)
    assert not torch.allclose(student, plain(input_ids=ids).logits, atol=1e-3)


def test_an_error_leaves_the_student_behind(wrapped: tuple[Any, Any]) -> None:
    """Whatever ends the teacher's forward, the layers quantize again."""
    model = wrapped[1]
    with pytest.raises(ZeroDivisionError), original(model):
        raise ZeroDivisionError
    assert all(getattr(module, "adapting", True) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient equal torch.distributions' KL over the positions that learn, in blocks or whole."""
    monkeypatch.setattr(distill, "BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 9, 50, generator=generator).to(dtype)
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    labels[0, :5] = IGNORED
    ours, theirs = (torch.randn(2, 9, 50, generator=generator.manual_seed(1)).to(dtype) for _ in range(2))
    ours.requires_grad_()
    theirs.requires_grad_()
    found = divergence(ours, teacher, labels)
    found.backward()
    learned = labels[:, 1:] != IGNORED
    left, right = (torch.distributions.Categorical(logits=x[:, :-1][learned].float()) for x in (teacher, theirs))
    expected = torch.distributions.kl_divergence(left, right).sum()
    expected.backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)  # type: ignore[arg-type]
    assert int(learned_positions(labels)) == int(learned.sum())
    shifted = divergence(ours, teacher.roll(1, dims=1), labels)  # the twin: the teacher one position off
    assert not torch.allclose(shifted, expected, rtol=1e-2)


def test_a_run_mixes_the_two_losses(train_options: Options) -> None:
    """The first loss is the mixture of the text's loss and the mean divergence, computed here from the model itself."""
    first = {}
    for share in (0.0, 0.25, 1.0):
        made = train_options(distill=share, steps=1, out=Path(train_options().out.parent / f"{share}"))
        train(made)
        first[share] = metrics(made.out)[0]["loss"]
    assert first[0.25] == pytest.approx(0.75 * first[0.0] + 0.25 * first[1.0], rel=1e-5)
    assert 0 < first[1.0] < 0.1 * first[0.0]


def test_distillation_nears_the_original(train_options: Options, wiki_text: str) -> None:
    """With the divergence alone the model moves back towards its original, by torch's own measure."""
    from l4q.train_model import load_model
    from runtime_tests.train_runs import wrapped_model

    quant = QuantConfig(bits=2, group_size=32, zero_point="integer")
    made = train_options(distill=1.0, steps=20, quant=quant, optim=OptimOptions(lr=5e-3))
    train(made)
    plain, tokenizer = load_model(made)
    before, after = wrapped_model(made), AutoModelForCausalLM.from_pretrained(made.out / "checkpoint")
    ids = tokenizer(wiki_text[:400], return_tensors="pt")["input_ids"][:, :128]
    with torch.no_grad():
        target = F.log_softmax(plain(input_ids=ids).logits, -1)
        found = [F.log_softmax(model.eval()(input_ids=ids).logits, -1) for model in (before, after)]
    far, near = (float(F.kl_div(each, target, log_target=True, reduction="sum")) for each in found)
    assert near < 0.9 * far


def test_a_distilled_run_resumes_bit_equal(train_options: Options, tmp_path: Path) -> None:
    """Killed and resumed it ends with the same bits; without distillation with others."""
    made = train_options(distill=0.5, steps=5)
    train(made)
    resumed = rewind(made.out, tmp_path / "resumed", 3)
    train(replace(made, out=resumed, resume=True))
    assert same_bits(final_weights(made.out), final_weights(resumed))
    assert same_checkpoints(made.out, resumed)
    other = train_options(out=tmp_path / "other", steps=5)
    train(other)
    assert not same_bits(final_weights(made.out), final_weights(other.out))


def test_shares_out_of_range_are_refused(train_options: Options) -> None:
    """A share of the loss is from 0 to 1."""
    with pytest.raises(UsageError, match=r"(?s)unsupported value.*distill"):
        train_options(distill=1.5)


def test_the_comparison_mixes_alike(wrapped: tuple[Any, Any]) -> None:
    """tools.reproduce's loss is the same mixture: between the text's loss and torch's mean divergence."""
    plain, model = wrapped
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        text, mixed, taught = (float(training_loss(model, ids, share)) for share in (0.0, 0.25, 1.0))
        target, found = (F.log_softmax(each(input_ids=ids).logits[:, :-1], -1) for each in (plain, model))
    assert taught == pytest.approx(float(F.kl_div(found, target, log_target=True, reduction="sum")) / 38, rel=1e-4)
    assert mixed == pytest.approx(0.75 * text + 0.25 * taught, rel=1e-5)
