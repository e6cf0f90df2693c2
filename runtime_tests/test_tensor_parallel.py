"""--tensor-parallel: what vLLM can split is split by vLLM, what it cannot is refused with the N that work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from exporters.cli import command
from exporters.driver import export, make_plan
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.mixed_models import Mix, mixed_checkpoint
from runtime_tests.test_mixed_export import damaged, rows_of
from runtime_tests.test_vllm_formats import TOKENS, failed
from runtime_tests.tiny_llama import tiny_checkpoint

VLLM_FORMATS = ("gptq", "awq", "compressed-tensors")
# Key and value heads are fewer than ranks, o_proj has finer groups, down_proj one per row whose scales both ranks need.
SPLIT = Mix(
    quant=QuantConfig(group_size=64, zero_point="integer"),
    overrides=("*.o_proj:group_size=32", "*.down_proj:group_size=-1,zero_point=none"),
)


def test_vllm_runs_the_split(tmp_path: Path) -> None:
    """Two ranks of the real vLLM stay within the oracle's bounds, with copied key-value heads and a quantized head.

    The twin: against an oracle whose head has its rows turned by one, the same numbers fail.
    """
    checkpoint = mixed_checkpoint(SPLIT, tmp_path / "c", num_key_value_heads=1)
    result = export(checkpoint, "compressed-tensors", tmp_path / "out", ExportOptions(tensor_parallel=2))
    assert any(note.startswith("tensor parallel 2: every rank") for note in result.plan.notes)
    expected, wrong = (rows_of(c) for c in (checkpoint, damaged(checkpoint, tmp_path / "bad")))
    ranks = RemoteEngine("vllm", result.folder, timeout_s=400, max_model_len=128, tensor_parallel=2)
    try:
        rows = np.array(ranks.prompt_logprobs(TOKENS))
        assert ranks.info()["tensor_parallel"] == 2
    finally:
        ranks.close()
    assert failed(expected, rows, "compressed-tensors") == []
    assert failed(wrong, rows, "compressed-tensors")


# name -> grid, changes of the model, ranks, formats, message
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, tuple[str, ...], str]] = {
    "heads": (
        {"group_size": 32},
        {"vocab_size": 384, "intermediate_size": 384},
        3,
        VLLM_FORMATS,
        r"got: 4 attention heads(?s:.)*--tensor-parallel 2 or 4\n",
    ),
    "kv heads": (
        {"group_size": 32},
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 192,
            "intermediate_size": 192,
            "vocab_size": 384,
        },
        3,
        VLLM_FORMATS,
        r"got: 2 key-value heads\n(?s:.)*--tensor-parallel 2 or 6\n",
    ),
    "groups of o_proj and down_proj": (
        {"group_size": 128},
        {},
        4,
        VLLM_FORMATS,
        r"0\.self_attn\.o_proj: 32 columns a rank are not whole groups of 128(?s:.)*"
        r"down_proj: 64 columns a rank(?s:.)*expected: one rank",
    ),
    "groups of down_proj": (
        {"group_size": 64},
        {"intermediate_size": 320, "head_dim": 64},
        2,
        VLLM_FORMATS,
        r"got: model\.layers\.0\.mlp\.down_proj: 160 columns a rank are not whole groups of 64; model\.layers\.1\.mlp",
    ),
    "intermediate size": (
        {"group_size": 32},
        {"intermediate_size": 288},
        4,
        VLLM_FORMATS,
        "down_proj: 72 columns a rank",
    ),
    "tiles": (
        {"group_size": -1},
        {"intermediate_size": 288},
        2,
        ("gptq", "compressed-tensors"),
        r"down_proj: 144 columns a rank are no multiple of 32",
    ),
    "words of copied heads": (
        {"group_size": 32},
        {"head_dim": 4, "num_attention_heads": 24, "num_key_value_heads": 4, "hidden_size": 96},
        4,
        VLLM_FORMATS,
        r"qkv_proj: \[4, 24, 4\] rows a rank do not fill words of 8",
    ),
    "scales of whole rows in AWQ": (
        {"group_size": -1, "zero_point": "integer"},
        {},
        2,
        ("awq",),
        r"o_proj: one group per row, and vLLM's AWQ loader(?s:.)*expected: one rank",
    ),
    "not on one rank either": (
        {"zero_point": "integer"},
        {},
        2,
        ("gptq",),
        r"got: vLLM refuses GPTQ with sym: false(?s:.)*expected: one rank",
    ),
    "vocabulary": ({"group_size": 32}, {"vocab_size": 64}, 128, VLLM_FORMATS, "vocabulary of 64 rows with padding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_vllm_cannot_do_is_refused(case: str, tmp_path: Path) -> None:
    """Modules, what is wrong with each, and the numbers of ranks that work; nothing is written."""
    grid, changes, ranks, formats, message = REFUSED[case]
    checkpoint = tiny_checkpoint(tmp_path / "m", QuantConfig(**grid), **changes)
    for name in formats:
        with pytest.raises(UnsupportedError, match=message):
            export(checkpoint, name, tmp_path / name, ExportOptions(tensor_parallel=ranks))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", VLLM_FORMATS)
def test_a_split_that_works_is_planned(name: str, ranks: int, tmp_path: Path) -> None:
    """Whole heads, groups of 32 and rows that fill words pass in every vLLM format, with a note on Machete's tiles."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32))
    notes = make_plan(checkpoint, name, ExportOptions(tensor_parallel=ranks)).notes
    assert any(note.startswith(f"tensor parallel {ranks}: every rank") for note in notes)
    slow = [note for note in notes if "Marlin takes the place of Machete" in note]
    assert ["self_attn.o_proj" in note for note in slow] == ([] if ranks == 2 else [True])  # 128 / 4 columns
    assert not any("tensor parallel" in note for note in make_plan(checkpoint, name, ExportOptions()).notes)


