"""Pre-quantized models as L4Q checkpoints, integer for integer: source -> plan -> save, one module in memory at a time.

source.py   what a GPTQ, AWQ or compressed-tensors folder, or a GGUF file, offers
fit.py      one module's integers on a grid of the checkpoint, or why that grid cannot hold them
plan.py     the one grid that holds most modules, and what becomes of each
run.py      plan, refuse or write
"""

from l4q.importing.run import ImportOptions, import_model

__all__ = ["ImportOptions", "import_model"]
