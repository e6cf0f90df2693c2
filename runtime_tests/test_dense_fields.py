"""--container-bits: dense 2- and 3-bit fields are exact under foreign decoders, and the plan says what they cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exporters.cli import command
from exporters.compressed_tensors.pack import pack_codes, unpack_codes
from exporters.driver import export
from exporters.judge import JUDGES_VARIABLE
from exporters.plan import ExportOptions
from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UnsupportedError, UsageError, VerificationError
from runtime_tests.hf_exports import section, stored, support, swap_rows, write_export, wrong_modules
from runtime_tests.tiny_llama import tiny_checkpoint

CT = "compressed-tensors"


@pytest.mark.parametrize("zero_point", ["none", "integer"])
@pytest.mark.parametrize("name", ["gptq", CT])
def test_two_bits_are_dense_and_exact(tmp_path: Path, name: str, zero_point: ZeroPoint) -> None:
    """16 codes a word, which the installed compressed-tensors reads; half the bytes of the 4-bit fields."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=2, zero_point=zero_point))
    result = export(checkpoint, name, tmp_path / "out", ExportOptions(container_bits=2))
    assert result.verified is not None
    assert result.verified.exact == result.verified.total == 14
    assert sum(tensor.nbytes for tensor in stored(tmp_path / "out").values()) == result.plan.nbytes
    assert any("16 codes in 1 word, 2 bits per code" in note for note in result.plan.notes)


@pytest.mark.parametrize(
    ("name", "quant", "sizes"),
    [
        ("gptq", QuantConfig(bits=3, zero_point="integer", group_size=32), {}),
        (CT, QuantConfig(bits=3, zero_point="integer", group_size=32), {}),
        (CT, QuantConfig(bits=2, zero_point="integer", group_size=-1), {"intermediate_size": 340}),
    ],
    ids=["gptq", "compressed-tensors", "2-bit codes in words that are not full"],
)
def test_three_bits_are_dense_and_exact(
    tmp_path: Path, dense_judge: Path, name: str, quant: QuantConfig, sizes: dict[str, Any]
) -> None:
    """32 codes in 3 words: a newer compressed-tensors decodes every module bit for bit; the plan counts the bytes."""
    checkpoint = tiny_checkpoint(tmp_path, quant, **sizes)
    result = export(checkpoint, name, tmp_path / "out", ExportOptions(container_bits=3))
    assert result.verified is not None
    assert result.verified.exact == result.verified.total == 14
    assert sum(tensor.nbytes for tensor in stored(tmp_path / "out").values()) == result.plan.nbytes
    assert any("32 codes in 3 words, 3 bits per code" in note for note in result.plan.notes)
    loads, reason = support(result.plan, "vLLM")
    assert not loads
    assert "without --container-bits" in reason.lower()
    assert support(result.plan, "transformers")[0]


