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

    def obstacle(self, module: str) -> str:
        """Why `grid` has nothing for a module, in a few words."""
        ...

    def modules(self) -> tuple[str, ...]:
        """Modules that the model keeps quantized; `grid` may still have nothing for some of them."""
        ...

    def values(self, module: str) -> torch.Tensor:
        """The dequantized float32 weight [out, in] of one of `modules`."""
        ...

    def names(self) -> frozenset[str]:
        """Hugging Face names of the tensors that belong to none of `modules`."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One of `names`, without rounding."""
        ...

    def config(self) -> Any:
        """The transformers config of the unquantized model."""
        ...
