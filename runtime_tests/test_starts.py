"""Pre-quantized starts: read as foreign decoders read them, taken over bit for bit, refused where they cannot be."""

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
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from transformers import AutoTokenizer

from exporters import gguf as gguf_exporter
from exporters import gptq as gptq_exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.init import Start
from l4q.model import WrapReport, l4q_layers, wrap_linears
from l4q.quant import grid_params
from l4q.starts import open_start
from l4q.starts.gguf_blocks import LINEAR_TYPES, integer_points
from l4q.starts.grid import LinearGrid
from l4q.starts.match import fit_scale_grid, match_grid
from l4q.starts.stream import unpack_words
from l4q.train import train
from l4q.train_options import EvalOptions, OptimOptions, TrainOptions
from runtime_tests import start_files as files
from runtime_tests.gguf_models import export_gguf
from runtime_tests.gguf_models import make_checkpoint as gguf_checkpoint
from runtime_tests.tiny_llama import tiny_checkpoint

KINDS = ("none", "integer")


def opened(path: Path) -> Any:
    """The start at a path, which must be one."""
    start = open_start(str(path))
    assert start is not None
    return start


def fp16_grid(**grid: Any) -> QuantConfig:
    """A grid whose scales may be any fp16 number, as those of random weights are."""
    return QuantConfig(**{"scale_grid": "fp16", **grid})


def values_of(start: Any, module: str) -> np.ndarray:
    """What the reader makes of a module."""
    return start.grid(module).dequantize().numpy()


def wrong_modules(start: Any, checkpoint: L4QCheckpoint) -> list[str]:
    """Modules whose bits differ from those the folder was made from."""
    return [
        module
        for module in checkpoint.modules
        if not np.array_equal(
            values_of(start, module).view(np.uint32), checkpoint.quantized(module).dequantize().view(np.uint32)
        )
    ]


def shift(name: str, by: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """An edit that adds a number to one 16-bit word of a tensor."""
    return lambda tensors: tensors[name].view(torch.int16)[0, 3].add_(by)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("kind", "group_size"), [("none", 64), ("integer", 32), ("integer", -1)])
def test_gptq_is_read_as_by_compressed_tensors(
    tmp_path: Path, kind: str, group_size: int, checkpoint_format: str
) -> None:
    """Every module equals what compressed-tensors' decoder makes of it; a changed nibble, zero or scale is noticed."""
    checkpoint = files.gptq_folder(tmp_path, fp16_grid(zero_point=kind, group_size=group_size), checkpoint_format)
    folder, module = tmp_path / "model", checkpoint.modules[3]
    start = opened(folder)
    foreign = dict(gptq_exporter.read_back(folder))
    assert set(start.modules()) == set(foreign) == set(checkpoint.modules)
    assert all(np.array_equal(values_of(start, name), foreign[name]) for name in foreign)
    for part in ("qweight", "scales", *(("qzeros",) if kind == "integer" else ())):
        files.edit_tensors(folder, shift(f"{module}.{part}", 16))
        assert wrong_modules(opened(folder), checkpoint) == [module]
        files.edit_tensors(folder, shift(f"{module}.{part}", -16))
    assert wrong_modules(opened(folder), checkpoint) == []


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_with_three_bits(tmp_path: Path, kind: str) -> None:
    """Dense 3-bit GPTQ is read exactly; Python's integers decode the same words alike."""
    checkpoint = tiny_checkpoint(tmp_path, fp16_grid(bits=3, zero_point=kind, group_size=64))
    section = {"quant_method": "gptq", "bits": 3, "group_size": 64, "desc_act": False, "sym": kind == "none"}
    folder = files.packed_folder(tmp_path / "gptq", checkpoint, section, files.gptq_parts)
    assert wrong_modules(opened(folder), checkpoint) == []
    weight = checkpoint.quantized(checkpoint.modules[0])
    codes, words = weight.codes, files.dense_words(weight.codes, 3)
    assert torch.equal(words.T, files.gptq_parts(weight)["qweight"])
    assert np.array_equal(unpack_words(words, codes.shape[1], 3, "test").numpy(), codes)
    words[1, 0] ^= 1 << 31
    assert not np.array_equal(unpack_words(words, codes.shape[1], 3, "test").numpy(), codes)