def test_the_plan_says_the_bits_on_disk(tmp_path: Path) -> None:
    """The scales' share aside, 3-bit fields take three quarters of 4-bit fields; the config names the width."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3, group_size=-1))
    wide = write_export(checkpoint, CT, tmp_path / "wide")
    dense = write_export(checkpoint, CT, tmp_path / "dense", container_bits=3)
    assert wide.bits_per_weight - dense.bits_per_weight == pytest.approx(1)
    assert dense.quantized[0].encoding == "int3 group 256, symmetric"
    assert section(tmp_path / "dense")["config_groups"]["group_0"]["weights"]["num_bits"] == 3
    write_export(checkpoint, "gptq", tmp_path / "gptq", container_bits=3)
    assert section(tmp_path / "gptq")["bits"] == 3


def test_the_command_tells_what_it_would_write(tmp_path: Path) -> None:
    """--dry-run of --container-bits 3: three bits a code, and the runtimes that load it; --help names the option."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3, group_size=-1))
    arguments = [str(checkpoint.path), "--to", "gptq", CT, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, [*arguments, "--container-bits", "3", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)
    assert {name: plan["runtimes"]["vLLM"]["loads"] for name, plan in plans.items()} == {"gptq": False, CT: False}
    assert plans["gptq"]["runtimes"]["GPTQModel"]["loads"]
    assert plans["gptq"]["tensors"][0]["encoding"].startswith("int3 group")
    assert 3 < plans[CT]["bits_per_weight"] < 3.5
    assert not (tmp_path / "out").exists()
    assert "--container-bits" in CliRunner().invoke(command, ["--help"]).output


def test_codes_wider_than_the_fields_are_refused(tmp_path: Path) -> None:
    """4-bit codes do not fit 3-bit fields; nothing is written."""
    with pytest.raises(UnsupportedError, match=r"(?s)do not fit.*bits \[4\].*at most 3"):
        write_export(tiny_checkpoint(tmp_path, QuantConfig()), CT, tmp_path / "out", container_bits=3)
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fill_three_words_are_refused_in_gptq(tmp_path: Path) -> None:
    """GPTQ has no room for a word that is not full; the error names the multiple and the 4-bit fields."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3, group_size=-1), intermediate_size=264)
    with pytest.raises(UnsupportedError, match=r"(?s)mlp.down_proj \[128, 264\].*of 32.*leave --container-bits out"):
        write_export(checkpoint, "gptq", tmp_path / "out", container_bits=3)
    write_export(checkpoint, "gptq", tmp_path / "four")


def test_every_damaged_module_is_found(tmp_path: Path, dense_judge: Path) -> None:
    """The twin: a code across two words, a scale, two rows, a zero-point; exactly these four modules are reported."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3, zero_point="integer", group_size=32))
    write_export(checkpoint, CT, tmp_path / "out", container_bits=3)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    attention = "model.layers.0.self_attn"
    tensors[f"{attention}.q_proj.weight_packed"][5, 1] ^= 1  # the third bit of code 10
    tensors[f"{attention}.k_proj.weight_scale"][3, 1] *= 1.001
    swap_rows(tensors[f"{attention}.v_proj.weight_packed"])
    tensors[f"{attention}.o_proj.weight_zero_point"][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = wrong_modules(checkpoint, CT, tmp_path / "out")
    assert sorted(line.split(":")[0].split(" ")[0] for line in found) == [f"{attention}.{leaf}_proj" for leaf in "koqv"]


def test_words_that_are_not_full_are_cut_and_filled_again() -> None:
    """340 codes of 3 bits take 32 words, not the 33 of whole runs, and come back."""
    codes = np.random.default_rng(0).integers(0, 8, (4, 340), dtype=np.uint8)
    words = pack_codes(codes, 3)
    assert words.shape == (4, 32)
    assert np.array_equal(unpack_codes(words, 3, 340), codes)
    with pytest.raises(UsageError, match="at least 342"):
        unpack_codes(words, 3, 342)


OLD = str(Path(compressed_tensors.__file__).parent.parent)


@pytest.mark.parametrize(
    ("value", "found"), [(None, "not set"), ("/nowhere", "no such package"), (OLD, "version 0.17")]
)
def test_a_missing_judge_is_named_before_anything_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, found: str
) -> None:
    """Without a compressed-tensors that reads dense 3-bit words, the error says how to get one; nothing is left."""
    monkeypatch.delenv(JUDGES_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(JUDGES_VARIABLE, value)
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3))
    message = rf"(?s)compressed-tensors 0\.18.*L4Q_JUDGES.*got: .*{found}.*--target.*--no-verify"
    with pytest.raises(UsageError, match=message):
        export(checkpoint, "gptq", tmp_path / "out", ExportOptions(container_bits=3))
    assert not (tmp_path / "out").exists()
    export(checkpoint, "gptq", tmp_path / "out", ExportOptions(container_bits=3), check="none")


def test_a_judge_that_dies_is_reported_with_its_log(
    tmp_path: Path, dense_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that cannot be imported ends the other process; its traceback is the message."""
    package = tmp_path / "broken" / "compressed_tensors"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('half installed')\n")
    shutil.copytree(next(dense_judge.glob("*.dist-info")), package.parent / "compressed_tensors-0.20.0.dist-info")
    monkeypatch.setenv(JUDGES_VARIABLE, str(package.parent))
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(bits=3))
    with pytest.raises(VerificationError, match=r"(?s)another process died.*half installed"):
        export(checkpoint, CT, tmp_path / "out", ExportOptions(container_bits=3))
