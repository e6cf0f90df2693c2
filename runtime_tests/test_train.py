"""Training: it learns, stops when it must, and a run that was killed ends with the very weights of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from l4q.checkpoint import L4QCheckpoint
from l4q.cli_train import command as train_command
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.evaluate import text_windows, windows_perplexity
from l4q.model import trainable_state, wrap_linears
from l4q.train import train
from l4q.train_callbacks import DivergedError
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions
from l4q.train_state import is_intact, list_states, newest_state
from l4q.trainer import parameter_groups

Options = Callable[..., TrainOptions]
RECORDS, BATCH, ACCUM = 24, 2, 2
STEPS_PER_EPOCH = RECORDS // (BATCH * ACCUM)


@pytest.fixture(scope="module")
def corpus(glassllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompt pairs of different lengths from real text."""
    text = (glassllm_dir.parent / "text" / "train.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line) > 60][:RECORDS]
    path = tmp_path_factory.mktemp("corpus") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": x[:30], "completion": x[30:300]}) + "\n" for x in lines))
    return path


@pytest.fixture(scope="module")
def base(glassllm_dir: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """Options of a short run over nearly two epochs, with everything random switched on."""
    return TrainOptions(
        model=str(glassllm_dir),
        data=(corpus,),
        out=tmp_path_factory.mktemp("runs") / "whole",
        quant=QuantConfig(zero_point="integer"),
        lora=LoraConfig(rank=4, dropout=0.1),
        leave_dense=True,
        steps=10,
        batch_size=BATCH,
        grad_accum=ACCUM,
        max_length=64,
        save_every=3,
        keep_states=99,
    )


@pytest.fixture(scope="module")
def whole(base: TrainOptions) -> Path:
    """The folder of that run, uninterrupted; tests only read it."""
    train(base)
    return base.out


@pytest.fixture
def options(base: TrainOptions, tmp_path: Path) -> Options:
    """The same options for a folder of the test's own; keywords change them."""

    def make(**changes: Any) -> TrainOptions:
        return replace(base, **{"out": tmp_path / "run", **changes})

    return make


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The last saved A, B, s and b."""
    return load_file(list_states(run)[-1][1] / "trainable.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewind(run: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it was after saving the state of `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoint")
    (copy / "result.json").unlink()
    for saved, folder in list_states(copy):
        if saved > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_training_improves_held_out_text(glassllm_dir: Path, options: Options, zero_point: Any) -> None:
    """30 steps of real text lower loss and held-out perplexity, and the checkpoint opens with the trained grid."""
    texts = glassllm_dir.parent / "text"
    quant = QuantConfig(zero_point=zero_point)
    result = train(
        options(
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


def test_checkpoint_evaluates_as_trained(glassllm_dir: Path, options: Options) -> None:
    """The frozen folder, loaded by transformers, has the perplexity that the run reported for the trained model."""
    text = glassllm_dir.parent / "text" / "wiki_demo.txt"
    result = train(options(evaluation=EvalOptions(text=text, windows=4)))
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


def same_checkpoints(left: Path, right: Path) -> bool:
    """Whether two frozen checkpoints hold the same tensors, bit for bit."""
    a, b = (load_file(run / "checkpoint/model.safetensors") for run in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, 9])
def test_resumed_run_ends_bit_equal(options: Options, whole: Path, tmp_path: Path, step: int) -> None:
    """Resuming mid-epoch, at an epoch's end, or in the second epoch gives the uninterrupted run's bits and losses."""
    resumed = rewind(whole, tmp_path / "resumed", step)
    train(options(out=resumed, resume=True))
    assert same_bits(final_weights(whole), final_weights(resumed))
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(resumed)]
    assert same_checkpoints(whole, resumed)


def test_other_seed_ends_elsewhere(options: Options, whole: Path) -> None:
    """The comparisons above notice a run that took another path."""
    train(options(seed=1))
    assert not same_bits(final_weights(whole), final_weights(options().out))
    assert not same_checkpoints(whole, options().out)


def test_damaged_state_is_not_trusted(options: Options, whole: Path, tmp_path: Path) -> None:
    """A newest state with one flipped bit, and one without manifest, are passed over for an older one."""
    damaged = rewind(whole, tmp_path / "damaged", 9)
    moments = damaged / "state-9/optimizer.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    (damaged / "state-6/state.json").unlink()
    assert not is_intact(damaged / "state-9")
    assert newest_state(damaged) == (3, damaged / "state-3")
    train(options(out=damaged, resume=True))
    assert same_bits(final_weights(whole), final_weights(damaged))


def test_killed_process_resumes_bit_equal(options: Options, tmp_path: Path, corpus: Path) -> None:
    """A process killed with SIGKILL in mid-training and resumed gives the uninterrupted run's weights."""
    steps = 40
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train(options(out=unbroken, steps=steps, save_every=5))
    arguments = [options().model, "--data", str(corpus), "--out", str(killed), "--leave-dense", "--steps", str(steps)]
    arguments += ["--zero-point", "integer", "--rank", "4", "--dropout", "0.1", "--max-length", "64"]
    arguments += ["--batch-size", str(BATCH), "--grad-accum", str(ACCUM), "--save-every", "5", "--keep-states", "99"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from l4q.cli_train import main; main()", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (killed / "state-10").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "result.json").exists()
    assert not (killed / f"state-{steps}").exists()
    train(options(out=killed, steps=steps, save_every=5, resume=True))
    assert same_bits(final_weights(unbroken), final_weights(killed))
    assert [line["step"] for line in metrics(killed)] == list(range(1, steps + 1))


def test_run_folder_holds_no_pickle(whole: Path) -> None:
    """Everything a run writes is JSON, safetensors or a text that came with the model."""
    names = {path.name for path in whole.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in names - {"LICENSE"}} == {".json", ".jsonl", ".safetensors"}


def test_finished_run_is_returned_again(options: Options, whole: Path) -> None:
    """Resuming a complete run trains nothing and returns the same result."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train(options(out=whole, resume=True)) == json.loads((whole / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_killed_between_last_step_and_freeze(options: Options, whole: Path, tmp_path: Path) -> None:
    """A run whose last state is there but whose checkpoint is not gets the checkpoint without another step."""
    expected = json.loads((whole / "result.json").read_text())
    resumed = rewind(whole, tmp_path / "resumed", 10)
    result = train(options(out=resumed, resume=True))
    assert [result[key] for key in ("steps", "final_loss")] == [expected[key] for key in ("steps", "final_loss")]
    assert same_checkpoints(whole, resumed)


def test_only_newest_states_are_kept(options: Options) -> None:
    """keep_states bounds the disk a run takes."""
    train(options(keep_states=2))
    assert [step for step, _ in list_states(options().out)] == [9, 10]


def test_metrics_name_every_rate(options: Options) -> None:
    """Each step's line has loss, three learning rates in the given ratio, speed, memory and ETA."""
    train(options(optim=OptimOptions(lr=1e-3, scale_lr=1e-4, offset_lr=2e-5)))
    lines = metrics(options().out)
    assert [line["step"] for line in lines] == list(range(1, 11))
    peak = lines[1]
    assert (peak["lr_lora"], peak["lr_scales"], peak["lr_offsets"]) == pytest.approx((1e-3, 1e-4, 2e-5))
    assert {"loss", "grad_norm", "tokens", "tokens_per_s", "memory_mb", "elapsed_s", "eta_s"} <= peak.keys()
    assert lines[-1]["eta_s"] == 0


def test_rates_reach_their_own_parameters(options: Options, glassllm_dir: Path) -> None:
    """With a rate of zero for LoRA, or for s and b, exactly those parameters stay as they were."""
    train(options(steps=3, out=options().out / "grid", optim=OptimOptions(lr=0.0, scale_lr=1e-4, offset_lr=1e-4)))
    train(options(steps=3, out=options().out / "lora", optim=OptimOptions(lr=1e-3, scale_lr=0.0, offset_lr=0.0)))
    grid, lora = (final_weights(options().out / name) for name in ("grid", "lora"))
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


def test_checkpointing_and_accumulation_keep_the_losses(options: Options, tmp_path: Path) -> None:
    """Recomputed activations, and the same batch in smaller parts, give the same losses."""
    plain = {"lora": LoraConfig(rank=4), "steps": 4}
    train(options(out=tmp_path / "a", **plain))
    train(options(out=tmp_path / "b", gradient_checkpointing=True, **plain))
    train(options(out=tmp_path / "c", batch_size=1, grad_accum=4, **plain))
    train(options(out=tmp_path / "d", batch_size=1, grad_accum=2, **plain))
    a, b, c, d = ([line["loss"] for line in metrics(tmp_path / name)] for name in "abcd")
    assert b == pytest.approx(a, rel=1e-5)
    assert c == pytest.approx(a, rel=1e-4)
    assert d != pytest.approx(a, rel=1e-2)


def test_bfloat16_base_trains(options: Options) -> None:
    """A bfloat16 model trains with float32 A, B, s and b."""
    result = train(options(dtype="bfloat16"))
    assert result["final_loss"] > 0
    assert {tensor.dtype for tensor in final_weights(options().out).values()} == {torch.float32}


def test_absurd_rate_stops_and_keeps_good_states(options: Options) -> None:
    """A diverging run ends with one clear error; what is on disk is intact and finite, and not frozen."""
    with pytest.raises(DivergedError, match=r"(?s)diverged at step \d+.*lower --lr.*last good state"):
        train(options(optim=OptimOptions(lr=1e30, max_grad_norm=0), save_every=1))
    states = list_states(options().out)
    assert states
    for _, folder in states:
        assert is_intact(folder)
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "trainable.safetensors").values())
    assert not options().out.joinpath("checkpoint").exists()


def test_poisoned_weight_stops_at_the_first_step(glassllm_dir: Path, options: Options, tmp_path: Path) -> None:
    """A NaN in the model is reported at step 1, before anything was learned from it."""
    poisoned = tmp_path / "poisoned"
    model: Any = AutoModelForCausalLM.from_pretrained(glassllm_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(poisoned)
    AutoTokenizer.from_pretrained(glassllm_dir).save_pretrained(poisoned)
    with pytest.raises(DivergedError, match=r"(?s)diverged at step 1.*loss nan.*no state had been saved"):
        train(options(model=str(poisoned)))


def test_existing_run_needs_a_decision(options: Options) -> None:
    """A second run into the same folder is refused, replaced with overwrite, and never silently continued."""
    train(options(steps=2))
    with pytest.raises(UsageError, match=r"(?s)not empty.*--resume.*--overwrite"):
        train(options(steps=2))
    assert train(options(steps=3, overwrite=True))["steps"] == 3
    with pytest.raises(UsageError, match=r"(?s)only be resumed.*'seed': 5.*'seed': 0"):
        train(options(steps=3, seed=5, resume=True))


def test_changed_data_is_not_resumed(options: Options, tmp_path: Path) -> None:
    """Other training text under another name is recognised by its hash; the same text elsewhere is fine."""
    train(options(steps=2))
    other, same = tmp_path / "other.jsonl", tmp_path / "same.jsonl"
    same.write_bytes(options().data[0].read_bytes())
    other.write_bytes(options().data[0].read_bytes().replace(b"the", b"teh", 1))
    train(options(steps=2, data=(same,), resume=True))
    with pytest.raises(UsageError, match="data sha256"):
        train(options(steps=2, data=(other,), resume=True))


def test_foreign_folder_is_never_deleted(options: Options, tmp_path: Path) -> None:
    """--overwrite deletes runs only."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not written by l4q-train"):
        train(options(out=precious, overwrite=True))
    assert (precious / "config.json").read_text() == "{}"


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
def test_bad_input_leaves_no_run(options: Options, changes: dict[str, Any], message: str) -> None:
    """Input that cannot be trained is refused before a run folder appears."""
    with pytest.raises(UsageError, match=message):
        train(options(**changes))
    assert not options().out.exists()


def test_unknown_architecture_is_unsupported(options: Options, glassllm_dir: Path, tmp_path: Path) -> None:
    """A model type that transformers has no causal language model for ends with the unsupported error."""
    strange = tmp_path / "strange"
    shutil.copytree(glassllm_dir, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UnsupportedError, match="unheard_of"):
        train(options(model=str(strange)))


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
def test_contradicting_options_are_refused(options: Options, changes: dict[str, Any]) -> None:
    """Options out of range, or two that exclude each other, are refused when they are made."""
    with pytest.raises(UsageError):
        options(**changes)


def test_rates_follow_lr() -> None:
    """Scales and offsets learn at a twentieth of LoRA's rate unless told otherwise."""
    assert (OptimOptions(lr=2e-3).scale_lr, OptimOptions(lr=2e-3).offset_lr) == (1e-4, 1e-4)
    assert OptimOptions(scale_lr=0.0).scale_lr == 0.0


def test_command_prints_json_alone_on_stdout(glassllm_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """`l4q train --json`, as a process: exit code 0, stdout is the result, stderr has progress with loss and rate."""
    arguments = ["train", str(glassllm_dir), "--data", str(corpus), "--out", str(tmp_path / "run"), "--leave-dense"]
    arguments += ["--steps", "3", "--batch-size", "2", "--zero-point", "integer", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "from l4q.cli import main; main()", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert L4QCheckpoint.open(result["checkpoint"]).quant.zero_point == "integer"
    assert "loss=" in done.stderr
    assert "lr=" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["train", "model", "--out", "RUN"], 2, "--data"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--bits", "5"], 2, "--bits"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--group-size", "48"], 2, "group_size"),
        (["train", "/no/such/model", "--data", "DATA", "--out", "RUN", "--steps", "0"], 2, "steps"),
        (["bake"], 2, "bake"),
    ],
)
def test_exit_codes_without_heavy_imports(
    corpus: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    """Help and usage errors end with their exit code and one message on stderr, before torch is imported."""
    program = (
        "import atexit, sys; from l4q.cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); main()"
    )
    places = {"DATA": str(corpus), "RUN": str(tmp_path / "run")}
    arguments = [places.get(argument, argument) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("False False\n")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_end_with_their_exit_code(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An L4QError inside the command becomes its exit code and its message, without a traceback."""
    from l4q.cli_common import status

    monkeypatch.setattr(
        sys, "argv", ["l4q-train", "/no/such/model", "--data", str(corpus), "--out", str(tmp_path / "r")]
    )
    assert status(train_command) == 2


def test_help_lists_every_option() -> None:
    """Every option of the command has a help text."""
    text = CliRunner().invoke(train_command, ["--help"]).output
    options = [parameter for parameter in train_command.params if isinstance(parameter, click.Option)]
    assert len(options) > 30
    assert all(option.help and option.opts[0] in text for option in options)
