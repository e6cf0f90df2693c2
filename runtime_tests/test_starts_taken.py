"""Pre-quantized starts in training: taken over bit for bit, begun anew with a word, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from exporters import gguf as gguf_exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.init import Start
from l4q.model import WrapReport, l4q_layers, wrap_linears
from l4q.starts import open_start
from l4q.starts.grid import LinearGrid
from l4q.starts.match import fit_scale_grid, match_grid
from l4q.train import train
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions
from runtime_tests import start_files as files
from runtime_tests.gguf_models import export_gguf
from runtime_tests.gguf_models import make_checkpoint as gguf_checkpoint
from runtime_tests.tiny_llama import tiny_checkpoint

KINDS = ("none", "integer")


def reproduces(model: Any, report: WrapReport, expected: Callable[[str], np.ndarray]) -> bool:
    """Whether every layer was taken over and multiplies with the expected bits."""
    layers = dict(l4q_layers(model))
    return set(report.reproduced) == set(layers) and all(
        np.array_equal(layer.quantized_weight().numpy(), expected(name))
        and np.array_equal(layer.freeze(name).dequantize(), expected(name))
        for name, layer in layers.items()
    )


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny llamas of these tests have none."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["dense", "start", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_is_the_start_bit_for_bit(tmp_path: Path, kind: str, storage: Any, dtype: torch.dtype) -> None:
    """A GPTQ start trains from exactly its own weights, whatever W0 is stored as and the model's dtype."""
    checkpoint = files.gptq_folder(tmp_path, files.fp16_grid(zero_point=kind))
    start = files.opened(tmp_path / "model")
    model, _ = start.load(dtype)
    quant = fit_scale_grid(map(start.grid, start.modules()), QuantConfig(zero_point=kind))  # type: ignore[arg-type]
    assert quant.scale_grid == "fp16"
    report = wrap_linears(model, quant, LoraConfig(rank=2), start=start, storage=storage)
    assert reproduces(model, report, lambda name: checkpoint.quantized(name).dequantize())
    layer = dict(l4q_layers(model))[checkpoint.modules[0]]
    with torch.no_grad():  # the twin: one code further
        layer.lora_A[:, 0], layer.lora_B[0] = 0.5, float(layer.scales[0, 0])
    assert not reproduces(model, report, lambda name: checkpoint.quantized(name).dequantize())


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"bits": 3}, "--bits 4 --group-size 32 --zero-point integer"),
        ({"zero_point": "none"}, "--zero-point integer"),
        ({"group_size": 64}, "--group-size 32"),
        ({"scale_grid": "fp16_s7"}, "--scale-grid fp16 would"),
    ],
)
def test_another_grid_starts_anew_and_says_so(tmp_path: Path, grid: dict[str, Any], message: str) -> None:
    """Grids that cannot hold the start's integers are initialised as usual, with the grid that would fit named."""
    files.gptq_folder(tmp_path, files.fp16_grid(zero_point="integer", group_size=32))
    start = files.opened(tmp_path / "model")
    model, _ = start.load(torch.float32)
    plain, _ = start.load(torch.float32)
    quant = files.fp16_grid(**{"zero_point": "integer", "group_size": 32, **grid})
    torch.manual_seed(0)
    report = wrap_linears(model, quant, LoraConfig(rank=2), start=start)
    torch.manual_seed(0)
    wrap_linears(plain, quant, LoraConfig(rank=2))
    assert report.reproduced == ()
    assert message in "\n".join(report.describe_start())
    assert all(
        torch.equal(a.scales, b.scales) for (_, a), (_, b) in zip(l4q_layers(model), l4q_layers(plain), strict=True)
    )


def test_groups_may_be_split_and_joined() -> None:
    """A finer grid always holds the start; a coarser one where neighbours share scale and zero-point."""
    weight = torch.randint(0, 16, (4, 128), dtype=torch.uint8)
    scales = torch.rand(4, 2).half() * 0.01 + 0.001
    grid = LinearGrid.build(weight, scales, bits=4, where="test")
    finer = grid.regroup(32)
    assert finer is not None
    assert torch.equal(finer.dequantize(), grid.dequantize())
    joined = finer.regroup(64)
    assert joined is not None
    assert torch.equal(joined.scales, grid.scales)
    assert finer.regroup(128) is None
    assert isinstance(match_grid(finer, files.fp16_grid(group_size=64)), Start)