def test_fused_matrices_are_cut_where_vllm_cuts_them(tmp_path: Path) -> None:
    """phi-3's qkv_proj and gate_up_proj are one matrix each: its parts, not the whole, must survive."""
    from runtime_tests.tiny_archs import TINY_ARCHS, tiny_arch_checkpoint

    checkpoint = tiny_arch_checkpoint(TINY_ARCHS["phi3"], tmp_path / "phi3")
    notes = make_plan(checkpoint, "compressed-tensors", ExportOptions(tensor_parallel=1)).notes
    assert not any("tensor parallel" in note for note in notes)
    with pytest.raises(UnsupportedError, match=r"qkv_proj: 80 rows a rank are no multiple of 32"):
        make_plan(checkpoint, "compressed-tensors", ExportOptions(tensor_parallel=2))


def test_other_formats_do_not_care(tmp_path: Path) -> None:
    """GGUF and ONNX have no tensor parallelism to survive."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=128))
    for name in ("gguf", "onnx"):
        assert make_plan(checkpoint, name, ExportOptions(tensor_parallel=3)) == make_plan(
            checkpoint, name, ExportOptions()
        )


def test_the_option_reaches_the_plan(tmp_path: Path) -> None:
    """The command refuses before writing, and a number of ranks below 1 is a usage error."""
    checkpoint = L4QCheckpoint.open(tiny_checkpoint(tmp_path / "m", QuantConfig()).path)
    words = [str(checkpoint.path), "--to", "gptq", "--out", str(tmp_path / "out"), "--tensor-parallel"]
    result = CliRunner().invoke(command, [*words, "3"])
    assert isinstance(result.exception, UnsupportedError)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(command, [*words, "2", "--dry-run", "--json"]).exit_code == 0
    assert CliRunner().invoke(command, [*words, "0"]).exit_code == 2
    with pytest.raises(UsageError, match="unknown number of ranks"):
        ExportOptions(tensor_parallel=0)
