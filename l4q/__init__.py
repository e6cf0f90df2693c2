"""L4Q: LoRA trained inside the quantizer, frozen to the very integers that every runtime serves.

``import l4q`` is light: torch and transformers load on first use. It also arranges that transformers, whenever it is
imported, can load L4Q checkpoints with ``AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import wrapt

from l4q.lazy import lazy_attributes

if TYPE_CHECKING:
    from l4q.api import freeze as freeze
    from l4q.api import prepare as prepare
    from l4q.checkpoint import L4QCheckpoint as L4QCheckpoint
    from l4q.checkpoint import save_checkpoint as save_checkpoint
    from l4q.config import GridLearning as GridLearning
    from l4q.config import LoraConfig as LoraConfig
    from l4q.config import QuantConfig as QuantConfig
    from l4q.errors import L4QError as L4QError
    from l4q.linear import L4QLinear as L4QLinear
    from l4q.model import freeze_model as freeze_model
    from l4q.model import save_l4q as save_l4q
    from l4q.model import wrap_linears as wrap_linears
    from l4q.rules import Override as Override
    from l4q.weight import QuantizedWeight as QuantizedWeight

__version__ = "0.1.0"

# public name -> module that defines it; docs/api.md says what is stable
_EXPORTS = {
    "prepare": "l4q.api",
    "freeze": "l4q.api",
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
__getattr__ = lazy_attributes("l4q", _EXPORTS)


def _register_with_transformers(_module: object) -> None:
    import_module("l4q.hf")  # which registers itself, also where it is what imports transformers


wrapt.register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
