"""The methods compared, as one table: where each is implemented and what its cells depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.reproduction.bench import Deployed, Workbench

Runner = Callable[["Workbench"], "list[Deployed]"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One family of rows."""

    module: str
    """Under tools.reproduction; its function `run` takes a Workbench and returns what it deployed."""
    rows: tuple[str, ...]
    """Names of the rows it reports, in table order."""
    per_bits: bool = True
    """Trains once per bit width; otherwise once for all of them."""
    seeded: bool = True
    """Depends on the seed."""
    variant: str = ""
    """Passed to `run` through the workbench."""

    def runner(self) -> Runner:
        """Import the implementation."""
        run: Runner = import_module(f"tools.reproduction.{self.module}").run
        return run


METHODS: dict[str, Method] = {
    "base": Method(module="base", rows=("16-bit base", "round-to-nearest", "GPTQ"), per_bits=False, seeded=False),
    "lora": Method(
        module="lora",
        rows=("16-bit LoRA", "16-bit LoRA, merged, round-to-nearest", "16-bit LoRA, merged, GPTQ"),
        per_bits=False,
    ),
    "gptq-lora": Method(module="ptq_lora", variant="gptq", rows=("GPTQ + LoRA (mixed)", "GPTQ + LoRA, merged, GPTQ")),
    "qlora": Method(module="ptq_lora", variant="rtn", rows=("QLoRA* (mixed)", "QLoRA*, merged, round-to-nearest")),
    "qa-lora": Method(module="qa_lora", rows=("QA-LoRA (float zero-points)", "QA-LoRA (integer zero-points)")),
    "qat-lora": Method(module="qat_lora", rows=("QAT-LoRA (mixed)", "QAT-LoRA, merged")),
    "torchao": Method(module="torchao_lora", rows=("torchao QAT + LoRA (as trained)", "torchao QAT + LoRA, merged")),
    "l4q-none": Method(module="l4q_rows", variant="none", rows=("L4Q none",)),
    "l4q-integer": Method(module="l4q_rows", variant="integer", rows=("L4Q integer",)),
    "l4q-float": Method(module="l4q_rows", variant="float", rows=("L4Q float",)),
}

# One quantized file that a runtime loads. The other rows keep 16-bit matrices beside the integers.
DEPLOYABLE = (
    "round-to-nearest",
    "GPTQ",
    "16-bit LoRA, merged, round-to-nearest",
    "16-bit LoRA, merged, GPTQ",
    "GPTQ + LoRA, merged, GPTQ",
    "QLoRA*, merged, round-to-nearest",
    "QA-LoRA (float zero-points)",
    "QA-LoRA (integer zero-points)",
    "QAT-LoRA, merged",
    "torchao QAT + LoRA, merged",
    "L4Q none",
    "L4Q integer",
    "L4Q float",
)
OURS = ("L4Q none", "L4Q integer", "L4Q float")
REFERENCE_WORST = "round-to-nearest"
REFERENCE_BEST = "16-bit LoRA"