@pytest.mark.parametrize(("kind", "group_size"), [("none", 64), ("integer", 32), ("integer", -1), ("none", -1)])
def test_compressed_tensors_is_read_as_by_its_own_decoder(tmp_path: Path, kind: str, group_size: int) -> None:
    """Folders packed by compressed-tensors, symmetric and not, groups and channels, are read back exactly."""
    checkpoint = tiny_checkpoint(tmp_path, fp16_grid(zero_point=kind, group_size=group_size))
    strategy = {"strategy": "channel", "group_size": None} if group_size == -1 else {"strategy": "group"}
    section = files.ct_section({"num_bits": 4, "symmetric": kind == "none", "group_size": group_size, **strategy})
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.ct_parts)
    start, module = opened(folder), checkpoint.modules[2]
    assert wrong_modules(start, checkpoint) == []
    parts = files.ct_parts(checkpoint.quantized(module))
    foreign = unpack_from_int32(parts["weight_packed"], 4, torch.Size(checkpoint.quantized(module).shape))
    assert torch.equal(start.grid(module).codes.to(torch.int8) - 8, foreign)
    files.edit_tensors(folder, lambda tensors: tensors[f"{module}.weight_packed"][1, 1].add_(1 << 8))
    assert wrong_modules(opened(folder), checkpoint) == [module]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_with_three_bits_and_several_groups(tmp_path: Path, kind: str) -> None:
    """Dense 3-bit words, a pattern that overrides "Linear", and bfloat16 scales."""
    checkpoint = tiny_checkpoint(tmp_path, fp16_grid(bits=3, zero_point=kind, group_size=32))
    weights = {"num_bits": 3, "symmetric": kind == "none", "strategy": "group", "group_size": 32, "type": "int"}
    groups = {
        "wide": {"targets": ["Linear"], "weights": {**weights, "num_bits": 4}},
        "narrow": {"targets": ["re:.*_proj$"], "weights": weights},
    }
    section = files.ct_section({}, config_groups=groups)
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.dense_ct_parts)
    assert wrong_modules(opened(folder), checkpoint) == []
    module = checkpoint.modules[0]
    files.edit_tensors(
        folder, lambda t: t.update({f"{module}.weight_scale": t[f"{module}.weight_scale"].to(torch.bfloat16)})
    )
    grid = opened(folder).grid(module)
    assert torch.equal(grid.scales, torch.from_numpy(checkpoint.quantized(module).scales).to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", KINDS)
def test_awq_is_read_as_by_compressed_tensors(tmp_path: Path, kind: str) -> None:
    """Codes, scales and zero-points equal those of compressed-tensors' AutoAWQ converter; a nibble swap is noticed."""
    checkpoint = tiny_checkpoint(tmp_path, fp16_grid(zero_point=kind, group_size=32))
    section = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": kind == "integer", "version": "gemm"}
    folder = files.packed_folder(tmp_path / "awq", checkpoint, section, files.awq_parts)
    start, module = opened(folder), checkpoint.modules[5]
    assert wrong_modules(start, checkpoint) == []
    parts = files.awq_parts(checkpoint.quantized(module))
    codes, scales, zeros = AutoAWQConverter(group_size=32)._convert_gemm_module(
        parts["qweight"], parts["scales"], parts["qzeros"]
    )
    assert zeros is not None
    spread = [part.float().repeat_interleave(32, dim=1) for part in (zeros, scales)]
    assert np.array_equal(values_of(start, module), ((codes.float() - spread[0]) * spread[1]).numpy())
    files.edit_tensors(folder, lambda tensors: tensors[f"{module}.qweight"][0, 0].bitwise_xor_(0x11))
    assert wrong_modules(opened(folder), checkpoint) == [module]


def block_grid(kind: str, values: np.ndarray) -> tuple[LinearGrid, np.ndarray]:
    """gguf's own blocks of some values: the grid read from them, and gguf's dequantization."""
    number = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values, number)
    bits, read = LINEAR_TYPES[kind]
    codes, scales, mins = (None if part is None else torch.from_numpy(part) for part in read(data))
    assert codes is not None
    assert scales is not None
    points = None if mins is None else integer_points(scales, mins, 15)
    grid = LinearGrid.build(codes, scales, points, mins if points is None else None, bits=bits, where=kind)
    return grid, gguf.quants.dequantize(data, number)