def remove(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Forget a tensor."""
    return lambda tensors: tensors.pop(name)


UP = "model.layers.0.mlp.up_proj"
DAMAGES: list[tuple[Callable[[Path], object], type[L4QError], str]] = [
    (lambda f: files.edit_tensors(f, lambda t: t[f"{UP}.g_idx"].add_(1)), UsageError, "g_idx does not give"),
    (lambda f: files.edit_section(f, sym=True), UsageError, "the config says sym: true, but the zero-points"),
    (lambda f: files.edit_section(f, bits=5), UnsupportedError, "unsupported bits"),
    (lambda f: files.edit_section(f, checkpoint_format="marlin"), UnsupportedError, "checkpoint_format"),
    (lambda f: files.edit_section(f, quant_method="bitsandbytes"), UnsupportedError, "no reader"),
    (
        lambda f: files.edit_section(f, quant_method="compressed-tensors"),
        UnsupportedError,
        "compressed-tensors variant",
    ),
    (lambda f: files.edit_section(f, quant_method="awq", version="gemv"), UnsupportedError, "AWQ variant"),
    (lambda f: files.edit_tensors(f, remove(f"{UP}.scales")), UsageError, r"(?s)incomplete.*scales"),
    (lambda f: files.edit_tensors(f, remove("model.norm.weight")), UsageError, r"(?s)tensors are not.*norm"),
    (
        lambda f: files.edit_tensors(f, lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-1]})),
        UsageError,
        "wrong size",
    ),
    (
        lambda f: files.edit_tensors(f, lambda t: t[f"{UP}.scales"][0, 0].fill_(float("nan"))),
        UsageError,
        r"(?s)scales.*NaN",
    ),
]


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], error: type[L4QError], message: str
) -> None:
    """Damaged orders, lies in the config, unknown variants and damaged files stop with a message that names them."""
    files.gptq_folder(tmp_path, files.fp16_grid(zero_point="integer", group_size=32))
    files.opened(tmp_path / "model").load(torch.float32)
    damage(tmp_path / "model")
    with pytest.raises(error, match=message):
        files.opened(tmp_path / "model").load(torch.float32)


def test_padded_three_bit_words_are_refused(tmp_path: Path) -> None:
    """The layout of compressed-tensors before 0.18, ten 3-bit values a word, is not mistaken for dense words."""
    checkpoint = tiny_checkpoint(tmp_path, files.fp16_grid(bits=3, zero_point="none", group_size=32))
    section = files.ct_section({"num_bits": 3, "symmetric": True, "strategy": "group", "group_size": 32})
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.ct_parts)
    with pytest.raises(UsageError, match=r"(?s)wrong size.*dense"):
        files.opened(folder).grid(checkpoint.modules[0])


def gguf_start(folder: Path, grid: dict[str, Any], **options: Any) -> tuple[L4QCheckpoint, Path]:
    """Our own GGUF export of a random llama with a byte-level tokenizer."""
    checkpoint = gguf_checkpoint(folder / "l4q", QuantConfig(**grid))
    files.byte_tokenizer(checkpoint.path)
    export_gguf(checkpoint, folder / "gguf", **options)
    return checkpoint, next((folder / "gguf").glob("*.gguf"))


@pytest.mark.parametrize(("kind", "storage"), [("none", "start"), ("integer", "dense"), ("float", "start")])
def test_a_gguf_file_is_taken_over_bit_for_bit(tmp_path: Path, kind: str, storage: Any) -> None:
    """Q4_0 and Q4_1 exports: loaded as gguf decodes them, permuted q and k included, and trained from those bits."""
    grid = {"zero_point": kind, "group_size": 32}
    checkpoint, path = gguf_start(tmp_path, grid)
    start = files.opened(path)
    model, tokenizer = start.load(torch.float32)
    foreign = dict(gguf_exporter.read_back(path.parent))
    state = model.state_dict()
    assert all(np.array_equal(state[f"{name}.weight"].numpy(), values) for name, values in foreign.items())
    report = wrap_linears(model, QuantConfig(**grid), LoraConfig(rank=2), start=start, storage=storage)  # type: ignore[arg-type]
    assert reproduces(model, report, lambda name: checkpoint.quantized(name).dequantize())
    reference = AutoTokenizer.from_pretrained(checkpoint.path)
    for text in ("a  12", "in 1912, 12 of  them"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == (files.SPECIAL, "{{ messages }}")
    assert model.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("name", "kind", "taken"), [("Q4_0", "integer", True), ("Q4_1", "float", True), ("Q5_1", "integer", False)]
)
def test_gguf_types_of_other_writers(tmp_path: Path, name: str, kind: str, taken: bool) -> None:
    """Files quantized by gguf itself: linear types are taken over, others dequantized, initialised anew and noted."""
    _, path = gguf_start(tmp_path, {"group_size": 32}, gguf_type="F32")
    target = files.requantized(path, tmp_path / "other.gguf", gguf.GGMLQuantizationType[name])
    start = files.opened(target)
    model, _ = start.load(torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items() if files.is_linear(n.removesuffix(".weight"))}
    report = wrap_linears(model, files.fp16_grid(zero_point=kind, group_size=32), LoraConfig(rank=2), start=start)
    assert len(report.reproduced) == (len(before) if taken else 0)
    if taken:
        assert reproduces(model, report, lambda module: before[f"{module}.weight"].numpy())
    else:
        assert "no linear grid" in "\n".join(report.describe_start())
        fresh, _ = start.load(torch.float32)
        with pytest.raises(UsageError, match="base-storage start"):
            wrap_linears(fresh, files.fp16_grid(group_size=32), LoraConfig(rank=2), start=start, storage="start")


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    """A missing file, another kind of file and a truncated one stop before anything is loaded."""
    _, path = gguf_start(tmp_path, {"group_size": 32})
    with pytest.raises(UsageError, match="cannot be read"):
        open_start(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UsageError, match="not a GGUF file"):
        open_start(str(tmp_path / "text.gguf"))
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match="truncated or damaged"):
        open_start(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("source", ["gptq", "gguf"])
def test_a_run_from_a_start(glassllm_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str) -> None:
    """l4q-train on a GPTQ folder and a GGUF file: base and step-0 perplexity equal, and the checkpoint opens."""
    if source == "gptq":
        files.gptq_folder(tmp_path, files.fp16_grid(zero_point="integer"), vocab_size=1024)
        model, grid = tmp_path / "model", QuantConfig(zero_point="integer")
        files.copy_tokenizer(glassllm_dir, model)
    else:
        _, model = gguf_start(tmp_path, {"zero_point": "integer", "group_size": 32})
        grid = QuantConfig(zero_point="integer", group_size=32)
    (tmp_path / "text.txt").write_text("in the  year 1912 a  tiny model learned 12 words. " * 40)
    options = TrainOptions(
        model=str(model),
        data=(tmp_path / "text.txt",),
        out=tmp_path / "run",
        quant=grid,
        lora=LoraConfig(rank=2),
        optim=OptimOptions(lr=0.1),  # weights that start on grid points move only past half a step
        base_storage="start",
        steps=2,
        max_length=64,
        evaluation=EvalOptions(text=tmp_path / "text.txt", window=32, windows=2),
    )
    with caplog.at_level(logging.INFO):
        result = train(options)
    assert result["perplexity"]["base"] == result["perplexity"]["start"] != result["perplexity"]["trained"]
    assert "14 layers start with the model's own integers, bit for bit" in caplog.text
    checkpoint = L4QCheckpoint.open(result["checkpoint"])
    assert checkpoint.quant.scale_grid == ("fp16" if source == "gptq" else "fp16_s7")
    assert len(checkpoint.modules) == 14
    assert checkpoint.config["_name_or_path"] == model.stem
    assert AutoTokenizer.from_pretrained(result["checkpoint"])("12  a")["input_ids"]
    if source == "gguf":
        settings = json.loads((checkpoint.path / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
