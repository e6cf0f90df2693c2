"""L4Q: LoRA trained inside the quantizer, frozen to the very integers that every runtime serves.

``import l4q`` is light: torch and transformers load on first use. It also arranges that transformers, whenever it is
imported, can load L4Q checkpoints with ``AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import wrapt

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "Override": "l4q.rules",
    "QuantConfig": "l4q.config",
    "LoraConfig": "l4q.config",
    "GridLearning": "l4q.config",
    "QuantizedWeight": "l4q.weight",
    "L4QCheckpoint": "l4q.checkpoint",
    "save_checkpoint": "l4q.checkpoint",
    "L4QLinear": "l4q.linear",
    "wrap_linears": "l4q.model",
    "freeze_model": "l4q.model",
    "save_l4q": "l4q.model",
    "L4QError": "l4q.errors",
}

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'l4q' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def _register_with_transformers(_module: object) -> None:
    import_module("l4q.hf").register()


wrapt.register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
