"""AdamW with moments in bfloat16 or 8 bits: close to torch's, right on average, resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from l4q import optim
from l4q.errors import UnsupportedError
from l4q.optim import Bf16AdamW, make_optimizer, random_bits, round_stochastic
from l4q.state_tensors import save_tensors
from l4q.train import train
from l4q.train_options import OptimOptions
from l4q.train_state import state_folder
from runtime_tests.train_runs import (
    Options,
    final_weights,
    rewind,
    same_bits,
    same_checkpoints,
)


def test_bf16_moments_follow_adamw() -> None:
    """The first step is torch's AdamW's; after 200 noisy steps the way gone differs by a few percent."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4000)) for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    optimizers = (Bf16AdamW([ours], **settings), torch.optim.AdamW([theirs], **settings))  # type: ignore[arg-type]
    for step in range(200):
        gradient = torch.randn(4000) + 0.3
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        if step == 0:
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
    assert torch.linalg.norm(ours - theirs) < 0.05 * torch.linalg.norm(theirs - 1)
    assert not torch.equal(ours, theirs)
    assert {optimizers[0].state[ours][key].dtype for key in optim.MOMENTS} == {torch.bfloat16}


def test_stochastic_rounding_is_right_on_average() -> None:
    """Results are the two neighbours in bfloat16, exact values stay, and the mean is the value."""
    noise = random_bits([40000], torch.Generator().manual_seed(0))
    value = 1 + 2**-9  # a quarter of the way from 1 to 1 + 2**-7
    rounded = round_stochastic(torch.full((40000,), value), noise).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(value, abs=2**-7 * 0.02)
    exact = torch.tensor([0.0, -1.5])
    assert torch.equal(round_stochastic(exact, noise[:2]).float(), exact)


def test_second_moment_decays() -> None:
    """Without gradients v falls as 0.999**t; rounded to nearest it would stand still, which the twin shows."""
    parameter = nn.Parameter(torch.zeros(2000))
    optimizer = Bf16AdamW([parameter])
    parameter.grad = torch.ones(2000)
    optimizer.step()
    first = optimizer.state[parameter]["exp_avg_sq"].float().mean()
    parameter.grad = torch.zeros(2000)
    for _ in range(300):
        optimizer.step()
    last = optimizer.state[parameter]["exp_avg_sq"].float().mean()
    assert float(last / first) == pytest.approx(0.999**300, rel=0.02)
    stuck = torch.tensor(0.001).bfloat16()
    assert (stuck.float() * 0.999).bfloat16() == stuck


def test_bf16_moments_resume_bit_equal(train_options: Options, tmp_path: Path) -> None:
    """A run with bfloat16 moments saves them as such, resumes bit for bit, and differs from one in float32."""
    made = train_options(optim=OptimOptions(state="bfloat16"), steps=5)
    train(made)
    saved = load_file(state_folder(made.out, 3) / "optimizer.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    resumed = rewind(made.out, tmp_path / "resumed", 3)
    train(replace(made, out=resumed, resume=True))
    assert same_bits(final_weights(made.out), final_weights(resumed))
    assert same_checkpoints(made.out, resumed)
    other = train_options(out=tmp_path / "float32", steps=5)
    train(other)
    assert not same_bits(final_weights(made.out), final_weights(other.out))


def test_eight_bit_names_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a library that has 8-bit moments, the error says which to install and what works without."""
    monkeypatch.setattr(optim, "EIGHT_BIT", {"no_such_library": "no_such_library.optim"})
    with pytest.raises(UnsupportedError, match=r"(?s)no_such_library.*pip install.*bitsandbytes.*bfloat16"):
        make_optimizer([{"params": [nn.Parameter(torch.zeros(2))]}], "8bit", betas=(0.9, 0.999), eps=1e-8)


def test_shared_tensors_are_saved(tmp_path: Path) -> None:
    """Optimizers whose parameters share a table (bitsandbytes) can be saved: every name gets its values back."""
    table, other = torch.arange(256.0), torch.ones(3)
    save_tensors(tmp_path / "t.safetensors", {"a/qmap1": table, "b/qmap1": table, "b/state1": other})
    loaded = load_file(tmp_path / "t.safetensors")
    assert {name: torch.equal(value, table) for name, value in loaded.items()} == {
        "a/qmap1": True,
        "b/qmap1": True,
        "b/state1": False,
    }
