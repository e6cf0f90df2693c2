"""l4q-import: other people's integers reach a checkpoint unchanged, or the module and the reason are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.export import export, get_exporter
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_common import status
from l4q.cli_import import command
from l4q.config import QuantConfig
from l4q.errors import InexactError, UnsupportedError, UsageError
from l4q.importing import ImportOptions, import_model
from l4q.starts import open_start
from l4q.weight import QuantizedWeight
from runtime_tests import start_files as files
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.gguf_models import LLAMA3_ROPE
from runtime_tests.gguf_models import make_checkpoint as gguf_checkpoint
from runtime_tests.random_models import dequantized_model, random_weight

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
IDS = [5, 17, 250, 3, 99, 42]


def make_source(folder: Path, grid: dict[str, Any], **changes: Any) -> L4QCheckpoint:
    """A random llama on a grid, with a tokenizer."""
    checkpoint = gguf_checkpoint(folder / "l4q", QuantConfig(**grid), **changes)
    files.byte_tokenizer(checkpoint.path)
    return checkpoint


def exported(checkpoint: L4QCheckpoint, name: str, folder: Path, **options: Any) -> Path:
    """An export, and the path that l4q-import takes."""
    export(checkpoint, name, folder, ExportOptions(**options))
    return next(folder.glob("*.gguf"), folder)


def imported(source: Path, out: Path, **options: Any) -> L4QCheckpoint:
    """The checkpoint l4q-import makes of a source."""
    import_model(ImportOptions(source=str(source), out=out, **options))
    return L4QCheckpoint.open(out)


def parts(weight: QuantizedWeight) -> list[np.ndarray]:
    """Everything a weight consists of."""
    return [part for part in (weight.codes, weight.scales, weight.zeros, weight.mins) if part is not None]


def differing(left: L4QCheckpoint, right: L4QCheckpoint) -> list[str]:
    """Modules whose integers, zero-points, scales or mins differ."""
    assert left.modules == right.modules
    pairs = {name: (parts(left.quantized(name)), parts(right.quantized(name))) for name in left.modules}
    return [
        name
        for name, (a, b) in pairs.items()
        if len(a) != len(b) or any(x.dtype != y.dtype or not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    ]


def same_values(checkpoint: L4QCheckpoint, expected: dict[str, np.ndarray]) -> bool:
    """Whether every module of a checkpoint dequantizes to the expected values (the sign of a zero aside)."""
    return set(expected) == set(checkpoint.modules) and all(
        np.array_equal(checkpoint.quantized(name).dequantize(), values) for name, values in expected.items()
    )


def flip(source: Path) -> None:
    """One bit of one module."""
    if source.is_dir():
        name = "weight_packed" if (source / "config.json").read_text().count("pack-quantized") else "qweight"
        files.edit_tensors(source, lambda tensors: tensors[f"{UP}.{name}"].view(torch.int32)[0, 1].bitwise_xor_(1 << 9))
        return
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.0.ffn_up.weight")
    data = bytearray(source.read_bytes())
    data[int(tensor.data_offset) + 7] ^= 0x10
    source.write_bytes(data)


CELLS = [
    *((name, kind) for name in ("gptq", "awq", "compressed-tensors", "gguf") for kind in ("none", "integer")),
    ("gguf", "float"),
]


@pytest.mark.parametrize(("name", "kind"), CELLS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_exports_come_back_as_the_same_integers(tmp_path: Path, name: str, kind: str, group_size: int) -> None:
    """Export, import, export: equal integers and tensors, equal to foreign decoders; one flipped bit is one module."""
    origin = make_source(tmp_path, {"zero_point": kind, "group_size": group_size})
    source = exported(origin, name, tmp_path / "first")
    checkpoint = imported(source, tmp_path / "import")
    assert differing(checkpoint, origin) == []
    assert checkpoint.quant == origin.quant
    assert same_values(checkpoint, dict(get_exporter(name).read_back(tmp_path / "first")))
    assert checkpoint.dense_names == origin.dense_names
    for tensor in origin.dense_names:
        assert torch.equal(checkpoint.dense(tensor), origin.dense(tensor).to(checkpoint.dense(tensor).dtype))
    again = exported(checkpoint, name, tmp_path / "second")
    assert tensors_of(again) == tensors_of(source)
    flip(source)
    assert differing(imported(source, tmp_path / "twin"), origin) == [UP]


def tensors_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes by name, of a folder or a GGUF file."""
    if path.is_file():
        return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def test_gptq_reaches_llama_cpps_file_without_quantizing(tmp_path: Path) -> None:
    """GPTQ -> import -> GGUF gives the file that the model's own export gives, and transformers runs the import."""
    origin = make_source(tmp_path, {"group_size": 32})
    source = exported(origin, "gptq", tmp_path / "gptq", dtype="float32")
    checkpoint = imported(source, tmp_path / "import")
    assert tensors_of(exported(checkpoint, "gguf", tmp_path / "a")) == tensors_of(
        exported(origin, "gguf", tmp_path / "b")
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager")
    with torch.no_grad():
        got, expected = model(torch.tensor([IDS])).logits, dequantized_model(origin)(torch.tensor([IDS])).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(checkpoint.path)("a  12") == AutoTokenizer.from_pretrained(origin.path)(
        "a  12"
    )


@pytest.mark.parametrize(("kind", "zero_point"), [("Q4_0", "integer"), ("Q4_1", "float")])
def test_gguf_files_of_other_writers(tmp_path: Path, kind: str, zero_point: str) -> None:
    """Blocks that gguf quantized: gguf's own values, and an export goes back into the same bytes."""
    origin = exported(make_source(tmp_path, {"group_size": 32}), "gguf", tmp_path / "f32", gguf_type="F32")
    source = files.requantized(origin, tmp_path / "other.gguf", gguf.GGMLQuantizationType[kind])
    checkpoint = imported(source, tmp_path / "import")
    assert checkpoint.quant.zero_point == zero_point
    start = open_start(str(source))
    assert start is not None
    state = start.load(torch.float32)[0].state_dict()  # transformers' own dequantization and row order
    expected = {name: state[f"{name}.weight"].numpy() for name in checkpoint.modules}
    assert same_values(checkpoint, expected)
    assert checkpoint.config["_name_or_path"] == "other"
    expected[DOWN][3, 5] += 1e-4
    assert not same_values(checkpoint, expected)
    again = exported(checkpoint, "gguf", tmp_path / "again")
    assert tensors_of(again) == tensors_of(source)


def gptq_source(folder: Path, bits: int = 4, **changes: Any) -> tuple[L4QCheckpoint, Path]:
    """A random llama and its GPTQ folder, bits from one to the other through our packer at any number of bits."""
    origin = make_source(folder, {"zero_point": "integer", "group_size": 32, "bits": bits}, **changes)
    section = {"quant_method": "gptq", "bits": origin.quant.bits, "group_size": 32, "desc_act": False, "sym": False}
    source = files.packed_folder(folder / "gptq", origin, section, files.gptq_parts)
    files.copy_tokenizer(origin.path, source)
    return origin, source


def replace_module(source: Path, name: str, weight: QuantizedWeight) -> None:
    """Other integers for one module of a GPTQ folder, with a `dynamic` rule where its bits are others."""
    new = files.gptq_parts(weight)
    files.edit_tensors(source, lambda tensors: tensors.update({f"{name}.{part}": new[part] for part in new}))
    files.edit_section(source, dynamic={f"+:{name}$": {"bits": weight.bits, "group_size": weight.group_size}})


def reorder(source: Path) -> None:
    """Activation order: the columns of a module dealt out to its groups at random."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(96) // 32).astype(np.int32))
    files.edit_tensors(source, lambda tensors: tensors.update({f"{UP}.g_idx": order}))


def wide_scales(source: Path) -> None:
    """Scales of a module in float32, with bits that fp16 has not."""
    files.edit_tensors(source, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float() * 1.001}))


def no_zero_point(source: Path) -> None:
    """Zero-point 0, which GPTQ stores as 15, in the first group of every row of a module."""
    files.edit_tensors(source, lambda t: t[f"{UP}.qzeros"][0].fill_(-1))


def eight_bits(source: Path) -> None:
    """One module of 8 bits."""
    files.edit_section(source, dynamic={f"+:{UP}$": {"bits": 8}})
    values = torch.randint(0, 256, (160, 96), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint8)
    changed = {"qweight": files.dense_words(values, 8).T.contiguous(), "qzeros": torch.zeros(3, 40, dtype=torch.int32)}
    files.edit_tensors(source, lambda t: t.update({f"{UP}.{part}": tensor for part, tensor in changed.items()}))


def small_groups(source: Path) -> None:
    """One module in groups of 16."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1, group_size=16)
    replace_module(source, UP, weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (reorder, "activation order"),
        (wide_scales, "scales are no fp16 numbers"),
        (no_zero_point, r"zero-point 0 in \d+ groups"),
        (eight_bits, "8 bits; a checkpoint holds 2, 3, 4"),
        (small_groups, "groups of 16 columns"),
    ],
)
def test_what_the_grid_cannot_hold_is_refused_or_dense(
    tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    """The module and the reason are named before anything is written; with leave it stays dense with its own values."""
    origin, source = gptq_source(tmp_path, scale_mask=0xFFFF)
    change(source)
    with pytest.raises(InexactError, match=f"(?s){UP}.*{reason}.*--allow-dense"):
        imported(source, tmp_path / "import")
    assert not (tmp_path / "import").exists()
    checkpoint = imported(source, tmp_path / "import", allow_dense=True)
    assert set(origin.modules) - set(checkpoint.modules) == {UP}
    start = open_start(str(source))
    assert start is not None
    assert torch.equal(checkpoint.dense(f"{UP}.weight"), start.values(UP))
    assert checkpoint.dense(f"{UP}.weight").dtype == torch.float32
    assert UP in checkpoint.config["quantization_config"]["modules_to_not_convert"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert torch.equal(model.get_submodule(UP).weight, start.values(UP))


def test_activation_order_is_decoded_column_by_column(tmp_path: Path) -> None:
    """An activation-ordered weight is (q - z) * s with the group that g_idx gives each column."""
    origin, source = gptq_source(tmp_path)
    weight = origin.quantized(UP)
    reorder(source)
    order = np.random.default_rng(0).permutation(np.arange(96) // 32)
    zeros, scales = (part.astype(np.float32)[:, order] for part in (weight.integer_zeros(), weight.scales))
    start = open_start(str(source))
    assert start is not None
    assert np.array_equal(start.values(UP).numpy(), (weight.codes - zeros) * scales)
    assert not np.array_equal(start.values(UP).numpy(), weight.dequantize())


def narrow_module(source: Path) -> QuantizedWeight:
    """One module of 3 bits, whose first zero-point is 0: at 4 bits there is room to move it."""
    weight = random_weight((160, 96), QuantConfig(bits=3, group_size=32, zero_point="integer"), 1)
    replace_module(source, UP, weight)
    return weight


def coarse_module(source: Path) -> QuantizedWeight:
    """One module with a single group per row."""
    weight = random_weight((160, 96), QuantConfig(group_size=-1, zero_point="integer"), 1)
    replace_module(source, UP, weight)
    return weight


def low_module(source: Path) -> QuantizedWeight:
    """One module with zero-point 0 everywhere, and no code at the top."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1)
    lowered = QuantizedWeight(
        codes=weight.codes.clip(1), scales=weight.scales, zeros=np.ones_like(weight.scales, np.uint8), bits=4,
        group_size=32,
    )  # fmt: skip
    replace_module(source, UP, lowered)
    files.edit_tensors(source, lambda t: t[f"{UP}.qweight"].sub_(0x11111111))
    files.edit_tensors(source, lambda t: t[f"{UP}.qzeros"].fill_(-1))
    return lowered


def short_scales(source: Path) -> QuantizedWeight:
    """One module with bfloat16 scales."""
    weight = random_weight((160, 96), QuantConfig(group_size=32, zero_point="integer"), 1, scale_mask=0xFFF8)
    replace_module(source, UP, weight)
    files.edit_tensors(source, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].bfloat16()}))
    return weight


@pytest.mark.parametrize("change", [narrow_module, coarse_module, low_module, short_scales])
def test_mixed_modules_share_a_grid_without_loss(tmp_path: Path, change: Callable[[Path], QuantizedWeight]) -> None:
    """Fewer bits, coarser groups, zero-point 0 with room and bfloat16 scales all fit the grid of the other modules."""
    origin, source = gptq_source(tmp_path)
    weight = change(source)
    checkpoint = imported(source, tmp_path / "import")
    assert (checkpoint.info(UP).bits, checkpoint.info(UP).group_size) == (4, 32)
    expected = {name: origin.quantized(name).dequantize() for name in origin.modules}
    assert not same_values(checkpoint, expected)
    assert same_values(checkpoint, {**expected, UP: weight.dequantize()})


def test_the_kind_of_zero_point_can_be_asked_for(tmp_path: Path) -> None:
    """Zero-point 0 makes a whole checkpoint float where its scales allow; --zero-point integer names the module."""
    origin, source = gptq_source(tmp_path)
    no_zero_point(source)
    assert imported(source, tmp_path / "free").quant.zero_point == "float"
    with pytest.raises(InexactError, match=f"(?s)1 of 14.*{UP}.*zero-point 0"):
        imported(source, tmp_path / "whole", zero_point="integer")
    whole = imported(source, tmp_path / "whole", zero_point="integer", allow_dense=True)
    assert set(origin.modules) - set(whole.modules) == {UP}
    with pytest.raises(UnsupportedError, match="14 modules: it has zero-points off the midpoint"):
        imported(source, tmp_path / "none", zero_point="none", allow_dense=True)


def test_three_bits_stay_three_bits(tmp_path: Path) -> None:
    """A source whose modules all have 3 bits becomes a 3-bit checkpoint."""
    origin, source = gptq_source(tmp_path, bits=3)
    checkpoint = imported(source, tmp_path / "import")
    assert checkpoint.quant == origin.quant
    assert differing(checkpoint, origin) == []


def test_a_quantized_head_stays_dense(tmp_path: Path) -> None:
    """lm_head's integers become float32 values; zero biases that old GPTQ writers add are dropped, others refused."""
    origin = make_source(tmp_path, {"group_size": 32}, tie_word_embeddings=False)
    section = files.ct_section({"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32})
    source = files.packed_folder(tmp_path / "ct", origin, section, files.ct_parts)
    head = random_weight((320, 96), origin.quant, 3, group_size=32)
    new = {f"lm_head.{part}": tensor for part, tensor in files.ct_parts(head).items()}
    files.edit_tensors(source, lambda t: (t.pop("lm_head.weight"), t.update({**new, f"{UP}.bias": torch.zeros(160)})))
    plan = import_model(ImportOptions(source=str(source), out=tmp_path / "import"))
    assert "lm_head.weight" in plan.notes[0]
    checkpoint = L4QCheckpoint.open(tmp_path / "import")
    assert differing(checkpoint, origin) == []
    assert np.array_equal(checkpoint.dense("lm_head.weight").numpy(), head.dequantize())
    files.edit_tensors(source, lambda t: t[f"{UP}.bias"].fill_(1))
    with pytest.raises(UsageError, match=f"(?s)tensors are not.*{UP}.bias"):
        imported(source, tmp_path / "import", overwrite=True)


def test_rope_scaling_needs_the_config(tmp_path: Path) -> None:
    """A GGUF file whose RoPE divisors transformers' reader would drop is refused; --config brings them back."""
    origin = make_source(tmp_path, {"group_size": 32}, rope_parameters=LLAMA3_ROPE)
    source = exported(origin, "gguf", tmp_path / "gguf")
    with pytest.raises(UsageError, match=r"(?s)rope_freqs\.weight.*--config FOLDER"):
        imported(source, tmp_path / "import")
    checkpoint = imported(source, tmp_path / "import", config=origin.path)
    assert checkpoint.config["rope_parameters"] == origin.config["rope_parameters"]
    assert differing(checkpoint, origin) == []
    assert (checkpoint.path / "tokenizer.json").read_bytes() == (origin.path / "tokenizer.json").read_bytes()


def test_named_rope_scaling_needs_the_config(tmp_path: Path) -> None:
    """A scaling that stands in the metadata only is refused as well; a --config of other sizes does not fit."""
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    origin = make_source(tmp_path, {"group_size": 32}, rope_parameters=linear)
    source = exported(origin, "gguf", tmp_path / "gguf")
    with pytest.raises(UnsupportedError, match=r"(?s)RoPE scaling.*linear.*--config FOLDER"):
        imported(source, tmp_path / "import")
    assert differing(imported(source, tmp_path / "import", config=origin.path), origin) == []
    other = make_source(tmp_path / "other", {"group_size": 32}, intermediate_size=192)
    with pytest.raises(UsageError, match=r"(?s)another shape.*\[160, 96\].*\[192, 96\]"):
        imported(source, tmp_path / "import", config=other.path, overwrite=True)


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `l4q-import`."""
    monkeypatch.setattr(sys, "argv", ["l4q-import", *map(str, words)])
    return status(command)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run reports and exits as the run would; --json, --overwrite and --allow-dense; errors say what to do."""
    _, source = gptq_source(tmp_path)
    out = tmp_path / "import"
    assert run_cli(monkeypatch, source, "--out", out, "--dry-run") == 0
    assert "14 modules exact: 4 bits, groups of 32, zero-point integer" in capsys.readouterr().out
    assert not out.exists()
    reorder(source)
    assert run_cli(monkeypatch, source, "--out", out, "--dry-run") == InexactError.exit_code
    printed = capsys.readouterr()
    assert f"{UP}: activation order" in printed.out
    assert "--allow-dense" in printed.err
    assert run_cli(monkeypatch, source, "--out", out, "--allow-dense", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["exact"], result["refused"], result["checkpoint"]) == (13, 1, str(out))
    assert result["grid"] == L4QCheckpoint.open(out).quant.to_dict()
    assert run_cli(monkeypatch, source, "--out", out, "--allow-dense") == UsageError.exit_code
    assert "--overwrite" in capsys.readouterr().err
    words = (source, "--out", out, "--allow-dense", "--overwrite", "--zero-point", "integer", "--config", source)
    assert run_cli(monkeypatch, *words) == 0
    assert f"checkpoint {out}" in capsys.readouterr().out


def test_sources_that_are_none(tmp_path: Path, glassllm_dir: Path) -> None:
    """A plain model, a source of 8 bits throughout, and a folder without config are refused with a remedy."""
    with pytest.raises(UsageError, match=r"(?s)not a pre-quantized model.*l4q-train"):
        imported(glassllm_dir, tmp_path / "import")
    origin = exported(make_source(tmp_path, {"group_size": 32}), "gguf", tmp_path / "f32", gguf_type="F32")
    source = files.requantized(origin, tmp_path / "other.gguf", gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UnsupportedError, match=r"(?s)no module.*14 modules: 8 bits.*l4q-train"):
        imported(source, tmp_path / "import", allow_dense=True)
    with pytest.raises(UsageError, match="not found"):
        imported(source, tmp_path / "import", config=tmp_path)


@pytest.mark.slow_engine
def test_a_published_gguf_file_survives_the_round_trip(smollm2_dir: Path, tmp_path: Path) -> None:
    """SmolLM2's Q4_1 file, imported and exported: every tensor's bytes, and llama.cpp's answers, are the same."""
    source = smollm2_dir / "source.gguf"
    checkpoint = imported(source, tmp_path / "import", config=smollm2_dir)
    assert len(checkpoint.modules) == 210
    again = exported(checkpoint, "gguf", tmp_path / "gguf", gguf_embeddings="q8_0")
    assert tensors_of(again) == tensors_of(source)
    with RemoteEngine("llamacpp", source) as engine:
        before = engine.prompt_logprobs(IDS)
        engine.reload(again)
        after = engine.prompt_logprobs(IDS)
        data = bytearray(again.read_bytes())
        data[-1000] ^= 0x10  # in the last tensor
        again.write_bytes(data)
        engine.reload(again)
        twin = engine.prompt_logprobs(IDS)
    assert np.array_equal(before, after)
    assert not np.array_equal(before, twin)
