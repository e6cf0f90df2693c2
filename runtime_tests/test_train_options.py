"""What the paper varies in training: each option does what it names, resumes bit for bit, and freezes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from l4q import optim
from l4q.cli_train import command as train_command
from l4q.cli_train import parse_options
from l4q.config import GridLearning, LoraConfig, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.init import init_qparams
from l4q.linear import L4QLinear
from l4q.optim import Bf16AdamW, make_optimizer, random_bits, round_stochastic
from l4q.run_folder import RunFolder
from l4q.state_tensors import save_tensors
from l4q.train import train
from l4q.train_options import OptimOptions, TrainOptions
from l4q.train_state import TRAINABLE, state_folder
from l4q.trainer import parameter_groups
from runtime_tests.test_linear import clipped_layer, gradients, reference_weight
from runtime_tests.train_runs import base_options, final_weights, metrics, rewind, same_bits, same_checkpoints

Options = Callable[..., TrainOptions]
WARMUP = 4


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Options of a short run with everything random switched on."""
    return base_options(glassllm_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def options(base: TrainOptions, tmp_path: Path) -> Options:
    """The same options for a folder of the test's own; keywords change them."""

    def make(**changes: Any) -> TrainOptions:
        return replace(base, **{"out": tmp_path / "run", **changes})

    return make


# --- gradient scaling -------------------------------------------------------------------------------------------------


def scaled_layer(bits: int, kind: str, learning: GridLearning) -> L4QLinear:
    """`clipped_layer` with another way of learning its grid."""
    source = clipped_layer(bits, kind)
    layer = L4QLinear(source.weight, None, source.quant, source.lora, learning=learning)  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    return layer


def lsq_reference(layer: L4QLinear, factor: float) -> torch.Tensor:
    """The reference weight with LSQ's own gradient scaling written out on s and b: x * g + detach(x - x * g)."""
    scaled = {
        name: value * factor + (value - value * factor).detach()
        for name, value in (("scales", layer.scales), ("offsets", layer.offsets))
    }
    parts = {name: getattr(layer, name) for name in ("quant", "lora", "weight", "lora_A", "lora_B")}
    return reference_weight(SimpleNamespace(**parts, **scaled))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_lsq_gradients_equal_autograd(bits: int, kind: str) -> None:
    """With gradient_scale lsq all gradients equal autograd's through LSQ's formula, g = 1 / sqrt(32 * Q_P)."""
    layer = scaled_layer(bits, kind, GridLearning(gradient_scale="lsq"))
    x = torch.randn(7, 64, dtype=torch.float64)
    factor = 1 / (32 * (2 ** (bits - 1) - 1)) ** 0.5
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda value: F.linear(value, lsq_reference(layer, factor)))
    plain = gradients(layer, x, lambda value: F.linear(value, reference_weight(layer)))
    assert set(ours) == set(theirs) >= {"x", "lora_A", "lora_B", "scales"}
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).abs().max()) <= 1e-12 * max(1.0, float(theirs[name].abs().max())), name
    assert float((ours["scales"] - plain["scales"]).abs().max()) > 1e-3  # the comparison notices a missing factor
    assert torch.allclose(ours["lora_A"], plain["lora_A"], rtol=0, atol=1e-12)


def test_lsq_factor_of_one_group_per_row() -> None:
    """N is the number of weights that share a scale: the whole row for group_size -1."""
    quant = QuantConfig(bits=4, group_size=-1)
    assert GridLearning(gradient_scale="lsq").gradient_factor(quant, 1000) == pytest.approx((1000 * 7) ** -0.5)
    assert GridLearning().gradient_factor(quant, 1000) == 1.0


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_lsq_scaling_freezes_exactly(kind: str) -> None:
    """The scaled layer computes and freezes to the same bits as the plain one."""
    plain = clipped_layer(4, kind, dtype=torch.float32)
    layer = L4QLinear(plain.weight, None, plain.quant, plain.lora, learning=GridLearning(gradient_scale="lsq"))  # type: ignore[arg-type]
    layer.load_state_dict(plain.state_dict())
    frozen = layer.freeze().dequantize()
    assert np.array_equal(frozen.view(np.uint32), plain.freeze().dequantize().view(np.uint32))
    assert torch.equal(layer(torch.eye(64)).T, torch.from_numpy(frozen))


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("offsets", [True, False])
def test_only_what_trains_moves(options: Options, scales: bool, offsets: bool) -> None:
    """S only, b only, both or neither: the others keep their start, asymm's offsets included, and have no group."""
    learning = GridLearning(train_scales=scales, train_offsets=offsets)
    made = options(steps=3, init="asymm", learning=learning)
    train(made)
    first, last = (load_file(state_folder(made.out, 3) / TRAINABLE), _start(made))
    for name, tensor in first.items():
        kind = name.rpartition(".")[2]
        trains = {"scales": scales, "offsets": offsets}.get(kind, True)
        assert torch.equal(tensor, last[name]) is not trains, name


