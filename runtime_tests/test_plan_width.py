"""What --dry-run prints fits the terminal, whatever modules are called, and nothing of a name is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from exporters.plan import ExportPlan, Fidelity, PlannedTensor, RuntimeSupport
from exporters.run import print_plan
from l4q.cli_import import format_plan
from l4q.config import QuantConfig
from l4q.importing.plan import ImportedModule, ImportPlan

LONG = "language_model.model.vision_and_text.decoder_layers.{}.mixture_of_experts.experts.7.gate_up_projection"
REASON = "activation order: columns of one group are not neighbours, and a checkpoint has no permutation of columns"
PATH = "/srv/models/" + "a-folder-with-a-long-name/" * 5 + "model"


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
    kept = "".join(line for line in shown if line.isalnum() or line in "/-_.:,*")
    assert PATH in kept


def test_a_wider_terminal_is_used() -> None:
    """The twin: at 200 columns a refused module stays on one line, which 80 columns would not hold."""
    module = ImportedModule(name=LONG.format(0), own="", reason="8 bits")
    plan = ImportPlan(source="model", format="gguf", quant=None, modules=(module,), notes=())
    assert f"      {module.name}: 8 bits" in format_plan(plan, 200).splitlines()
    assert f"      {module.name}: 8 bits" not in format_plan(plan, 80).splitlines()
