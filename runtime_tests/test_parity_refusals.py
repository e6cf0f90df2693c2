"""What l4q-parity knows before it starts an engine: exports a runtime refuses, and windows that do not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from exporters.driver import export
from exporters.manifest import MANIFEST_NAME
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError, VerificationError
from runtime_tests.cli import command
from runtime_tests.cli_eval import command as eval_command
from runtime_tests.compare import ParityStats
from runtime_tests.conftest import ASSETS, CheckpointMaker
from runtime_tests.evaluation import find_target
from runtime_tests.parity_runs import Oracle, ParityOptions, ParityReport, ParityRow, assert_parity, run_target
from runtime_tests.report import table
from runtime_tests.report_html.page import render_page
from runtime_tests.run import check_context
from runtime_tests.targets import ParityTarget, detect
from runtime_tests.tiny_llama import tiny_checkpoint

TEXT = ASSETS / "text" / "wiki_demo.txt"
FIGURES = ParityStats(
    tokens=9, oracle_perplexity=2.0, perplexity=2.0, delta_percent=0.0, mean_abs_dlogprob=0.0, max_abs_dlogprob=0.0,
    kl=0.0, top1=1.0,
)  # fmt: skip
# no window: a row that started an engine would fail for want of answers
ORACLE = Oracle(windows=(), logprobs=(), stats=FIGURES, greedy=[], tokens_per_s=None)


def report_of(checkpoint: L4QCheckpoint, *rows: ParityRow) -> ParityReport:
    """A report of these rows."""
    return ParityReport(
        checkpoint=checkpoint.path, tokens=9, oracle_perplexity=2.0, oracle_tokens_per_s=None, rows=rows
    )


def exported(folder: Path, format_name: str, grid: dict[str, Any], **options: Any) -> tuple[L4QCheckpoint, Path]:
    """A tiny checkpoint and its export."""
    checkpoint = tiny_checkpoint(folder, QuantConfig(**grid))
    choices = ExportOptions(**options)
    return checkpoint, export(checkpoint, format_name, folder / "out", choices).folder


@pytest.mark.parametrize(
    ("format_name", "grid", "options", "reason"),
    [
        ("gptq", {"zero_point": "integer"}, {}, "vLLM does not load it: vLLM refuses GPTQ with sym: false"),
        ("gptq", {"bits": 2}, {"container_bits": 2}, "vLLM does not load it: vLLM refuses GPTQ of 2 bits"),
        ("awq", {}, {"dtype": "float32"}, "vLLM does not load it: vLLM's int4 kernels compute in float16"),
        ("compressed-tensors", {"bits": 2}, {"container_bits": 2}, "vLLM does not load it: vLLM has no CPU kernel"),
    ],
)
def test_what_a_runtime_refuses_is_not_run(
    tmp_path: Path, format_name: str, grid: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    """The row states the plan's reason and judges the bits; alone it is no success, and damage fails it."""
    checkpoint, folder = exported(tmp_path, format_name, grid, **options)
    (target,) = detect(folder)
    row = run_target(checkpoint, target, ORACLE, ParityOptions())
    assert row.skipped is not None
    assert row.skipped.startswith(reason)
    assert (row.passed, row.exact, row.error) == (True, len(checkpoint.modules), None)
    with pytest.raises(VerificationError, match=r"no runtime was compared; .*: not run, as vLLM does not load it"):
        assert_parity(report_of(checkpoint, row))
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[next(name for name in tensors if name.endswith(("qweight", "weight_packed")))][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    damaged = run_target(checkpoint, target, ORACLE, ParityOptions())
    assert not damaged.passed
    with pytest.raises(VerificationError, match="tensors bit-exact"):
        assert_parity(report_of(checkpoint, damaged))


def test_what_the_plan_says_loads_is_run(tmp_path: Path) -> None:
    """A symmetric export, a folder without a manifest and one of an older manifest are all handed to vLLM."""
    _, folder = exported(tmp_path, "gptq", {})
    manifest = folder / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    assert content["runtimes"]["vLLM"] == {"loads": True, "reason": ""}
    assert detect(folder)[0].refused == ""
    del content["runtimes"]
    manifest.write_text(json.dumps(content))
    assert detect(folder)[0].refused == ""
    manifest.unlink()
    assert detect(folder)[0].refused == ""


def test_l4q_eval_says_so_at_once(tmp_path: Path) -> None:
    """Perplexity of an export that its runtime refuses is exit code 3, without starting the runtime."""
    _, folder = exported(tmp_path, "gptq", {"zero_point": "integer"})
    with pytest.raises(UnsupportedError, match=r"(?s)the runtime of this export does not load it.*sym: false"):
        find_target(folder, None)
    assert find_target(folder, "loaders").engine == "loaders"
    assert CliRunner().invoke(eval_command, [str(folder), "--text", str(TEXT)]).exception.exit_code == 3  # type: ignore[union-attr]


def test_a_row_that_was_not_run_is_shown_as_such(tmp_path: Path) -> None:
    """Terminal and page say "not run" with the reason, and count it among neither passes nor failures."""
    checkpoint, folder = exported(tmp_path, "gptq", {"zero_point": "integer"})
    skipped = run_target(checkpoint, detect(folder)[0], ORACLE, ParityOptions())
    good = ParityRow(
        target=ParityTarget(format="onnx", engine="onnxruntime", variant="0", folder=folder),
        stats=FIGURES, checks=(), total=1,
    )  # fmt: skip
    content = report_of(checkpoint, skipped, good).to_dict()
    content["rows"][1]["passed"] = content["passed"] = True
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(content))
    assert "not run" in console.export_text()
    page = render_page(content)
    assert "Passed: the run is within its bounds, 1 not run" in page
    assert "Not run: vLLM does not load it: vLLM refuses GPTQ with sym: false" in page
    only = report_of(checkpoint, skipped).to_dict()
    assert only["passed"] is False
    assert "Failed: no runtime was compared" in render_page(only)