def _start(made: TrainOptions) -> dict[str, torch.Tensor]:
    """A, B, s and b before the first step."""
    from l4q.model import trainable_state

    return {name: tensor.clone() for name, tensor in trainable_state(_wrapped(made)).items()}


def _wrapped(made: TrainOptions) -> Any:
    from transformers import set_seed

    from l4q.train_model import load_model, wrap_model

    model, _ = load_model(made)
    set_seed(made.seed)
    wrap_model(model, made)
    return model


def test_groups_follow_what_trains(options: Options) -> None:
    """The optimizer has one group per kind that trains; zero_point none never has one of offsets."""
    for kind, learning, names in (
        ("integer", GridLearning(), {"lora", "scales", "offsets"}),
        ("integer", GridLearning(train_scales=False), {"lora", "offsets"}),
        ("none", GridLearning(), {"lora", "scales"}),
        ("float", GridLearning(train_scales=False, train_offsets=False), {"lora"}),
    ):
        made = options(quant=QuantConfig(zero_point=kind), learning=learning)  # type: ignore[arg-type]
        assert {group["name"] for group in parameter_groups(_wrapped(made), OptimOptions())} == names


# --- LoRA warm-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_warmup_is_plain_lora(kind: str) -> None:
    """In the warm-up forward and gradients are those of x (W0 + scaling B A)^T, and the grid gets none."""
    layer = clipped_layer(4, kind)
    layer.start_warmup()
    x = torch.randn(7, 64, dtype=torch.float64)

    def merged(value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A)  # type: ignore[operator]

    ours, theirs = gradients(layer, x, layer), gradients(layer, x, merged)
    assert torch.allclose(layer(x), merged(x), rtol=0, atol=1e-12)
    for name in ("x", "lora_A", "lora_B"):
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-11)
    assert ours["scales"] is None
    assert layer.offsets.grad is None


@pytest.mark.parametrize("init", ["l4q", "lsq+", "symm", "asymm"])
def test_quantization_starts_from_the_merged_weight(init: Any) -> None:
    """start_quantization gives the s and b of W0 + scaling B A, and from then on frozen == forward bit for bit."""
    torch.manual_seed(0)
    quant = QuantConfig(group_size=32, zero_point="integer")
    layer = L4QLinear.from_linear(nn.Linear(96, 700, bias=False), quant, LoraConfig(rank=5), init=init)
    layer.start_warmup()
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.05)
    before = layer.scales.clone()
    with pytest.raises(UsageError, match=r"(?s)warm-up.*start_quantization"):
        layer.freeze()
    layer.start_quantization()
    merged = layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A  # type: ignore[operator]
    start = init_qparams(merged.detach(), quant, init)
    # the product is made in blocks of rows, which may differ in the last bit
    assert torch.allclose(layer.scales, start.scales, rtol=2**-6, atol=0)
    assert (layer.scales == start.scales).double().mean() > 0.99
    assert (layer.scales == before).double().mean() < 0.5
    frozen = layer.freeze().dequantize()
    assert torch.equal(layer(torch.eye(96)).T, torch.from_numpy(frozen))


