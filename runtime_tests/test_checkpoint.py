"""The L4Q checkpoint: golden bytes, round trips, transformers, and files that must be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.verify import compare_bits
from l4q.bitpack import pack_codes, unpack_codes
from l4q.checkpoint import L4QCheckpoint, natural_order, save_checkpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.model import l4q_layers, save_l4q, wrap_linears
from l4q.shard_writer import ShardWriter
from l4q.weight import QuantizedWeight
from runtime_tests.conftest import CheckpointMaker, disturb

CODES = np.arange(32, dtype=np.uint8)[None, :] * 7 % 16


def test_golden_bytes_of_the_specification() -> None:
    """The worked example of docs/format.md: 32 codes, scale 0.5, zero 3, byte for byte."""
    assert pack_codes(CODES, 4).tobytes().hex(" ") == " ".join(["70 5e 3c 1a f8 d6 b4 92"] * 2)
    assert pack_codes(CODES % 8, 3).tobytes().hex(" ") == " ".join(["b8 cb 29"] * 4)
    weight = QuantizedWeight(
        codes=CODES,
        scales=np.full((1, 1), 0.5, np.float16),
        zeros=np.full((1, 1), 3, np.uint8),
        bits=4,
        group_size=32,
    )
    assert weight.dequantize()[0, :5].tolist() == [-1.5, 2.0, 5.5, 1.0, 4.5]


def _slow_bits(codes: np.ndarray, bits: int) -> str:
    """The layout spelled out: a string of bits, least significant first, cut into bytes."""
    stream = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes[0])
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)).hex()


@settings(max_examples=80)
@given(st.integers(1, 6), st.integers(1, 75), st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
def test_packing_follows_the_bit_stream(rows: int, columns: int, bits: int, seed: int) -> None:
    """pack_codes equals a bit-by-bit writer for every width and odd row lengths, and unpack_codes inverts it."""
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert [row.tobytes().hex() for row in packed] == [_slow_bits(codes[r : r + 1], bits) for r in range(rows)]
    assert np.array_equal(unpack_codes(packed, columns, bits), codes)


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("grid", [{"group_size": 32}, {"group_size": -1}, {"group_size": 64, "bits": 3}])
def test_checkpoint_equals_the_training_forward(
    kind: str, grid: dict[str, int], glassllm_dir: Path, tmp_path: Path
) -> None:
    """Real model: every saved weight dequantizes bit for bit to the weight the training forward used."""
    quant = QuantConfig(zero_point=kind, **grid)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    report = wrap_linears(model, quant, LoraConfig(rank=4), skip_indivisible=True)
    disturb(model)
    model.eval()
    ids = torch.arange(40)[None] * 11 % 1000
    with torch.no_grad():
        trained = model(ids).logits
    save_l4q(model, tmp_path / "ckpt", quant=quant, side_files_from=glassllm_dir)
    checkpoint = L4QCheckpoint.open(tmp_path / "ckpt")
    layers = dict(l4q_layers(model))
    assert set(checkpoint.modules) == set(layers) == set(report.wrapped)
    assert len(layers) == (28 if grid["group_size"] == -1 else 24)
    for module in checkpoint.modules:
        assert (
            compare_bits(checkpoint.quantized(module).dequantize(), layers[module].quantized_weight().numpy()) is None
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
        assert torch.equal(loaded.dequantize(torch.float32)(ids).logits, trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "ckpt")("Call me Ishmael.")["input_ids"]


def test_loaded_model_generates_and_saves_again(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A checkpoint loaded by transformers generates, and save_pretrained writes the same integers."""
    source = glass_checkpoint("integer", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 3
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_import_is_light() -> None:
    """`import l4q` loads neither torch nor transformers, and still registers when transformers comes later."""
    script = (
        "import sys, l4q; assert not {'torch', 'transformers', 'onnx', 'gguf', 'vllm'} & set(sys.modules), 'heavy';"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'l4q' in m"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_many_shards_and_an_oversized_tensor(tmp_path: Path) -> None:
    """Shards respect the limit, a tensor larger than the limit gets its own, and none is empty."""
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    for number in range(5):
        size = 2000 if number == 0 else 100
        writer.add({f"t{number}": torch.full((size,), number, dtype=torch.float32)}, {f"t{number}": "x"})
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert all(load_file(tmp_path / name) for name in files)
    assert index["weight_map"]["t0"] != index["weight_map"]["t1"]


def test_sharded_checkpoint_opens(
    glass_checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint split over many files reads like the same checkpoint in one."""
    source = L4QCheckpoint.open(glass_checkpoint("none", group_size=32))
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (50_000,))
    save_checkpoint(
        tmp_path / "split",
        config=source.config,
        weights=((module, source.quantized(module)) for module in source.modules),
        dense=((name, source.dense(name)) for name in source.dense_names),
        quant=source.quant,
    )
    split = L4QCheckpoint.open(tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    assert split.modules == source.modules
    assert split.dense_names == source.dense_names
    for module in source.modules:
        assert compare_bits(split.quantized(module).dequantize(), source.quantized(module).dequantize()) is None


@pytest.mark.parametrize("grid", [("none", 32), ("integer", 32), ("float", 64)])
def test_a_planned_checkpoint_is_the_same(
    grid: tuple[Any, int], glass_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """What is frozen into its place has the bytes of what is collected first, manifest included."""
    planned = glass_checkpoint(grid[0], group_size=grid[1])
    source = L4QCheckpoint.open(planned)
    save_checkpoint(
        tmp_path / "collected",
        config=source.config,
        weights=((module, source.packed(module)) for module in source.modules),
        dense=((name, source.dense(name)) for name in source.dense_names),
        quant=source.quant,
        modules_to_not_convert=source.config["quantization_config"]["modules_to_not_convert"],
        side_files=source.side_files(),
    )
    names = {path.name for path in planned.iterdir()}
    assert names == {path.name for path in (tmp_path / "collected").iterdir()}
    for name in names:
        assert (tmp_path / "collected" / name).read_bytes() == (planned / name).read_bytes(), name


def test_natural_order() -> None:
    """layers.2 comes before layers.10."""
    assert sorted(["a.10.x", "a.2.x", "a.2.b"], key=natural_order) == ["a.2.b", "a.2.x", "a.10.x"]


Damage = Callable[[Path], object]


def _edit_config(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors import safe_open

        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return damage


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


Q = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "config.json not found"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "a weight file is missing"),
    "truncated": (_truncate, "not valid safetensors"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "another method": (
        _edit_config(lambda c: c["quantization_config"].update(quant_method="gptq")),
        "not an L4Q checkpoint",
    ),
    "no grid": (_edit_config(lambda c: c.pop("quantization_config")), "not an L4Q checkpoint"),
    "future version": (_edit_config(lambda c: c["quantization_config"].update(format_version=9)), "format version"),
    "bits 1000": (_edit_config(lambda c: c["quantization_config"].update(bits=1000)), "bits has an unsupported value"),
    "group 0": (_edit_config(lambda c: c["quantization_config"].update(group_size=0)), "group_size has an unsupported"),
    "missing scales": (_edit_tensors(lambda t: t.pop(f"{Q}.scales")), "scales is missing"),
    "extra zeros": (
        _edit_tensors(lambda t: t.update({f"{Q}.zeros": torch.ones(128, 4, dtype=torch.uint8)})),
        "not allowed",
    ),
    "wrong shape": (
        _edit_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :2].clone()})),
        "wrong dtype or shape",
    ),
    "wrong dtype": (
        _edit_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()})),
        "wrong dtype or shape",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused_on_opening(
    name: str, glass_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """Each kind of damage is one UsageError when the folder is opened, before any tensor is used."""
    damage, message = DAMAGES[name]
    folder = tmp_path / "ckpt"
    shutil.copytree(glass_checkpoint("none", group_size=32), folder)
    damage(folder)
    with pytest.raises(UsageError, match=message):
        L4QCheckpoint.open(folder)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0, -0.01])
def test_poisoned_scales_are_refused_on_reading(
    poison: float, glass_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """NaN, infinite, zero and negative scales stop with the tensor's name."""
    folder = tmp_path / "ckpt"
    shutil.copytree(glass_checkpoint("none", group_size=32), folder)
    _edit_tensors(lambda tensors: tensors[f"{Q}.scales"].__setitem__((3, 1), poison))(folder)
    with pytest.raises(UsageError, match="invalid quantized weight: scales") as caught:
        L4QCheckpoint.open(folder).quantized(Q)
    assert f"{Q}.scales" in str(caught.value)


def test_group_size_that_does_not_divide(glassllm_dir: Path) -> None:
    """Group 64 on 341 columns lists the layers and the sizes that fit, and wraps nothing."""
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    with pytest.raises(UsageError, match="the group size does not divide in_features of some layers") as caught:
        wrap_linears(model, QuantConfig(), LoraConfig())
    assert "down_proj" in str(caught.value)
    assert "only -1" in str(caught.value)
    assert not list(l4q_layers(model))


def test_pattern_that_matches_nothing(glassllm_dir: Path) -> None:
    """A typo in a target pattern is an error that shows the names there are."""
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    with pytest.raises(UsageError, match="matches no linear layer") as caught:
        wrap_linears(model, QuantConfig(group_size=32), LoraConfig(target_modules=("q_proj", "qproj")))
    assert "q_proj" in str(caught.value)


def test_existing_folder_is_refused(glass_checkpoint: CheckpointMaker) -> None:
    """A checkpoint is never overwritten unasked, and a failing write leaves nothing behind."""
    source = glass_checkpoint("none", group_size=32)
    opened = L4QCheckpoint.open(source)
    with pytest.raises(UsageError, match="already exists"):
        save_checkpoint(source, config={}, weights=[], dense=[], quant=opened.quant)

    def failing():  # type: ignore[no-untyped-def]
        yield Q, opened.quantized(Q)
        raise RuntimeError("disk on fire")

    target = source.parent / "never"
    with pytest.raises(RuntimeError, match="on fire"):
        save_checkpoint(target, config={}, weights=failing(), dense=[], quant=opened.quant)
    assert not [path for path in source.parent.iterdir() if "never" in path.name]
