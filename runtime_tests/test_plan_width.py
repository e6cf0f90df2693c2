"""Tables fit the terminal: what --dry-run prints, whatever modules are called, and the figures of l4q-parity."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from exporters.plan import ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from exporters.run import print_plan
from l4q.cli_import import format_plan
from l4q.config import QuantConfig
from l4q.importing.plan import ImportedModule, ImportPlan
from runtime_tests.report import COLUMNS, LEFT_OUT, report_rows, table
from runtime_tests.report_runs import Reports

LONG = "language_model.model.vision_and_text.decoder_layers.{}.mixture_of_experts.experts.7.gate_up_projection"
REASON = "activation order: columns of one group are not neighbours, and a checkpoint has no permutation of columns"
PATH = "/srv/models/" + "a-folder-with-a-long-name/" * 5 + "model"
FIGURES_KEPT = set(COLUMNS[2:]) - set(LEFT_OUT)


def import_plan() -> str:
    """A plan of l4q-import with long names, as its command prints it."""
    modules = [
        ImportedModule(name=LONG.format(n), own="4 bits, groups of 128, zero-point integer", reason=REASON)
        for n in range(3)
    ]
    plan = ImportPlan(source=PATH, format="gptq", quant=QuantConfig(), modules=tuple(modules), notes=(REASON,))
    return format_plan(plan, 80)


def export_plan(capsys: pytest.CaptureFixture[str]) -> str:
    """A plan of l4q-export with long names, printed as its command does."""
    tensors = [
        PlannedTensor(name=LONG.format(n) + "x" * n, target="blk", encoding="INT4 block 64, scales FP16",
                      shape=(10**5, 10**5), nbytes=10**10, fidelity=Fidelity.ROUNDED, reason=REASON, quantized=True)
        for n in range(3)
    ]  # fmt: skip
    runtime = RuntimeSupport(runtime="ONNX Runtime", loads=False, reason=REASON)
    print_plan(ExportPlan(format="onnx", tensors=tuple(tensors), runtimes=(runtime,), notes=(REASON, PATH)))
    return capsys.readouterr().out


@pytest.mark.parametrize("print_it", [lambda _: import_plan(), export_plan], ids=["import", "export"])
def test_long_names_fit_80_columns(
    print_it: Callable[[pytest.CaptureFixture[str]], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No line is wider than 80 columns; put together again, every name and path is there in full."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = print_it(capsys)
    assert max(map(len, shown.splitlines())) <= 80
    assert len(LONG) > 80
    kept = "".join(character for character in shown if character.isalnum() or character in "/-_.")
    assert PATH in kept
    assert REASON.split()[-1] in shown


def test_a_wider_terminal_is_used() -> None:
    """The twin: at 200 columns a refused module stays on one line, which 80 columns would not hold."""
    module = ImportedModule(name=LONG.format(0), own="", reason="8 bits")
    plan = ImportPlan(source="model", format="gguf", quant=None, modules=(module,), notes=())
    assert f"      {module.name}: 8 bits" in format_plan(plan, 200).splitlines()
    assert f"      {module.name}: 8 bits" not in format_plan(plan, 80).splitlines()


def test_parity_figures_stay_whole_at_80_columns(reports: Reports) -> None:
    """Every figure of the narrow table stands on one line, unbroken; the wide one has all columns."""
    report = reports.data("good")
    narrow, wide = Console(width=80, record=True, file=StringIO()), Console(width=160, record=True, file=StringIO())
    for console in (narrow, wide):
        console.print(table(report, width=console.width))
    shown, full = narrow.export_text(), wide.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for row in report_rows(report):
        figures = [cell for cell, name in zip(row, COLUMNS, strict=True) if cell and name in FIGURES_KEPT]
        assert figures
        assert any(all(figure in line for figure in figures) for line in shown.splitlines()), figures
    assert all(name in full and name not in shown for name in LEFT_OUT)