@pytest.fixture(scope="module")
def warmed(base: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A run of 10 steps whose first 4 train plain LoRA, with a state of every step."""
    made = replace(base, out=tmp_path_factory.mktemp("warm") / "run", lora_warmup_steps=WARMUP, save_every=1)
    train(made)
    return made


def test_warmup_run_changes_phase_once(warmed: TrainOptions) -> None:
    """The grid is untouched through the warm-up and starts anew after it; A and B train all along."""
    states = [load_file(state_folder(warmed.out, step) / TRAINABLE) for step in (1, WARMUP, WARMUP + 1)]
    start = _start(warmed)
    for name, tensor in start.items():
        kind = name.rpartition(".")[2]
        if kind in ("scales", "offsets"):
            assert torch.equal(tensor, states[0][name])
            assert torch.equal(tensor, states[1][name])
            assert not torch.equal(tensor, states[2][name])
        elif kind == "lora_B":
            assert len({state[name].sum().item() for state in states}) == 3


def test_warmup_starts_at_the_base_models_loss(options: Options, warmed: TrainOptions) -> None:
    """The first loss of a warm-up is the unquantized model's, below that of a run which quantizes at once."""
    plain = options(steps=1, quant=QuantConfig(bits=2))
    warm = replace(warmed, out=plain.out.with_name("warm"), steps=2, lora_warmup_steps=1, quant=plain.quant)
    train(plain)
    train(warm)
    losses = [metrics(run.out)[0]["loss"] for run in (warmed, warm, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] > 1.01 * losses[1]  # 2 bits cost this small model 2 % of its loss


@pytest.mark.parametrize("step", [WARMUP - 1, WARMUP, WARMUP + 1])
def test_warmup_resumes_bit_equal(warmed: TrainOptions, tmp_path: Path, step: int) -> None:
    """Resuming inside the warm-up, right at its end, and after it ends with the uninterrupted run's bits."""
    resumed = rewind(warmed.out, tmp_path / "resumed", step)
    train(replace(warmed, out=resumed, resume=True))
    assert same_bits(final_weights(warmed.out), final_weights(resumed))
    assert same_checkpoints(warmed.out, resumed)


def test_forgetting_the_phase_is_noticed(warmed: TrainOptions, tmp_path: Path) -> None:
    """The twin: a resumed run that starts quantization anew, one step late, ends elsewhere."""
    resumed = rewind(warmed.out, tmp_path / "resumed", WARMUP)
    config = (resumed / "config.json").read_text()
    (resumed / "config.json").write_text(config.replace(f'"lora_warmup_steps": {WARMUP}', '"lora_warmup_steps": 5'))
    train(replace(warmed, out=resumed, resume=True, lora_warmup_steps=WARMUP + 1))
    assert not same_bits(final_weights(warmed.out), final_weights(resumed))


def test_warmup_must_end(options: Options) -> None:
    """A warm-up as long as the run is refused, when the options are made or when the steps are known."""
    with pytest.raises(UsageError, match="lora_warmup_steps"):
        options(steps=4, lora_warmup_steps=4)
    with pytest.raises(UsageError, match=r"(?s)leaves no step.*fewer than the run's 6 steps"):
        train(options(steps=None, epochs=1.0, lora_warmup_steps=6))


# --- AdamW's moments --------------------------------------------------------------------------------------------------


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


def test_bf16_moments_resume_bit_equal(options: Options, tmp_path: Path) -> None:
    """A run with bfloat16 moments saves them as such, resumes bit for bit, and differs from one in float32."""
    made = options(optim=OptimOptions(state="bfloat16"), steps=5)
    train(made)
    saved = load_file(state_folder(made.out, 3) / "optimizer.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    resumed = rewind(made.out, tmp_path / "resumed", 3)
    train(replace(made, out=resumed, resume=True))
    assert same_bits(final_weights(made.out), final_weights(resumed))
    assert same_checkpoints(made.out, resumed)
    other = options(out=tmp_path / "float32", steps=5)
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


# --- LoRA dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_dropout_acts_in_training_only(warm: bool) -> None:
    """Training forwards differ from one another; evaluation and the frozen weight are those without dropout."""
    source = clipped_layer(4, "integer", dtype=torch.float32)
    layer = L4QLinear(source.weight, None, source.quant, replace(source.lora, dropout=0.5))  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    frozen = layer.freeze().dequantize()
    if warm:
        layer.start_warmup()
        source.start_warmup()
    x = torch.eye(64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer(x).T, torch.from_numpy(frozen)) is not warm
    assert np.array_equal(frozen.view(np.uint32), source_frozen(source).view(np.uint32))


def source_frozen(layer: L4QLinear) -> np.ndarray:
    """The dequantized weight, also of a layer that was put into its warm-up."""
    layer.quantizing = True
    return layer.freeze().dequantize()


def test_dropout_keeps_the_mean() -> None:
    """Dropped entries of A are made up for: the mean of many warm-up forwards is the one without dropout."""
    source = clipped_layer(4, "none", dtype=torch.float32)
    layer = L4QLinear(source.weight, None, source.quant, replace(source.lora, dropout=0.25))  # type: ignore[arg-type]
    layer.load_state_dict(source.state_dict())
    layer.start_warmup()
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    expected = layer.eval()(x)
    low_rank = (expected - F.linear(x, layer.weight)).norm()  # type: ignore[arg-type]
    assert (mean - expected).norm() < 0.2 * low_rank


# --- the command line -------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> TrainOptions:
    """The options that `l4q-train` makes of its arguments."""
    fixed = ["model", "--data", __file__, "--out", "run"]
    context = train_command.make_context("l4q-train", [*fixed, *arguments])
    values = dict(context.params)
    values.pop("as_json")
    return parse_options(values)


def test_defaults_are_the_documented_ones() -> None:
    """The command line's defaults are the dataclasses', which are the paper's."""
    made = parsed()
    assert made == TrainOptions(model="model", data=(Path(__file__),), out=Path("run"))
    assert (made.init, made.learning, made.lora_warmup_steps, made.optim.state) == ("l4q", GridLearning(), 0, "float32")
    assert made.learning == GridLearning(train_scales=True, train_offsets=True, gradient_scale="none")


def test_flags_reach_their_options() -> None:
    """Every flag of this file arrives where it belongs."""
    made = parsed(
        *("--init", "asymm", "--zero-point", "float", "--no-train-scales", "--no-train-offsets"),
        *("--gradient-scale", "lsq", "--lora-warmup-steps", "7", "--optim-state", "bfloat16", "--dropout", "0.05"),
    )
    assert made.learning == GridLearning(train_scales=False, train_offsets=False, gradient_scale="lsq")
    assert (made.init, made.lora_warmup_steps, made.optim.state, made.lora.dropout) == ("asymm", 7, "bfloat16", 0.05)
    with pytest.raises(UsageError, match="needs offsets"):
        parsed("--init", "asymm")


def test_options_survive_their_record(options: Options) -> None:
    """from_dict(to_dict(options)) == options; older records get defaults; unknown and missing options are refused."""
    made = options(init="asymm", learning=GridLearning(train_scales=False), optim=OptimOptions(state="bfloat16"))
    record = made.to_dict()
    assert TrainOptions.from_dict(record) == made
    del record["learning"]
    assert TrainOptions.from_dict(record) == replace(made, learning=GridLearning())
    with pytest.raises(UsageError, match=r"(?s)shape_of_water.*version of l4q"):
        TrainOptions.from_dict({**record, "shape_of_water": 1})
    with pytest.raises(UsageError, match="model"):
        TrainOptions.from_dict({key: value for key, value in record.items() if key != "model"})


def test_runs_of_older_versions_resume(options: Options) -> None:
    """A record without the newer options is a run with their defaults, and is refused with other values."""
    made, facts = options(), {"sha256": "0"}
    run = RunFolder(made.out)
    run.start(made, facts)
    record = json.loads(run.config.read_text())
    for section in (record["options"], record["identity"]):
        for name in ("init", "learning", "lora_warmup_steps"):
            del section[name]
        del section["optim"]["state"]
    run.config.write_text(json.dumps(record))
    run.check(replace(made, resume=True), facts)
    for changes in ({"init": "lsq+"}, {"lora_warmup_steps": 2}, {"optim": OptimOptions(state="bfloat16")}):
        with pytest.raises(UsageError, match=next(iter(changes))):
            run.check(replace(made, resume=True, **changes), facts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridLearning(gradient_scale="l2"), "gradient_scale"),  # type: ignore[arg-type]
        (lambda: OptimOptions(state="fp4"), "optim_state"),  # type: ignore[arg-type]
    ],
)
def test_unknown_values_are_refused(make: Callable[[], object], message: str) -> None:
    """A value that no option has is refused by the option's name."""
    with pytest.raises(UsageError, match=message):
        make()
