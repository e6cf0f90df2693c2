"""What a pre-quantized model offers, whatever format it came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from l4q.starts.grid import LinearGrid


class PretrainedStart(Protocol):
    """A pre-quantized model folder or file, opened and checked; layers are read one at a time."""

    format: str
    """"gptq", "awq", "compressed-tensors" or "gguf"."""
    path: Path
    """The folder or file."""

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """The model with dequantized weights in `dtype`, and its tokenizer."""
        ...

    def attach(self, model: Any) -> None:
        """Learn what a model loaded earlier, by `load`, calls its layers."""
        ...

    def grid(self, module: str) -> LinearGrid | None:
        """The integers of one linear layer by its Hugging Face module name; None if it has none."""
        ...

    def modules(self) -> tuple[str, ...]:
        """Modules `grid` has integers for."""
        ...
