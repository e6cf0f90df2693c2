"""A pre-quantized Hugging Face folder: safetensors read by one decoder, the rest by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from l4q.checkpoint import natural_order
from l4q.errors import UnsupportedError, UsageError
from l4q.finite import require_finite
from l4q.guards import foreign
from l4q.model_folder import CONFIG_NAME, check_config, check_size, read_config
from l4q.shards import ShardReader
from l4q.starts.grid import LinearGrid
from l4q.tokenizers import read_tokenizer

Tensors = dict[str, torch.Tensor]
ACTIVATION_ORDER = "activation order: its groups are not runs of neighbouring columns"


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
        """One module's tensors by suffix to its grid; in activation order with groups of a single column."""
        ...


class FolderStart:
    """A pre-quantized folder; see `PretrainedStart`."""

    name: str
    """What the model is called, whatever folder it lies in."""

    def __init__(self, path: Path, section: dict[str, Any], decoder: Decoder, shards: ShardReader) -> None:
        self.path, self.format, self.name = path, decoder.FORMAT, path.resolve().name
        self._section, self._decoder, self._shards = section, decoder, shards
        mark = f".{decoder.MARK}"
        stems = {name.removesuffix(mark) for name in shards.names if name.endswith(mark)}
        self._modules = tuple(sorted(stems, key=natural_order))

    @classmethod
    def open(cls, path: Path, section: dict[str, Any], decoder: Any, *, name: str = "") -> FolderStart:
        """Check the quantization config and every safetensors header; `name` is the folder's if it is empty.

        Raises:
            UsageError: A file is missing or damaged, or no module is quantized.
            UnsupportedError: A variant of the format that cannot be read.
        """
        with foreign("the quantization config cannot be read", where=path / CONFIG_NAME):
            decoder.check(section, f"{path}/{CONFIG_NAME}")
        shards = ShardReader.open(path)
        check_config(read_config(path), path / CONFIG_NAME, tensors=len(shards.names))
        start = cls(path, section, decoder, shards)
        start.name = name or start.name
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
        """The integers of a quantized module; None for any other, and for one in activation order."""
        grid = self._decode(module) if module in self._modules else None
        return None if grid is None or is_activation_ordered(grid) else grid

    def obstacle(self, module: str) -> str:
        """Why `grid` has nothing for a module."""
        return ACTIVATION_ORDER if module in self._modules else "the start keeps it on no linear grid"

    def values(self, module: str) -> torch.Tensor:
        """The dequantized float32 weight [out, in] of a quantized module, in activation order or not."""
        return self._decode(module).dequantize()

    def names(self) -> frozenset[str]:
        """Names of all tensors that are not part of a quantized module."""
        owned = {f"{module}.{part}" for module in self._modules for part in self._decoder.PARTS}
        return self._shards.names - owned

    def tensor(self, name: str) -> torch.Tensor:
        """One of `names`, in its stored dtype."""
        return require_finite(self._shards.tensor(name), f"{self.path}: {name}")

    def config(self) -> Any:
        """The transformers config, of the model without quantization."""
        import transformers

        with foreign("transformers cannot read config.json", where=self.path):
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        return config

    def _decode(self, module: str) -> LinearGrid:
        names = {part: f"{module}.{part}" for part in self._decoder.PARTS}
        parts = {part: self._shards.tensor(name) for part, name in names.items() if name in self._shards.names}
        where = f"{self.path}: {module}"
        with foreign("the tensors of a quantized module do not fit together", where=where):
            return self._decoder.decode(module, parts, self._section, where)

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """The model with dequantized weights in `dtype`, and its tokenizer.

        Raises:
            UnsupportedError: transformers knows no causal language model for the config.
            UsageError: Tensors are missing, unknown or of another shape.
        """
        import transformers

        config = self.config()
        architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if architecture is None:
            raise UnsupportedError(
                "transformers cannot load this as a causal language model",
                where=self.path,
                got=type(config).__name__,
                expected="an architecture of AutoModelForCausalLM",
            )
        with foreign("transformers cannot build this model", where=self.path, kind=UnsupportedError):
            with torch.device("meta"):
                check_size(architecture(config), self.path)
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
        model.config.name_or_path = self.name
        return model, read_tokenizer(self.path)

    def _state(self, dtype: torch.dtype) -> Tensors:
        """Every tensor of the model, dequantized, under its Hugging Face name."""
        state: Tensors = {f"{module}.weight": self.values(module).to(dtype) for module in self._modules}
        for name in sorted(self.names()):
            tensor = self.tensor(name)
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


def group_order(g_idx: torch.Tensor | None, columns: int, groups: int, where: str) -> torch.Tensor | None:
    """The group of every column, int64 [columns], if groups are not runs of neighbouring columns; else None.

    Raises:
        UsageError: g_idx has another length, or names groups that do not exist.
    """
    if g_idx is None:
        return None
    order = g_idx.to(torch.int64)
    if order.numel() == 0 or order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= groups:
        raise UsageError(
            "g_idx does not give every column a group",
            where=f"{where}.g_idx",
            got=f"{list(order.shape)}, groups {order.unique()[[0, -1]].tolist() if order.numel() else []}",
            expected=f"[{columns}], groups 0 to {groups - 1}",
            remedy="the tensors are damaged or do not belong together",
        )
    return None if torch.equal(order, torch.arange(columns) // (columns // groups)) else order


def is_activation_ordered(grid: LinearGrid) -> bool:
    """Whether a decoder had to give every column its own group."""
    return grid.group_size == 1