def test_windows_longer_than_the_context_are_refused(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """One clear error with exit code 2 before any engine starts; what fits exactly passes."""
    checkpoint = L4QCheckpoint.open(glass_checkpoint("none", group_size=32))  # a context of 128
    check_context(checkpoint, 128, 96)
    with pytest.raises(UsageError, match=r"(?s)where: --window.*got: 129 tokens.*at most 128, max_position_embeddings"):
        check_context(checkpoint, 129, 0)
    with pytest.raises(UsageError, match=r"(?s)where: --new-tokens.*got: 129 tokens, 32 of them the prompt"):
        check_context(checkpoint, 128, 97)
    del checkpoint.config["max_position_embeddings"]
    check_context(checkpoint, 10**6, 10**6)
    folder = export(checkpoint, "compressed-tensors", tmp_path / "out", check="none").folder
    words = [str(checkpoint.path), str(folder), "--text", str(TEXT), "--window", "512"]
    caught = CliRunner().invoke(command, words).exception
    assert isinstance(caught, UsageError)


def test_engines_get_the_context_they_need(tmp_path: Path) -> None:
    """Beyond an engine's default the option goes along; an option given by hand stays."""
    targets = {name: ParityTarget(format="", engine=name, variant="", folder=tmp_path) for name in ("vllm", "llamacpp")}
    assert targets["vllm"].engine_options(1024) == {}
    assert targets["vllm"].engine_options(1025) == {"max_model_len": 1025}
    assert targets["llamacpp"].engine_options(4097) == {"n_ctx": 4097}
    assert ParityTarget(format="", engine="torch", variant="", folder=tmp_path).engine_options(10**6) == {}
    given = ParityTarget(format="", engine="vllm", variant="", folder=tmp_path, options={"max_model_len": 9})
    assert given.engine_options(2000) == {"max_model_len": 9}


@pytest.mark.parametrize(("words", "code"), [(["--engine-timeout", "0"], 2), (["--timeout", "-1"], 2)])
def test_time_limits_must_be_positive(words: list[str], code: int, tmp_path: Path) -> None:
    """A time limit of nothing is refused under both names of the option."""
    result = CliRunner().invoke(command, [str(tmp_path), str(tmp_path), "--text", str(TEXT), *words])
    assert result.exit_code == code
    assert "is not in the range x>0" in result.output