@pytest.mark.parametrize(("kind", "fits"), [("Q4_0", "integer"), ("Q4_1", "float"), ("Q8_0", None)])
def test_gguf_blocks_are_read_as_by_gguf(kind: str, fits: str | None) -> None:
    """Blocks quantized by gguf, zero blocks included, give gguf's own values (zero's sign aside) and fit their grid."""
    values = (np.random.default_rng(1).standard_normal((40, 96)) * 0.1).astype(np.float32)
    values[3, 32:64] = 0
    grid, foreign = block_grid(kind, values)
    assert np.array_equal(grid.dequantize().numpy(), foreign)
    if fits is None:
        assert isinstance(match_grid(grid, fp16_grid(group_size=32)), str)
        return
    quant = fp16_grid(group_size=32, zero_point=fits)
    found = match_grid(grid, quant)
    assert isinstance(found, Start)
    params = grid_params(*found, quant)
    again = grid.codes.view(40, 3, 32) * params.scales.unsqueeze(-1) + params.mins.unsqueeze(-1)
    assert np.array_equal(again.view(40, 96).numpy(), foreign)
    narrower = "none" if fits == "integer" else "integer"
    assert f"--zero-point {fits}" in str(match_grid(grid, fp16_grid(group_size=32, zero_point=narrower)))
    grid.codes[0, 0] ^= 1
    assert not np.array_equal(grid.dequantize().numpy(), foreign)


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
    checkpoint = files.gptq_folder(tmp_path, fp16_grid(zero_point=kind))
    start = opened(tmp_path / "model")
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
    files.gptq_folder(tmp_path, fp16_grid(zero_point="integer", group_size=32))
    start = opened(tmp_path / "model")
    model, _ = start.load(torch.float32)
    plain, _ = start.load(torch.float32)
    quant = fp16_grid(**{"zero_point": "integer", "group_size": 32, **grid})
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
    assert isinstance(match_grid(finer, fp16_grid(group_size=64)), Start)


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
    files.gptq_folder(tmp_path, fp16_grid(zero_point="integer", group_size=32))
    opened(tmp_path / "model").load(torch.float32)
    damage(tmp_path / "model")
    with pytest.raises(error, match=message):
        opened(tmp_path / "model").load(torch.float32)


def test_padded_three_bit_words_are_refused(tmp_path: Path) -> None:
    """The layout of compressed-tensors before 0.18, ten 3-bit values a word, is not mistaken for dense words."""
    checkpoint = tiny_checkpoint(tmp_path, fp16_grid(bits=3, zero_point="none", group_size=32))
    section = files.ct_section({"num_bits": 3, "symmetric": True, "strategy": "group", "group_size": 32})
    folder = files.packed_folder(tmp_path / "ct", checkpoint, section, files.ct_parts)
    with pytest.raises(UsageError, match=r"(?s)wrong size.*dense"):
        opened(folder).grid(checkpoint.modules[0])


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
    start = opened(path)
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
    start = opened(target)
    model, _ = start.load(torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items() if files.is_linear(n.removesuffix(".weight"))}
    report = wrap_linears(model, fp16_grid(zero_point=kind, group_size=32), LoraConfig(rank=2), start=start)
    assert len(report.reproduced) == (len(before) if taken else 0)
    if taken:
        assert reproduces(model, report, lambda module: before[f"{module}.weight"].numpy())
    else:
        assert "no linear grid" in "\n".join(report.describe_start())
        fresh, _ = start.load(torch.float32)
        with pytest.raises(UsageError, match="base-storage start"):
            wrap_linears(fresh, fp16_grid(group_size=32), LoraConfig(rank=2), start=start, storage="start")


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
        files.gptq_folder(tmp_path, fp16_grid(zero_point="integer"), vocab_size=1024)
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
