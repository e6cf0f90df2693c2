"""l4q-import: other people's integers reach a checkpoint unchanged, or the module and the reason are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.driver import get_exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.cli_common import status
from l4q.cli_import import command
from l4q.errors import InexactError, UnsupportedError, UsageError
from l4q.importing import ImportOptions, import_model
from l4q.starts import open_start
from runtime_tests import start_files as files
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.gguf_models import LLAMA3_ROPE
from runtime_tests.import_sources import (
    UP,
    differing,
    exported,
    flip,
    gptq_source,
    imported,
    make_source,
    reorder,
    same_values,
    tensors_of,
)
from runtime_tests.random_models import dequantized_model, random_weight

DOWN = "model.layers.1.mlp.down_proj"
IDS = [5, 17, 250, 3, 99, 42]


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
    """A GGUF file whose RoPE divisors transformers' reader would drop is refused; --model-config brings them back."""
    origin = make_source(tmp_path, {"group_size": 32}, rope_parameters=LLAMA3_ROPE)
    source = exported(origin, "gguf", tmp_path / "gguf")
    with pytest.raises(UsageError, match=r"(?s)rope_freqs\.weight.*--model-config FOLDER"):
        imported(source, tmp_path / "import")
    checkpoint = imported(source, tmp_path / "import", config=origin.path)
    assert checkpoint.config["rope_parameters"] == origin.config["rope_parameters"]
    assert differing(checkpoint, origin) == []
    assert (checkpoint.path / "tokenizer.json").read_bytes() == (origin.path / "tokenizer.json").read_bytes()


def test_named_rope_scaling_needs_the_config(tmp_path: Path) -> None:
    """A scaling that stands in the metadata only is refused as well; a --model-config of other sizes does not fit."""
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    origin = make_source(tmp_path, {"group_size": 32}, rope_parameters=linear)
    source = exported(origin, "gguf", tmp_path / "gguf")
    with pytest.raises(UnsupportedError, match=r"(?s)RoPE scaling.*linear.*--model-config FOLDER"):
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
    words = (source, "--out", out, "--allow-dense", "--overwrite", "--zero-point", "integer", "--model-config", source)
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
