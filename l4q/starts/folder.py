"""A pre-quantized Hugging Face folder: safetensors read by one decoder, the rest by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from l4q.checkpoint import natural_order
from l4q.errors import UnsupportedError, UsageError
from l4q.shards import ShardReader
from l4q.starts.grid import LinearGrid

Tensors = dict[str, torch.Tensor]


class Decoder(Protocol):
    """A module that knows the tensors of one format."""

    FORMAT: str
    """quant_method."""
    MARK: str
    """Suffix of the tensor that every quantized module has."""
    PARTS: tuple[str, ...]
    """Suffixes of all tensors a quantized module may have, weights and parameters alike."""

    def check(self, section: dict[str, Any], where: str) -> None:
        """Refuse variants that cannot be read."""
        ...

    def decode(self, module: str, parts: Tensors, section: dict[str, Any], where: str) -> LinearGrid:
        """One module's tensors by suffix to its grid."""
        ...


class FolderStart:
    """A pre-quantized folder; see `PretrainedStart`."""

    def __init__(self, path: Path, section: dict[str, Any], decoder: Decoder, shards: ShardReader) -> None:
        self.path, self.format = path, decoder.FORMAT
        self._section, self._decoder, self._shards = section, decoder, shards
        mark = f".{decoder.MARK}"
        stems = {name.removesuffix(mark) for name in shards.names if name.endswith(mark)}
        self._modules = tuple(sorted(stems, key=natural_order))

    @classmethod
    def open(cls, path: Path, section: dict[str, Any], decoder: Any) -> FolderStart:
        """Check the quantization config and every safetensors header.

        Raises:
            UsageError: A file is missing or damaged, or no module is quantized.
            UnsupportedError: A variant of the format that cannot be read.
        """
        decoder.check(section, f"{path}/config.json")
        start = cls(path, section, decoder, ShardReader.open(path))
        if not start._modules:
            raise UsageError(
                "the folder's config says it is quantized, but no tensor is",
                where=path,
                got=f"no tensor named *.{decoder.MARK}",
                expected=f"a {decoder.FORMAT} folder",
            )
        return start

    def attach(self, model: Any) -> None:
        """Nothing to learn: the file names layers as the model does."""

    def modules(self) -> tuple[str, ...]:
        """Quantized modules in model order."""
        return self._modules

    def grid(self, module: str) -> LinearGrid | None:
        """The integers of a quantized module; None for any other."""
        if module not in self._modules:
            return None
        names = {part: f"{module}.{part}" for part in self._decoder.PARTS}
        parts = {part: self._shards.tensor(name) for part, name in names.items() if name in self._shards.names}
        return self._decoder.decode(module, parts, self._section, f"{self.path}: {module}")

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """The model with dequantized weights in `dtype`, and its tokenizer.

        Raises:
            UnsupportedError: transformers knows no causal language model for the config.
            UsageError: Tensors are missing, unknown or of another shape.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.path)
        del config.quantization_config
        architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if architecture is None:
            raise UnsupportedError(
                "transformers cannot load this as a causal language model",
                where=self.path,
                got=type(config).__name__,
                expected="an architecture of AutoModelForCausalLM",
            )
        model, info = architecture.from_pretrained(
            None, config=config, state_dict=self._state(dtype), dtype=dtype, output_loading_info=True
        )
        wrong = {key: sorted(map(str, names))[:5] for key, names in info.items() if names}
        if wrong:
            raise UsageError(
                "the folder's tensors are not those of its architecture",
                where=self.path,
                got=wrong,
                expected=architecture.__name__,
                remedy="copy the whole folder again; fused or renamed layers cannot be read",
            )
        model.config.name_or_path = self.path.resolve().name
        return model, transformers.AutoTokenizer.from_pretrained(self.path)

    def _state(self, dtype: torch.dtype) -> Tensors:
        """Every tensor of the model, dequantized, under its Hugging Face name."""
        state: Tensors = {}
        for module in self._modules:
            grid = self.grid(module)
            if grid is not None:
                state[f"{module}.weight"] = grid.dequantize().to(dtype)
        owned = {f"{module}.{part}" for module in self._modules for part in self._decoder.PARTS}
        for name in sorted(self._shards.names - owned):
            tensor = self._shards.tensor(name)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return state


def need(parts: Tensors, names: tuple[str, ...], where: str) -> None:
    """Refuse a module that lacks tensors.

    Raises:
        UsageError: The message lists them.
    """
    missing = [name for name in names if name not in parts]
    if missing:
        raise UsageError(
            "a quantized module is incomplete",
            where=where,
            got=f"no {', '.join(missing)}",
            expected=f"all of {', '.join(names)}",
            remedy="copy the whole folder again",
        )


def check_divides(columns: int, groups: int, where: str) -> None:
    """Refuse groups of unequal length.

    Raises:
        UsageError: `groups` does not divide `columns`.
    """
    if groups < 1 or columns % groups:
        raise UsageError(
            "the groups of a module do not divide its columns",
            where=where,
            got=f"{columns} columns, {groups} groups",
            remedy="the tensors are damaged or do not belong together",
        )


def check_order(g_idx: torch.Tensor | None, columns: int, groups: int, where: str) -> None:
    """Refuse activation-ordered weights: their groups are not runs of neighbouring columns.

    Raises:
        UnsupportedError: g_idx is not k // group_size.
    """
    if g_idx is None:
        return
    expected = torch.arange(columns) // (columns // groups)
    if not torch.equal(g_idx.to(torch.int64), expected):
        raise UnsupportedError(
            "activation-ordered weights cannot be a start: no grid of L4Q has their groups",
            where=where,
            got="a g_idx that is not k // group_size",
            expected="desc_act false",
            remedy="start from a model quantized without act-order, or from the 16-bit model",
        )
